"""A conversion carried out: it can be resumed, and never looks complete before it is.

Everything is written into ``DST.unfinished``, by one process at a time.  A shard that has its final name
there is finished and is not written again.  The directory gets its own name last.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ... import __version__
from ...weights.byte_ranges import TensorReader
from ...weights.headers import DRAFT_FOLDER, INDEX, weight_files
from ...weights.quantization import with_quantization
from ..checkpoint import DRAFT_FOLDERS, DRAFT_TENSORS, Checkpoint
from ..checksums import read_sums, sha256_of, write_sums
from ..common import Progress, read_json_object
from ..new_directory import STATE, contents, replace_text
from ..precision import converted
from ..shards import ShardWriter, header_of
from .allocation import Scores, write_scores
from .config_and_card import write_config_and_card
from .plan import ConversionPlan, DraftPlan, NewModule, quantization_of

SENSITIVITY = "mlx-m3-sensitivity.json"
# Bytes for headers, config, tokenizer and the card.
_SMALL_FILES = 64 << 20
# Of the memory, for the rows that are converted at once; Python, MLX and the file cache need some, too.
_PART_OF_MEMORY = 8
_MOST_AT_ONCE = 1 << 30
# Quantizing makes some copies in float32 of what it works on.
_BYTES_PER_ELEMENT = 24
# Of tensors that are copied.
_PIECE = 1 << 22


def write(
    plan: ConversionPlan, unfinished: Path, *, memory: int, progress: Progress, scores: Scores | None = None
) -> int:
    """Write what ``plan`` describes into a directory that this process has locked.

    Args:
        memory: bytes that the work may take.
        scores: the sensitivity that the bits are from, to be saved with the weights.

    Returns:
        How many of the files were there already, from an earlier run.

    Raises:
        OSError: the disk is full, or a file cannot be read or written.
        ValueError: ``unfinished`` holds another conversion, or other files.
    """
    check_unfinished(unfinished, plan)
    replace_text(unfinished / STATE, json.dumps(fingerprint(plan), indent=2))
    resumed = sum((unfinished / name).exists() for name in plan.shards)
    sums = read_sums(unfinished)
    with plan.source.reader() as reader:
        for name, modules in plan.shards.items():
            _write_shard(unfinished / name, modules, reader, memory, progress)
            if name not in sums:
                sums[name] = sha256_of(unfinished / name)
                write_sums(unfinished, sums)
    if plan.draft is not None:
        _write_draft(plan.source, plan.draft, unfinished, memory)
        files = _files_in(unfinished, DRAFT_FOLDERS)
        sums |= {file.relative_to(unfinished).as_posix(): sha256_of(file) for file in files}
        write_sums(unfinished, sums)
    _write_index(unfinished, plan)
    write_config_and_card(unfinished, plan)
    if scores is not None:
        write_scores(unfinished / SENSITIVITY, scores)
    return resumed


# --- before anything is written ---


def check_unfinished(unfinished: Path, plan: ConversionPlan, *, bits_may_change: bool = False) -> None:
    """See that ``plan`` can be written or resumed in ``unfinished``.

    Raises:
        ValueError: another conversion was begun there, or it holds other files.
        OSError: the disk has too little space.
    """
    if (unfinished / STATE).exists():
        wanted, begun = fingerprint(plan), {}
        with suppress(ValueError):
            begun = read_json_object(unfinished / STATE)
        changing = {"precisions", "bytes"} if bits_may_change else set()
        if any(begun.get(key) != wanted[key] for key in wanted.keys() - changing):
            raise ValueError(
                f"{unfinished} holds an unfinished conversion of another source, recipe or version; "
                "finish that one, or delete the directory"
            )
    elif contents(unfinished):
        raise ValueError(
            f"{unfinished} holds files that no conversion wrote; delete it, or choose another destination"
        )
    space = space_for(plan, unfinished)
    if not space.is_enough:
        raise OSError(f"{unfinished.parent} has {space}")


def fingerprint(plan: ConversionPlan) -> dict[str, Any]:
    """What has to be the same for two runs to write the same bytes."""
    statuses = {file.name: file.stat() for file in weight_files(plan.source.directory)}
    specs = {path: str(spec) for path, spec in sorted(plan.specs.items())}
    return {
        "version": __version__,
        "source": str(plan.source.directory.resolve()),
        "files": {name: [status.st_size, status.st_mtime_ns] for name, status in statuses.items()},
        "recipe": plan.recipe.name,
        "precisions": hashlib.sha256(json.dumps(specs).encode()).hexdigest(),
        "bytes": plan.nbytes,
        "draft": None if plan.draft is None else plan.draft.nbytes,
    }


class Space(NamedTuple):
    """Bytes still to be written, and bytes free on the disk."""

    needed: int
    free: int

    @property
    def is_enough(self) -> bool:
        return self.needed <= self.free

    def __str__(self) -> str:
        return f"{self.free / 1e9:,.1f} GB free, and {self.needed / 1e9:,.1f} GB are needed"


def space_for(plan: ConversionPlan, unfinished: Path) -> Space:
    """On the disk where ``unfinished`` is or will be."""
    finished = sum(file.stat().st_size for file in unfinished.glob("*.safetensors"))
    there = next(parent for parent in (unfinished, *unfinished.parents) if parent.exists())
    draft = 0 if plan.draft is None else plan.draft.nbytes or _bytes_of_draft(plan.source)
    return Space(plan.nbytes + draft + _SMALL_FILES - finished, shutil.disk_usage(there).free)


def _bytes_of_draft(source: Checkpoint) -> int:
    stored = sum(tensor.nbytes for tensor in source.draft_tensors.values())
    return stored + sum(file.stat().st_size for file in _files_in(source.directory, source.draft_folders))


def _files_in(directory: Path, folders: Iterable[str]) -> Iterator[Path]:
    return (file for folder in folders for file in (directory / folder).rglob("*") if file.is_file())


# --- shards ---


def _write_shard(
    path: Path, modules: Collection[NewModule], reader: TensorReader, memory: int, progress: Progress
) -> None:
    if path.exists():
        for module in modules:
            progress(module, module.nbytes)
        return
    tensors = [tensor for module in modules for tensor in module.tensors.values()]
    at_once = min(memory // _PART_OF_MEMORY, _MOST_AT_ONCE)
    with ShardWriter(path, tensors) as writer:
        for module in modules:
            for part, row, array in _converted_rows(module, reader, at_once):
                writer.write(module.tensors[part].name, row, array)
            progress(module, module.nbytes)
        writer.finish()


def _converted_rows(
    module: NewModule, reader: TensorReader, memory: int
) -> Iterator[tuple[str, int, mx.array]]:
    """All of a module's tensors in pieces of some matrix rows: the part, the first row, and the rows.

    Rows are quantized one by one, so it makes no difference where they are cut.  ``memory``: for one piece.
    """
    before = 0
    for number, matrix in enumerate(module.matrices):
        step = max(1, memory // (_BYTES_PER_ELEMENT * matrix.inputs))
        for start in range(0, matrix.outputs, step):
            stop = min(start + step, matrix.outputs)
            arrays = {
                part: reader.read(tensor if part == "global_scale" else tensor.taken(start, stop))
                for part, tensor in matrix.parts.items()
            }
            if module.spec != matrix.spec:
                arrays = converted(arrays, matrix.spec, module.spec)
                mx.eval(arrays)
            for part, array in arrays.items():
                if part != "global_scale":
                    yield part, before + start, array
                elif start == 0:
                    # One for the whole matrix.
                    yield part, number, array
        before += matrix.outputs


def _write_index(unfinished: Path, plan: ConversionPlan) -> None:
    weight_map = {
        tensor.name: name
        for name, modules in plan.shards.items()
        for module in modules
        for tensor in module.tensors.values()
    }
    index = {
        "metadata": {"total_size": plan.nbytes, "total_parameters": plan.parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (unfinished / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


# --- the draft head, in a folder where stock mlx-lm and mlx-vlm look for no weights ---


def _write_draft(source: Checkpoint, draft: DraftPlan, unfinished: Path, memory: int) -> None:
    if draft.head is None:
        _copy_draft(source, unfinished)
        return
    folder = unfinished / DRAFT_FOLDER
    folder.mkdir(exist_ok=True)
    # Of another run, perhaps of another source.
    (folder / "model.safetensors").unlink(missing_ok=True)
    with TensorReader(draft.head.directory, draft.head.headers.tensors) as reader:
        _write_shard(folder / "model.safetensors", draft.modules, reader, memory, lambda *_: None)
    config = with_quantization(draft.head.whole_config, quantization_of(draft.modules))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_draft(source: Checkpoint, unfinished: Path) -> None:
    """Folders are copied; draft tensors of the shards go into one of their own."""
    for folder in source.draft_folders:
        shutil.copytree(source.directory / folder, unfinished / folder, dirs_exist_ok=True)
    if source.draft_tensors:
        new = unfinished / DRAFT_TENSORS
        new.mkdir(exist_ok=True)
        shutil.copyfile(source.directory / "config.json", new / "config.json")
        _copy_tensors(source, new / "model.safetensors")


def _copy_tensors(source: Checkpoint, file: Path) -> None:
    """With their names, bytes and dtypes, also those that MLX reads as others."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in source.draft_tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": tensor.stored_dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    with file.open("wb") as new:
        new.write(header_of(entries, (", ", ": ")))
        for tensor in source.draft_tensors.values():
            with (source.directory / tensor.file).open("rb") as shard:
                shard.seek(tensor.start)
                for done in range(0, tensor.nbytes, _PIECE):
                    new.write(shard.read(min(_PIECE, tensor.nbytes - done)))
