"""A conversion carried out: resumable, and never complete to look at before it is.

Everything is written into ``DST.unfinished``.  A file that has its final name there is finished and
is not written again; the directory gets its own name last of all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...weights.headers import INDEX, weight_files
from ...weights.reading import TensorReader
from ...weights.writing import ShardWriter
from . import settings
from .pieces import made_pieces
from .plan import Module, Plan
from .sensitivity import Scores, write_scores

_STATE = "mlx-m3-convert.json"
SENSITIVITY = "mlx-m3-sensitivity.json"
_METADATA = {"format": "mlx"}
# For headers, settings and the card.
_SMALL_FILES = 64 << 20
# What a piece may take of the memory given: besides it there are Python, MLX and the file cache.
_SHARE_OF_MEMORY = 8
_LARGEST_PIECE = 1 << 30

# Called with the module that was written, and its bytes.
Progress = Callable[[Module, int], None]


@dataclass(frozen=True)
class Report:
    """What a conversion has done.

    Attributes:
        files: weight files.  resumed: how many of them were there from an earlier run.
    """

    path: str
    recipe: str
    files: int
    bytes: int
    parameters: int
    bits_per_weight: float
    packed: bool
    resumed: int


def convert(
    plan: Plan,
    destination: str | Path,
    *,
    memory: int,
    progress: Progress,
    scores: Scores | None = None,
) -> Report:
    """Write what ``plan`` describes into ``destination``.

    Args:
        memory: bytes that the work may take.
        progress: called after each module.
        scores: the sensitivity of layers that the plan was worked out from, to be kept with it.

    Raises:
        OSError: ``destination`` is there already, the disk is full, or a file cannot be read or
            written.
        ValueError: an unfinished conversion in its place is another one.
    """
    destination = Path(destination).expanduser().absolute()
    unfinished = destination.with_name(destination.name + ".unfinished")
    check_destination(plan, destination)
    unfinished.mkdir(parents=True, exist_ok=True)
    _claim(unfinished, plan)
    names = plan.file_names()
    resumed = sum((unfinished / name).exists() for name in names)
    _check_space(plan, unfinished)
    with TensorReader(plan.source.directory, plan.source.headers.tensors) as reader:
        for name, modules in zip(names, plan.shards, strict=True):
            _write_shard(unfinished / name, modules, reader, memory, progress)
    _write_index(unfinished, plan)
    settings.write_settings(unfinished, plan)
    if scores is not None:
        write_scores(unfinished / SENSITIVITY, scores)
    (unfinished / _STATE).unlink()
    os.rename(unfinished, destination)
    return Report(
        str(destination),
        plan.recipe.name,
        len(names),
        plan.nbytes,
        plan.parameters,
        plan.bits_per_weight,
        plan.packed,
        resumed,
    )


def check_destination(plan: Plan, destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} is there already; nothing is written over")
    if destination.resolve() == plan.source.directory.resolve():
        raise FileExistsError("a checkpoint cannot be converted in its own place")
    if destination.is_dir():
        destination.rmdir()


def _claim(unfinished: Path, plan: Plan) -> None:
    """Leave word of which conversion this is, or see that it is the one that was begun here."""
    ours = fingerprint(plan)
    file = unfinished / _STATE
    if file.exists():
        try:
            theirs = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            theirs = None
        if theirs != ours:
            raise ValueError(
                f"{unfinished} holds an unfinished conversion of another source, recipe or version; "
                "finish that one, or delete the directory"
            )
        return
    if any(unfinished.iterdir()):
        raise ValueError(f"{unfinished} is there and holds no conversion of ours; delete it, or name another")
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(ours, indent=2), encoding="utf-8")
    os.replace(temporary, file)


def fingerprint(plan: Plan) -> dict[str, Any]:
    """What has to be the same for two runs to write the same bytes."""
    files = {}
    for file in weight_files(plan.source.directory):
        status = file.stat()
        files[file.name] = [status.st_size, status.st_mtime_ns]
    hows = {path: str(how) for path, how in sorted(plan.hows.items())}
    return {
        "version": __version__,
        "source": str(plan.source.directory.resolve()),
        "files": files,
        "recipe": plan.recipe.name,
        "precisions": hashlib.sha256(json.dumps(hows).encode()).hexdigest(),
        "bytes": plan.nbytes,
    }


def _check_space(plan: Plan, unfinished: Path) -> None:
    there = sum(file.stat().st_size for file in unfinished.glob("*.safetensors"))
    needed, free = plan.nbytes + _SMALL_FILES - there, shutil.disk_usage(unfinished).free
    if needed > free:
        raise OSError(
            f"{unfinished.parent} has {free / 1e9:,.1f} GB free, and {needed / 1e9:,.1f} GB are to be written"
        )


def _write_shard(
    path: Path, modules: list[Module], reader: TensorReader, memory: int, progress: Progress
) -> None:
    if path.exists():
        for module in modules:
            progress(module, module.nbytes)
        return
    tensors = [tensor for module in modules for tensor in module.tensors.values()]
    largest = min(memory // _SHARE_OF_MEMORY, _LARGEST_PIECE)
    with ShardWriter(path, tensors, _METADATA) as writer:
        for module in modules:
            for row, parts in made_pieces(module, reader, largest):
                for part, array in parts.items():
                    writer.write(module.tensors[part].name, row, array)
            progress(module, module.nbytes)
        writer.finish()


def _write_index(unfinished: Path, plan: Plan) -> None:
    weight_map = {
        tensor.name: name
        for name, modules in zip(plan.file_names(), plan.shards, strict=True)
        for module in modules
        for tensor in module.tensors.values()
    }
    index = {
        "metadata": {"total_size": plan.nbytes, "total_parameters": plan.parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (unfinished / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
