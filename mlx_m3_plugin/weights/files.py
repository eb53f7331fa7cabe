"""A checkpoint's directory, as a loader finds it."""

import json
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from ..model.config import TextConfig
from .check import shorten
from .headers import INDEX, read_headers, weight_files
from .names import is_vision, layer_of, published_name

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


def shards_with(directory: Path, config: TextConfig, layers: Container[int]) -> list[str] | None:
    """Names of the shards that hold any of these layers, or what the text model has besides layers;
    None where there is no index.
    """
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    wanted = set()
    for stored, file in index["weight_map"].items():
        name = published_name(stored, config)
        layer = layer_of(name)
        if not is_vision(name) and (layer is None or layer in layers):
            wanted.add(file)
    return sorted(wanted)


@contextmanager
def only_shards(directory: Path, wanted: Sequence[str] | None) -> Iterator[Path]:
    """A directory of links in which these shards are a whole checkpoint; ``directory`` without ``wanted``."""
    if wanted is None:
        yield directory
        return
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file in wanted}
    shards = {file.name for file in weight_files(directory)}
    kept = (f for f in directory.iterdir() if f.name != INDEX and (f.name in wanted or f.name not in shards))
    with _links({file.name: file for file in kept}) as links:
        (links / INDEX).write_text(json.dumps(index), encoding="utf-8")
        yield links


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
    names = {}
    for file in directory.iterdir():
        prefix = "model-" if file in shards and not file.name.startswith("model") else ""
        names[prefix + file.name] = file
    with _links(names) as links:
        yield links


@contextmanager
def _links(files: Mapping[str, Path]) -> Iterator[Path]:
    """A directory in which each file has its name here."""
    with tempfile.TemporaryDirectory(prefix="mlx-m3-") as links:
        for name, file in files.items():
            (Path(links) / name).symlink_to(file.resolve())
        yield Path(links)
