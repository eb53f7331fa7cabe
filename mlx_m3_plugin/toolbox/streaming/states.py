"""Hidden states of many tokens, on disk: a layer reads them, and writes the next ones."""

import os
from pathlib import Path

import mlx.core as mx

from ...weights.dtypes import from_bytes, to_bytes
from ..shards import read_at, write_at


class States:
    """A file of rows ``[N, D]``.

    Args:
        dtype: ``float32``, ``float16`` or ``bfloat16``.
    """

    def __init__(self, path: Path, width: int, dtype: str):
        self._path, self._width = path, width
        self._dtype: mx.Dtype = getattr(mx, dtype)

    def write(self, first: int, rows: mx.array) -> None:
        data = to_bytes(rows.astype(self._dtype))
        mode = "r+b" if self._path.exists() else "wb"
        with self._path.open(mode) as file:
            write_at(file.fileno(), first * self._width * self._dtype.size, data)

    def read(self, first: int, last: int) -> mx.array:
        """Rows ``[last - first, D]``."""
        size = self._width * self._dtype.size
        with self._path.open("rb") as file:
            data = read_at(file.fileno(), first * size, (last - first) * size)
        return from_bytes(data, (last - first, self._width), self._dtype)

    def sync(self) -> None:
        with self._path.open("r+b") as file:
            os.fsync(file.fileno())

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
