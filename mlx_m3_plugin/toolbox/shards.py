"""Shards written by byte ranges, with one piece of a checkpoint in memory at a time.

A new shard begins with a header made from names, shapes and dtypes; its tensors are then written in
pieces, in any order.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..weights.byte_ranges import LARGEST_PIECE
from ..weights.dtypes import STORED_NAMES, size_in_bytes, to_bytes


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
        path: the finished file.
    """

    def __init__(self, path: Path, tensors: list[NewTensor]):
        super().__init__()
        self._path = path
        self._unfinished = path.with_name(path.name + ".unfinished")
        entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        self._places: dict[str, tuple[NewTensor, int]] = {}
        end = 0
        for tensor in tensors:
            begin, end = end, end + tensor.nbytes
            kind, shape = STORED_NAMES[tensor.dtype], list(tensor.shape)
            entries[tensor.name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
            self._places[tensor.name] = tensor, begin
        header = header_of(entries, (",", ":"))
        self._begin, self._missing = len(header), end
        # A new file: a process that has one of that name open keeps writing to the old one.
        self._unfinished.unlink(missing_ok=True)
        self._file = self.enter_context(self._unfinished.open("xb", buffering=0))
        self._write(0, header)

    def write(self, name: str, row: int, piece: mx.array) -> None:
        """Write ``piece`` into the tensor ``name``, seen as rows as wide as the piece's, from ``row`` on."""
        tensor, offset = self._places[name]
        if piece.dtype != tensor.dtype:
            raise TypeError(f"{name}: got {piece.dtype} for a tensor of {tensor.dtype}")
        width = piece.shape[-1] if piece.shape else 1
        start = row * width * tensor.dtype.size
        if start + piece.nbytes > tensor.nbytes:
            raise ValueError(f"{name}: {piece.shape} from row {row} on does not fit into {tensor.shape}")
        self._write(self._begin + offset + start, to_bytes(piece))
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

    def _write(self, start: int, data: bytes) -> None:
        view, done = memoryview(data), 0
        while done < len(data):
            piece = view[done : done + LARGEST_PIECE]
            done += os.pwrite(self._file.fileno(), piece, start + done)


def header_of(entries: Mapping[str, object], separators: tuple[str, str]) -> bytes:
    """The beginning of a safetensors file; ``separators`` of its JSON."""
    text = json.dumps(entries, separators=separators).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
