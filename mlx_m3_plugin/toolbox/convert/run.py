"""A conversion carried out: resumable, and never complete to look at before it is.

Everything is written into ``DST.unfinished``, by one process at a time.  A file that has its final name
there is finished and is not written again; the directory gets its own name last of all.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ... import __version__
from ...weights.headers import INDEX, weight_files
from ..checksums import read_sums, sha256_of, write_sums
from ..new_directory import STATE, contents, new_directory, replace_text
from ..shards import ShardWriter, TensorReader
from . import config_and_card
from .pieces import made_pieces
from .plan import Module, Plan
from .sensitivity import Scores, write_scores

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
        FileExistsError: ``destination`` is there already.
        BlockingIOError: another process is writing it.
        OSError: the disk is full, or a file cannot be read or written.
        ValueError: an unfinished conversion in its place is another one.
    """
    directory = Path(destination)
    with new_directory(directory, "convert", resumable=True) as unfinished:
        resumed = write(plan, unfinished, memory=memory, progress=progress, scores=scores)
    return report(plan, directory, resumed)


def write(
    plan: Plan, unfinished: Path, *, memory: int, progress: Progress, scores: Scores | None = None
) -> int:
    """The same into a directory that this process has locked; how many files were there already."""
    check_unfinished(unfinished, plan)
    replace_text(unfinished / STATE, json.dumps(fingerprint(plan), indent=2))
    names = plan.file_names()
    resumed = sum((unfinished / name).exists() for name in names)
    sums = read_sums(unfinished)
    with TensorReader(plan.source.directory, plan.source.headers.tensors) as reader:
        for name, modules in zip(names, plan.shards, strict=True):
            _write_shard(unfinished / name, modules, reader, memory, progress)
            if name not in sums:
                sums[name] = sha256_of(unfinished / name)
                write_sums(unfinished, sums)
    _write_index(unfinished, plan)
    config_and_card.write_settings(unfinished, plan)
    if scores is not None:
        write_scores(unfinished / SENSITIVITY, scores)
    return resumed


def report(plan: Plan, destination: Path, resumed: int) -> Report:
    return Report(
        str(destination.expanduser().absolute()),
        plan.recipe.name,
        len(plan.shards),
        plan.nbytes,
        plan.parameters,
        plan.bits_per_weight,
        plan.packed,
        resumed,
    )


def check_unfinished(unfinished: Path, plan: Plan, *, is_draft: bool = False) -> None:
    """See that ``plan`` can be written into ``unfinished``, or gone on with there.

    Args:
        is_draft: precisions are yet to be worked out.

    Raises:
        ValueError: another conversion was begun there, or it holds other files.
        OSError: the disk has too little space.
    """
    file = unfinished / STATE
    if file.exists():
        unknown = ("precisions", "bytes") if is_draft else ()
        if _known(_begun(file), unknown) != _known(fingerprint(plan), unknown):
            raise ValueError(
                f"{unfinished} holds an unfinished conversion of another source, recipe or version; "
                "finish that one, or delete the directory"
            )
    elif contents(unfinished):
        raise ValueError(f"{unfinished} is there and holds no conversion of ours; delete it, or name another")
    space = space_for(plan, unfinished)
    if not space.is_enough:
        raise OSError(f"{unfinished.parent} has {space}")


def _begun(state: Path) -> dict[str, Any]:
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}


def _known(content: Mapping[str, Any], unknown: Container[str]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in unknown}


def fingerprint(plan: Plan) -> dict[str, Any]:
    """What has to be the same for two runs to write the same bytes."""
    files = {}
    for file in weight_files(plan.source.directory):
        status = file.stat()
        files[file.name] = [status.st_size, status.st_mtime_ns]
    specs = {path: str(spec) for path, spec in sorted(plan.specs.items())}
    return {
        "version": __version__,
        "source": str(plan.source.directory.resolve()),
        "files": files,
        "recipe": plan.recipe.name,
        "precisions": hashlib.sha256(json.dumps(specs).encode()).hexdigest(),
        "bytes": plan.nbytes,
    }


class Space(NamedTuple):
    """Bytes that are still to be written, and those that are free on the disk."""

    needed: int
    free: int

    @property
    def is_enough(self) -> bool:
        return self.needed <= self.free

    def __str__(self) -> str:
        return f"{self.free / 1e9:,.1f} GB free, and {self.needed / 1e9:,.1f} GB are to be written"


def space_for(plan: Plan, unfinished: Path) -> Space:
    """On the disk where ``unfinished`` is or will be."""
    finished = sum(file.stat().st_size for file in unfinished.glob("*.safetensors"))
    there = next(parent for parent in (unfinished, *unfinished.parents) if parent.exists())
    return Space(plan.nbytes + _SMALL_FILES - finished, shutil.disk_usage(there).free)


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
