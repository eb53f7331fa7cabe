"""A checkpoint's directory, as a loader finds it."""

import json
from os import PathLike
from pathlib import Path

from .check import shorten
from .headers import read_headers, weight_files

TEXT_ONLY = "minimax_m3"
MODEL_TYPES = ("minimax_m3_vl", TEXT_ONLY)


def is_m3(directory: object) -> bool:
    """Whether ``config.json`` in ``directory`` is MiniMax-M3's; False where it cannot be read."""
    return model_type_of(directory) in MODEL_TYPES


def model_type_of(directory: object) -> str | None:
    """The ``model_type`` of ``config.json`` in ``directory``; None where there is none to read."""
    if not isinstance(directory, (str, PathLike)):
        return None
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError, TypeError):
        return None
    return model_type if isinstance(model_type, str) else None


def check_files(directory: str | Path) -> None:
    """Read every shard's header before anything is loaded.

    Raises:
        ValueError: shards are absent, cut off or damaged, or a tensor is in two of them.
    """
    if not weight_files(Path(directory)):
        # The loader has an error of its own for that.
        return
    problems = read_headers(directory).problems
    if problems:
        head = f"{directory} is not a whole checkpoint (mlx-m3-plugin):"
        raise ValueError("\n  ".join([head, *shorten(problems)]))
