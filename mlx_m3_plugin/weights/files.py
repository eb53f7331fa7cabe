"""A checkpoint's directory, as a loader finds it."""

import functools
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .headers import read_headers, weight_files

MODEL_TYPES = ("minimax_m3_vl", "minimax_m3")
_PROBLEMS_TOLD = 10


def is_m3(directory: str | Path) -> bool:
    """Whether ``config.json`` in ``directory`` says so.  What cannot be read is not M3's."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        return config.get("model_type") in MODEL_TYPES
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def check_files(directory: str | Path) -> None:
    """Look at every shard's header before anything is loaded.

    Raises:
        ValueError: shards are absent, cut off or damaged, or a tensor is in two of them.
    """
    if not weight_files(Path(directory)):
        # The loader has its own words for that.
        return
    problems = read_headers(directory).problems
    if problems:
        more = len(problems) - _PROBLEMS_TOLD
        told = problems[:_PROBLEMS_TOLD] + ([f"... and {more} more"] if more > 0 else [])
        raise ValueError("\n  ".join([f"{directory} is not a whole checkpoint (mlx-m3-plugin):", *told]))


def with_checks(load_model: Callable[..., Any]) -> Callable[..., Any]:
    """A host's ``load_model(path, lazy=False, ...)`` that looks at an M3 checkpoint's files before,
    and at its values after.

    MLX opens shards that are cut off or absent, and lets the second of two tensors of one name
    win.  Other checkpoints go straight through.
    """

    @functools.wraps(load_model)
    def checked(model_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_m3(model_path):
            return load_model(model_path, *args, **kwargs)
        asked = inspect.signature(load_model).bind(model_path, *args, **kwargs)
        asked.apply_defaults()
        options = {**asked.kwargs, **asked.arguments}
        # Not strict: one rank of several may have fetched no more than its own shards.
        if options.get("strict", True):
            check_files(model_path)
        loaded = load_model(model_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Reads scales, which a lazy load is to leave alone.
        if not options.get("lazy") and hasattr(model, "check_values"):
            model.check_values()
        return loaded

    return checked


@contextmanager
def with_shards_named_as_expected(directory: str | Path) -> Iterator[Path]:
    """``directory``, or one of links to it whose shards have names that mlx-lm looks for.

    mlx-lm opens ``model*.safetensors``; ModelOpt's checkpoints name theirs otherwise.  The links
    may go once the files are open.
    """
    directory = Path(directory)
    shards = weight_files(directory)
    if all(file.name.startswith("model") for file in shards):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="mlx-m3-") as links:
        for file in directory.iterdir():
            prefix = "model-" if file in shards and not file.name.startswith("model") else ""
            (Path(links) / (prefix + file.name)).symlink_to(file.resolve())
        yield Path(links)
