"""Planned tensors read by byte ranges.

``mx.load`` reads a stored tensor whole, also for one expert of 128.
"""

import math
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from .dtypes import from_bytes, size_in_bytes
from .headers import StoredTensor
from .tensor import Tensor, make_from

# macOS refuses to read or write 2 GiB or more at once (EINVAL).
LARGEST_PIECE = 1 << 26


class Span(NamedTuple):
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
        if (span := span_of(tensor)) is not None:
            data = bytearray(size_in_bytes(span.shape, tensor.dtype))
            self.read_into(memoryview(data), span)
            return from_bytes(data, span.shape, tensor.dtype)
        array = make_from(tensor, [self.read(source) for source in tensor.sources])
        mx.eval(array)
        return array

    def read_into(self, memory: memoryview, span: Span) -> None:
        """Fill ``memory`` with the stored bytes.  Other threads may do so at the same time.

        Raises:
            OSError: see :meth:`read`.
        """
        stored = self._tensors[span.name]
        start = stored.start + span.first * stored.dtype.size
        try:
            _read_into(memory, self._descriptor(stored.file), start)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"{self._directory / stored.file}: cannot read {span.name}: {reason}") from error
        self.bytes_read += len(memory)

    def open_uncached(self, names: Iterable[str]) -> None:
        """Open the files of these stored tensors now, on macOS to be read around the page cache.

        An open file stays what it is when another one takes its name.
        """
        for file in {self._tensors[name].file for name in names}:
            descriptor = self._descriptor(file)
            if sys.platform == "darwin":
                import fcntl

                fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            self._open[file] = os.open(self._directory / file, os.O_RDONLY)
            self.callback(os.close, self._open[file])
        return self._open[file]


def _read_into(memory: memoryview, descriptor: int, start: int) -> None:
    """Fill ``memory`` with the bytes from ``start`` on.

    Raises:
        OSError: they cannot be read, or the file ends before.
    """
    done = 0
    while done < len(memory):
        piece = memory[done : done + LARGEST_PIECE]
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [piece], start + done)
        else:
            # Some builds of Python for macOS have none.
            data = os.pread(descriptor, len(piece), start + done)
            count = len(data)
            piece[:count] = data
        if not count:
            raise OSError(f"the file ends {len(memory) - done:,} bytes before the tensor does")
        done += count


def span_of(tensor: Tensor) -> Span | None:
    """Where a tensor lies, if it is a consecutive part of a stored one."""
    if tensor.operation == "stored":
        return Span(tensor.detail, 0, tensor.shape)
    if tensor.operation == "reshape":
        inner = span_of(tensor.sources[0])
        return None if inner is None else Span(inner.name, inner.first, tensor.shape)
    if tensor.operation == "slice":
        inner, (axis, start, _) = span_of(tensor.sources[0]), tensor.detail
        if inner is None or math.prod(inner.shape[:axis]) != 1:
            return None
        return Span(inner.name, inner.first + start * math.prod(inner.shape[axis + 1 :]), tensor.shape)
    return None


def spans_of(tensor: Tensor) -> list[Span] | None:
    """The stored elements whose bytes, one after the other, are the tensor's; None if it is computed."""
    if (span := span_of(tensor)) is not None:
        return [span]
    sources = [spans_of(source) for source in tensor.sources]
    joined = tensor.operation in ("view", "reshape", "stack") or (
        tensor.operation == "concatenate" and math.prod(tensor.shape[: tensor.detail]) == 1
    )
    if not joined or any(spans is None for spans in sources):
        return None
    return [span for spans in sources if spans is not None for span in spans]
