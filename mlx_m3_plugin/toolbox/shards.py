"""Shards read and written by byte ranges, with one piece of a checkpoint in memory at a time.

``mx.load`` reads a stored tensor whole, also for one expert of 128.  A new shard begins with a header made
from names, shapes and dtypes; its tensors are then written in pieces, in any order.
"""

import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from ..weights.dtypes import STORED_NAMES, from_bytes, size_in_bytes, to_bytes
from ..weights.headers import StoredTensor
from ..weights.tensor import Tensor, make_from

# macOS refuses to read or write 2 GiB or more at once (EINVAL).  A piece is much smaller, because it is in
# memory twice while it is read.
LARGEST_PIECE = 1 << 26


def read_at(descriptor: int, start: int, size: int) -> bytearray:
    """``size`` bytes from ``start`` on.

    Raises:
        OSError: they cannot be read, or the file ends before.
    """
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        piece = os.pread(descriptor, min(LARGEST_PIECE, size - done), start + done)
        if not piece:
            raise OSError(f"the file ends {size - done:,} bytes before the tensor does")
        view[done : done + len(piece)] = piece
        done += len(piece)
    return data


def write_at(descriptor: int, start: int, data: bytes) -> None:
    """Put all of ``data`` at ``start``.

    Raises:
        OSError: it cannot be written.
    """
    view, done = memoryview(data), 0
    while done < len(data):
        done += os.pwrite(descriptor, view[done : done + LARGEST_PIECE], start + done)


# --- reading ---

# MLX has no arrays of them that all devices take.
_NOT_READ = ("F64", "C64")


class _Span(NamedTuple):
    """Consecutive elements of a stored tensor."""

    name: str
    first: int
    shape: tuple[int, ...]


class TensorReader(ExitStack):
    """Reads planned tensors of the checkpoint in ``directory``, whose headers are ``tensors``."""

    def __init__(self, directory: Path, tensors: Mapping[str, StoredTensor]):
        super().__init__()
        self._directory = directory
        self._tensors = tensors
        self._open: dict[str, int] = {}
        self.bytes_read = 0

    def read(self, tensor: Tensor) -> mx.array:
        """The array, in memory.

        Raises:
            OSError: a shard is gone, cut off or cannot be read; names it and the tensor.
        """
        span = _span(tensor)
        if span is not None:
            return self._read_span(span)
        array = make_from(tensor, [self.read(source) for source in tensor.sources])
        mx.eval(array)
        return array

    def _read_span(self, span: _Span) -> mx.array:
        stored = self._tensors[span.name]
        if stored.stored_dtype in _NOT_READ:
            raise ValueError(f"{span.name}: cannot read tensors of dtype {stored.stored_dtype}")
        start = stored.start + span.first * stored.dtype.size
        size = size_in_bytes(span.shape, stored.dtype)
        try:
            data = read_at(self._descriptor(stored.file), start, size)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"{self._directory / stored.file}: cannot read {span.name}: {reason}") from error
        self.bytes_read += size
        return from_bytes(data, span.shape, stored.dtype)

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            self._open[file] = os.open(self._directory / file, os.O_RDONLY)
            self.callback(os.close, self._open[file])
        return self._open[file]


def _span(tensor: Tensor) -> _Span | None:
    """Where a tensor lies, if it is a consecutive part of a stored one."""
    if tensor.operation == "stored":
        return _Span(tensor.detail, 0, tensor.shape)
    if tensor.operation == "reshape":
        inner = _span(tensor.sources[0])
        return None if inner is None else _Span(inner.name, inner.first, tensor.shape)
    if tensor.operation == "slice":
        inner, (axis, start, _) = _span(tensor.sources[0]), tensor.detail
        if inner is None or math.prod(inner.shape[:axis]) != 1:
            return None
        return _Span(inner.name, inner.first + start * math.prod(inner.shape[axis + 1 :]), tensor.shape)
    return None


# --- writing ---


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return size_in_bytes(self.shape, self.dtype)


class ShardWriter(ExitStack):
    """Writes one file, under another name until :meth:`finish`.

    Args:
        path: the finished file.  metadata: of the safetensors header.
    """

    def __init__(self, path: Path, tensors: list[NewTensor], metadata: Mapping[str, str]):
        super().__init__()
        self._path = path
        self._unfinished = path.with_name(path.name + ".unfinished")
        header, self._places = _header(tensors, metadata)
        # A new file: a process that has one of that name open keeps writing to the old one.
        self._unfinished.unlink(missing_ok=True)
        self._file = self.enter_context(self._unfinished.open("xb", buffering=0))
        self._begin = len(header)
        self._missing = sum(tensor.nbytes for tensor in tensors)
        write_at(self._file.fileno(), 0, header)

    def write(self, name: str, row: int, piece: mx.array) -> None:
        """Write ``piece`` into the tensor ``name``, seen as rows as wide as the piece's, from ``row`` on."""
        tensor, offset = self._places[name]
        if piece.dtype != tensor.dtype:
            raise TypeError(f"{name}: got {piece.dtype} for a tensor of {tensor.dtype}")
        width = piece.shape[-1] if piece.shape else 1
        start = row * width * tensor.dtype.size
        if start + piece.nbytes > tensor.nbytes:
            raise ValueError(f"{name}: {piece.shape} from row {row} on does not fit into {tensor.shape}")
        write_at(self._file.fileno(), self._begin + offset + start, to_bytes(piece))
        self._missing -= piece.nbytes

    def finish(self) -> None:
        """Give the file its name, once all of it is on the disk.

        Raises:
            OSError: another process has put a file in its place.
            ValueError: not all tensors were written.
        """
        if self._missing:
            raise ValueError(f"{self._path}: {self._missing:,} bytes of its tensors were not written")
        os.fsync(self._file.fileno())
        if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._unfinished)):
            raise OSError(f"{self._unfinished}: another process is writing it, too")
        self._file.close()
        os.replace(self._unfinished, self._path)


def _header(
    tensors: list[NewTensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[NewTensor, int]]]:
    """The file's beginning, and where each tensor's data lies after it."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    places: dict[str, tuple[NewTensor, int]] = {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        kind = STORED_NAMES[tensor.dtype]
        entries[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        places[tensor.name] = (tensor, offset)
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places
