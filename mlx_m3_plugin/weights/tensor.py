"""A tensor that is planned, not loaded: stored under a name, or made from others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Tensor:
    """One node of a plan.

    Attributes:
        operation: ``stored``, ``view``, ``rows``, ``squeeze`` or ``stack``.
        sources: the planned tensors it is made from.
        detail: the stored name, the viewed dtype, or the rows as ``(axis, start, stop)``.
        shape: its shape; ``dtype``: its dtype, as ``str(mx.dtype)``.
    """

    operation: str
    sources: tuple["Tensor", ...]
    detail: object
    shape: tuple[int, ...]
    dtype: str

    @staticmethod
    def stored(name: str, array: mx.array) -> "Tensor":
        return Tensor("stored", (), name, tuple(array.shape), str(array.dtype))

    def view_as_uint32(self) -> "Tensor":
        """The same bytes as little-endian uint32: how MLX packs quantized values."""
        shape = (*self.shape[:-1], self.shape[-1] // 4)
        return Tensor("view", (self,), "uint32", shape, str(mx.uint32))

    def rows(self, start: int, stop: int, axis: int = 0) -> "Tensor":
        axis %= len(self.shape)
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return Tensor("rows", (self,), (axis, start, stop), shape, self.dtype)

    def without_first_axis(self) -> "Tensor":
        """``[1, ...]`` -> ``[...]``."""
        return Tensor("squeeze", (self,), None, self.shape[1:], self.dtype)

    @staticmethod
    def stack(tensors: Sequence["Tensor"]) -> "Tensor":
        first = tensors[0]
        return Tensor("stack", tuple(tensors), None, (len(tensors), *first.shape), first.dtype)

    def make(self, weights: Mapping[str, mx.array]) -> mx.array:
        """The lazy array, from the stored ones."""
        if self.operation == "stored":
            return weights[str(self.detail)]
        made = [source.make(weights) for source in self.sources]
        if self.operation == "stack":
            return mx.stack(made)
        if self.operation == "view":
            return made[0].view(mx.uint32)
        if self.operation == "squeeze":
            return made[0].squeeze(0)
        assert isinstance(self.detail, tuple)
        axis, start, stop = self.detail
        # Contiguous, or the slice would keep the whole source alive.
        return mx.contiguous(made[0][(slice(None),) * axis + (slice(start, stop),)])

    def __str__(self) -> str:
        if self.operation == "stored":
            return str(self.detail)
        detail = "" if self.detail is None else f", {self.detail}"
        return f"{self.operation}({', '.join(map(str, self.sources))}{detail})"
