"""Directories of links, in which mlx-lm finds the shards that it should load."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlx_m3_plugin.weights.headers import INDEX, weight_files


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
    are not needed once the files are open.
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
