"""Hidden states of many tokens, on disk: a layer reads them, and writes the next ones."""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..shards import read_at, write_at

_NUMPY = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


class States:
    """A file of rows ``[N, D]``.

    Args:
        dtype: ``float32``, ``float16`` or ``bfloat16``.
    """

    def __init__(self, path: Path, width: int, dtype: str):
        self._path, self._width, self._dtype = path, width, dtype
        self._kind = np.dtype(_NUMPY[dtype])

    def write(self, first: int, rows: mx.array) -> None:
        raw = rows.view(mx.uint16) if self._dtype == "bfloat16" else rows
        data = np.ascontiguousarray(np.array(raw, copy=False), self._kind).tobytes()
        mode = "r+b" if self._path.exists() else "wb"
        with self._path.open(mode) as file:
            write_at(file.fileno(), first * self._width * self._kind.itemsize, data)

    def read(self, first: int, last: int) -> mx.array:
        """Rows ``[last - first, D]``."""
        size = self._width * self._kind.itemsize
        with self._path.open("rb") as file:
            data = read_at(file.fileno(), first * size, (last - first) * size)
        array = mx.array(np.frombuffer(data, self._kind).reshape(last - first, self._width))
        return array.view(mx.bfloat16) if self._dtype == "bfloat16" else array

    def sync(self) -> None:
        with self._path.open("r+b") as file:
            os.fsync(file.fileno())

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
