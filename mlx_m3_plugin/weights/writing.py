"""A safetensors file whose tensors come in pieces, in any order.

The header is written first, from names, shapes and dtypes alone, so nothing larger than a piece is
ever in memory.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import mlx.core as mx
import numpy as np

from .disk import write_at

# MLX's dtype -> safetensors' name of it, and the bytes of one element.
STORED_DTYPES = {
    "mlx.core.bool": ("BOOL", 1),
    "mlx.core.uint8": ("U8", 1),
    "mlx.core.int8": ("I8", 1),
    "mlx.core.uint16": ("U16", 2),
    "mlx.core.int16": ("I16", 2),
    "mlx.core.uint32": ("U32", 4),
    "mlx.core.int32": ("I32", 4),
    "mlx.core.uint64": ("U64", 8),
    "mlx.core.int64": ("I64", 8),
    "mlx.core.float16": ("F16", 2),
    "mlx.core.bfloat16": ("BF16", 2),
    "mlx.core.float32": ("F32", 4),
}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; ``dtype`` is ``str`` of MLX's."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORED_DTYPES[self.dtype][1]


class ShardWriter:
    """Writes one file, under another name until :meth:`finish`.

    Args:
        path: the finished file.  metadata: of the safetensors header.
    """

    def __init__(self, path: Path, tensors: list[NewTensor], metadata: Mapping[str, str]):
        self._path = path
        self._unfinished = path.with_name(path.name + ".unfinished")
        header, self._places = _header(tensors, metadata)
        # A new file: whoever has one of that name open already keeps writing to that one alone.
        self._unfinished.unlink(missing_ok=True)
        self._file = self._unfinished.open("xb", buffering=0)
        self._begin = len(header)
        self._missing = sum(tensor.nbytes for tensor in tensors)
        write_at(self._file.fileno(), 0, header)

    def write(self, name: str, row: int, piece: mx.array) -> None:
        """Put ``piece``, some rows of the tensor ``name`` seen as ``[rows, last axis]``, in its place.

        ``row`` is the first one.
        """
        tensor, offset = self._places[name]
        if str(piece.dtype) != tensor.dtype:
            raise TypeError(f"{name}: {piece.dtype} where {tensor.dtype} is to be written")
        width = tensor.shape[-1] if tensor.shape else 1
        itemsize = STORED_DTYPES[tensor.dtype][1]
        start = row * width * itemsize
        if start + piece.nbytes > tensor.nbytes:
            raise ValueError(f"{name}: {piece.shape} from row {row} on is more than {tensor.shape}")
        write_at(self._file.fileno(), self._begin + offset + start, _bytes_of(piece))
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
            raise OSError(f"{self._unfinished}: another process writes it, too")
        self._file.close()
        os.replace(self._unfinished, self._path)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _header(
    tensors: list[NewTensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[NewTensor, int]]]:
    """The file's beginning, and where each tensor's data lies after it."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    places: dict[str, tuple[NewTensor, int]] = {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        kind = STORED_DTYPES[tensor.dtype][0]
        entries[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        places[tensor.name] = (tensor, offset)
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _bytes_of(array: mx.array) -> bytes:
    # numpy has no bfloat16.
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(raw, copy=False)).tobytes()
