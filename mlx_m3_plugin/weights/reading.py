"""Planned tensors read from their files by the byte: no more of a shard than a plan needs.

``mx.load`` reads a stored tensor whole, of which one expert of 128 may be wanted.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import mlx.core as mx
import numpy as np

from .disk import read_at
from .headers import StoredTensor
from .tensor import Tensor, make_from

# safetensors dtype -> how numpy reads it, and what MLX is to take the bytes for.
_READ_AS: dict[str, tuple[str, mx.Dtype]] = {
    "BOOL": ("?", mx.bool_),
    "U8": ("<u1", mx.uint8),
    "I8": ("<i1", mx.int8),
    "U16": ("<u2", mx.uint16),
    "I16": ("<i2", mx.int16),
    "U32": ("<u4", mx.uint32),
    "I32": ("<i4", mx.int32),
    "U64": ("<u8", mx.uint64),
    "I64": ("<i8", mx.int64),
    "F8_E4M3": ("<u1", mx.uint8),
    "F16": ("<f2", mx.float16),
    "BF16": ("<u2", mx.bfloat16),
    "F32": ("<f4", mx.float32),
}


@dataclass(frozen=True)
class _Span:
    """Consecutive elements of a stored tensor."""

    name: str
    first: int
    shape: tuple[int, ...]


class TensorReader:
    """Reads planned tensors of one checkpoint.

    Args:
        directory: where the shards are.
        tensors: their headers, as :func:`.headers.read_headers` has them.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, StoredTensor]):
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

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_span(self, span: _Span) -> mx.array:
        stored = self._tensors[span.name]
        read_as, dtype = _READ_AS.get(stored.stored_dtype, (None, None))
        if read_as is None or dtype is None:
            raise ValueError(f"{span.name}: tensors of dtype {stored.stored_dtype} are not read here")
        kind = np.dtype(read_as)
        size = math.prod(span.shape) * kind.itemsize
        data = self._read_bytes(span.name, stored, stored.start + span.first * kind.itemsize, size)
        array = mx.array(np.frombuffer(data, kind).reshape(span.shape))
        return array if array.dtype == dtype else array.view(dtype)

    def _read_bytes(self, name: str, stored: StoredTensor, start: int, size: int) -> bytearray:
        try:
            data = read_at(self._descriptor(stored.file), start, size)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"{self._directory / stored.file}: cannot read {name}: {reason}") from error
        self.bytes_read += size
        return data

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            self._open[file] = os.open(self._directory / file, os.O_RDONLY)
        return self._open[file]


def _span(tensor: Tensor) -> _Span | None:
    """Where a tensor lies, if it is a piece of a stored one."""
    if tensor.operation == "stored":
        return _Span(tensor.detail, 0, tensor.shape)
    if tensor.operation == "reshape":
        inner = _span(tensor.sources[0])
        return None if inner is None else _Span(inner.name, inner.first, tensor.shape)
    if tensor.operation == "rows":
        inner, (axis, start, _) = _span(tensor.sources[0]), tensor.detail
        if inner is None or math.prod(inner.shape[:axis]) != 1:
            return None
        return _Span(inner.name, inner.first + start * math.prod(inner.shape[axis + 1 :]), tensor.shape)
    return None
