"""A checkpoint's directory: whether it is M3's, its safetensors headers, what is wrong with its files.

Only headers are read, so a checkpoint of any size takes a moment.  MLX itself opens a file
whose end is missing, and keeps one of two tensors of the same name; here both are problems.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import mlx.core as mx

from .check import shorten
from .dtypes import EXPONENTS, MLX_DTYPES, mlx_reads, size_in_bytes

TEXT_ONLY = "minimax_m3"
MODEL_TYPES = ("minimax_m3_vl", TEXT_ONLY)
# What the config of M3.1's draft head says, which is a checkpoint in a folder of its own.
DRAFT_HEAD = "DSparkMiniMaxDraftModel"
DRAFT_FOLDER = "dspark"
INDEX = "model.safetensors.index.json"

# The safetensors format's own limit.
_LARGEST_HEADER = 100_000_000
_LFS_POINTER = b"version https://git-lfs"


def is_m3(directory: object) -> bool:
    """Whether ``config.json`` in ``directory`` is MiniMax-M3's; False where it cannot be read."""
    return model_type_of(directory) in MODEL_TYPES


def model_type_of(directory: object) -> str | None:
    """The ``model_type`` of ``config.json`` in ``directory``; None where there is none to read."""
    model_type = config_of(directory).get("model_type")
    return model_type if isinstance(model_type, str) else None


def is_draft_head(directory: object) -> bool:
    """Whether ``config.json`` in ``directory`` is a DSpark draft head's; False where it cannot be read."""
    return is_draft_config(config_of(directory))


def is_draft_config(config: object) -> bool:
    architectures = config.get("architectures") if isinstance(config, Mapping) else None
    return isinstance(architectures, list) and DRAFT_HEAD in architectures


def config_of(directory: object) -> dict[str, Any]:
    """``config.json`` in ``directory``; empty where it cannot be read."""
    if not isinstance(directory, (str, PathLike)):
        return {}
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, TypeError):
        return {}
    return config if isinstance(config, dict) else {}


def check_files(directory: str | Path) -> None:
    """Read every shard's header before anything is loaded.

    Raises:
        ValueError: shards are absent, cut off or damaged, or a tensor is in two of them.
    """
    if not weight_files(Path(directory)):
        # The loader has an error of its own for that.
        return
    if problems := read_headers(directory).problems:
        head = f"{directory} is not a complete checkpoint (mlx-m3-plugin):"
        raise ValueError("\n  ".join([head, *shorten(problems)]))


def check_dtypes(directory: str | Path) -> None:
    """For a library that gives all shards to MLX.

    Raises:
        ValueError: the installed MLX does not read a dtype that newer ones read.
    """
    if mlx_reads(EXPONENTS) or not weight_files(Path(directory)):
        return
    if unread := dtypes_not_read(read_headers(directory)):
        raise ValueError(f"{directory}: {unread} (mlx-m3-plugin)")


def dtypes_not_read(headers: "Headers") -> str | None:
    """What the installed MLX does not read of these, though newer ones do."""
    name = next((n for n, t in headers.tensors.items() if t.stored_dtype == EXPONENTS), None)
    if name is None or mlx_reads(EXPONENTS):
        return None
    return f"{name} is {EXPONENTS}, which this version of MLX does not read: upgrade mlx to 0.32 or newer"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header describes it.

    Attributes:
        shape: as stored.  stored_dtype: safetensors' name, such as ``BF16``.
        nbytes: bytes of data.  file: the name of its file.
        start: where in the file its data begins.
    """

    shape: tuple[int, ...]
    stored_dtype: str
    nbytes: int
    file: str
    start: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    @property
    def dtype(self) -> mx.Dtype:
        """The one of the array that ``mx.load`` makes of it."""
        return MLX_DTYPES[self.stored_dtype]


@dataclass
class Headers:
    """All tensors of a checkpoint, and what is wrong with its files, one line each.

    Attributes:
        files: their names, from the checkpoint's directory.
        unlisted: those that the index does not list; none without an index.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def add(self, file: str, tensors: dict[str, StoredTensor]) -> None:
        self.files.append(file)
        twice: dict[str, list[str]] = {}
        for name in tensors:
            if name in self.tensors:
                twice.setdefault(self.tensors[name].file, []).append(name)
        self.tensors |= tensors
        for other, names in twice.items():
            what = f"{names[0]} is" if len(names) == 1 else f"{len(names)} tensors ({names[0]} is one) are"
            old = [f for f in (other, file) if f in self.unlisted]
            hint = f"; {INDEX} does not list {old[0]}: remove it if it is an old shard" if old else ""
            self.problems.append(f"{what} in two files: {other} and {file}{hint}")


def read_headers(directory: str | Path) -> Headers:
    """Read the headers of all shards in ``directory``, and compare them with the index.

    Problems are collected, not raised: a truncated shard should not hide a missing one.

    Raises:
        FileNotFoundError: there is no safetensors file in ``directory``.
    """
    directory = Path(directory)
    files, weight_map = weight_files(directory), weight_map_of(directory)
    if not files and not (directory / INDEX).exists():
        raise FileNotFoundError(f"{directory} has no .safetensors file")
    listed = set(weight_map.values())
    names = {file: file.relative_to(directory).as_posix() for file in files}
    headers = Headers(unlisted=[name for name in names.values() if listed and name not in listed])
    for file, name in names.items():
        try:
            headers.add(name, read_header(file, name))
        except (ValueError, OSError) as error:
            headers.files.append(name)
            headers.problems.append(f"{name}: {error}")
    headers.problems += _index_problems(weight_map, headers)
    return headers


def weight_files(directory: Path) -> list[Path]:
    """The shards of a checkpoint: those named in its index, and others named like them.

    The index may name files in folders of the directory; it is not followed out of it.
    """
    listed = {directory / name for name in set(weight_map_of(directory).values()) if _is_inside(name)}
    found = set(directory.glob("model*.safetensors"))
    if not listed and not found:
        found = set(directory.glob("*.safetensors")) - {directory / "consolidated.safetensors"}
    return sorted(file for file in listed | found if file.exists())


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and not PureWindowsPath(name).drive


def read_header(file: Path, name_of_file: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of one file, which they say is called ``name_of_file``.

    Raises:
        ValueError: the file is not a complete safetensors file; says what is wrong.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise ValueError(
                "a Git LFS pointer in place of the file: fetch it with `git lfs pull` or `hf download`"
            )
        length = int.from_bytes(start[:8], "little")
        stream.seek(8)
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"incomplete safetensors file (a header of {length} bytes); download it again")
        text = stream.read(length)
    entries = _parse(text)
    entries.pop("__metadata__", None)
    tensors = {
        name: stored_tensor(name, entry, name_of_file or file.name, 8 + length)
        for name, entry in entries.items()
    }
    if cut := [name for name, tensor in tensors.items() if tensor.end > size]:
        missing = max(tensors[name].end for name in cut) - size
        raise ValueError(
            f"truncated: {missing:,} bytes are missing, of {len(cut)} tensors ({cut[0]} is one); "
            "download it again"
        )
    spans = sorted((tensor.start, tensor.end, name) for name, tensor in tensors.items())
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end:
            raise ValueError(f"{first} and {second} overlap")
    return tensors


def _parse(text: bytes) -> dict[str, Any]:
    def refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is twice in the header")
        return entries

    try:
        entries = json.loads(text, object_pairs_hook=refuse_doubles)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from None
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    return entries


def stored_tensor(name: str, entry: Any, file: str, data_begins: int = 0) -> StoredTensor:
    """What a header's ``entry`` describes.

    ``data_begins``: where in the file; 0 where nothing is going to be read.

    Raises:
        ValueError: it describes no tensor that MLX reads.
    """
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        well_formed = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise ValueError(f"{name}: its entry in the header is malformed")
    if dtype not in MLX_DTYPES:
        raise ValueError(f"{name}: MLX does not read tensors of dtype {dtype}")
    if end - start != size_in_bytes(shape, MLX_DTYPES[dtype]):
        raise ValueError(f"{name}: {end - start} bytes do not make a {dtype} tensor of shape {shape}")
    return StoredTensor(shape, dtype, end - start, file, data_begins + start)


def _index_problems(weight_map: dict[str, str], headers: Headers) -> Iterator[str]:
    present = set(headers.files)
    absent: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if file not in present:
            absent.setdefault(file, []).append(name)
    for file, names in sorted(absent.items()):
        if _is_inside(file):
            yield f"{file} is listed in {INDEX} and absent; it holds {len(names)} tensors ({names[0]} is one)"
        else:
            yield f"{file} is listed in {INDEX} and is not in the checkpoint's directory"
    unreadable = {problem.partition(":")[0] for problem in headers.problems}
    for name, file in weight_map.items():
        if file in present and file not in unreadable and name not in headers.tensors:
            yield f"{name} is listed in {INDEX} and not in {file}"


def weight_map_of(directory: Path) -> dict[str, str]:
    """Tensor -> file, as the index says; empty without one.

    Raises:
        ValueError: the index is damaged.
    """
    try:
        weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{directory / INDEX} is not an index of safetensors files") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{directory / INDEX}: its weight_map is not a map of names to files")
    return weight_map
