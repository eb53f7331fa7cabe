"""A tensor that is planned, not loaded: stored under a name, or made from others."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx


class HasShape(Protocol):
    """What a plan is made from: an array, or a header's entry."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> mx.Dtype: ...


@dataclass(frozen=True)
class Tensor:
    """One node of a plan.

    Attributes:
        operation: ``stored``, ``view``, ``slice``, ``reshape``, ``stack``, ``concatenate``,
            ``multiply``, ``divide`` or ``zero points``.
        sources: the planned tensors it is made from.
        detail: what else the operation needs: the stored name, ``(axis, start, stop)``, the axis
            to concatenate, the shape, the factor, the number that is divided, or bits.
        shape, dtype: those of the array.
    """

    operation: str
    sources: tuple["Tensor", ...]
    detail: Any
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @staticmethod
    def stored(name: str, array: HasShape) -> "Tensor":
        return Tensor("stored", (), name, tuple(array.shape), array.dtype)

    def view_as_uint32(self) -> "Tensor":
        """The same bytes as little-endian uint32, as MLX packs quantized values."""
        per_word = 1 if self.dtype == mx.int32 else 4
        shape = (*self.shape[:-1], self.shape[-1] // per_word)
        return Tensor("view", (self,), None, shape, mx.uint32)

    def slice(self, start: int, stop: int, axis: int = 0) -> "Tensor":
        axis %= len(self.shape)
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return Tensor("slice", (self,), (axis, start, stop), shape, self.dtype)

    def reshape(self, *shape: int) -> "Tensor":
        assert math.prod(shape) == math.prod(self.shape)
        return Tensor("reshape", (self,), shape, shape, self.dtype)

    def apply(self, operation: str, detail: float, *others: "Tensor") -> "Tensor":
        """One of the operations that keep shape and dtype: ``multiply``, ``divide`` or ``zero points``."""
        return Tensor(operation, (self, *others), detail, self.shape, self.dtype)

    @staticmethod
    def stack(tensors: Sequence["Tensor"]) -> "Tensor":
        first = tensors[0]
        return Tensor("stack", tuple(tensors), None, (len(tensors), *first.shape), first.dtype)

    @staticmethod
    def concatenate(tensors: Sequence["Tensor"], axis: int = 0) -> "Tensor":
        first = tensors[0]
        axis %= len(first.shape)
        length = sum(tensor.shape[axis] for tensor in tensors)
        shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
        return Tensor("concatenate", tuple(tensors), axis, shape, first.dtype)

    def taken(self, start: int, stop: int, axis: int = 0) -> "Tensor":
        """A slice that reads as little as possible: of a stack, for example, only the tensors in the slice.

        ``axis`` is not the last one: values are packed along that.
        """
        axis %= len(self.shape)
        assert axis < len(self.shape) - 1 or len(self.shape) == 1
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        if (start, stop) == (0, self.shape[axis]):
            return self
        if self.operation in ("view", "multiply", "divide"):
            sources = (self.sources[0].taken(start, stop, axis),)
            return Tensor(self.operation, sources, self.detail, shape, self.dtype)
        if self.operation == "stack":
            if axis == 0:
                return Tensor.stack(self.sources[start:stop])
            return Tensor.stack([source.taken(start, stop, axis - 1) for source in self.sources])
        if self.operation == "concatenate" and axis != self.detail:
            return Tensor.concatenate([s.taken(start, stop, axis) for s in self.sources], self.detail)
        if self.operation == "concatenate":
            return self._taken_of_joined(start, stop, axis)
        if self.operation == "slice":
            return self._taken_of_slice(start, stop, axis)
        if self.operation == "reshape" and self.sources[0].shape == (1, *self.shape):
            return self.sources[0].taken(start, stop, axis + 1).reshape(*shape)
        return self.slice(start, stop, axis)

    def expert(self, number: int) -> "Tensor":
        """One entry of the first axis, without that axis."""
        one = self.taken(number, number + 1)
        return one.sources[0] if one.operation == "stack" else one.reshape(*self.shape[1:])

    def _taken_of_slice(self, start: int, stop: int, axis: int) -> "Tensor":
        """Cut the first axis first, so that what is left is contiguous in a stored tensor."""
        source, (of, begin, end) = self.sources[0], self.detail
        if axis == of:
            return source.taken(begin + start, begin + stop, of)
        (low, a, b), (high, c, d) = sorted([(of, begin, end), (axis, start, stop)])
        cut = source.taken(a, b, low)
        return cut.slice(c, d, high) if cut.operation == "slice" else cut.taken(c, d, high)

    def _taken_of_joined(self, start: int, stop: int, axis: int) -> "Tensor":
        parts, begin = [], 0
        for source in self.sources:
            end = begin + source.shape[axis]
            first, last = max(start, begin), min(stop, end)
            if first < last:
                parts.append(source.taken(first - begin, last - begin, axis))
            begin = end
        return parts[0] if len(parts) == 1 else Tensor.concatenate(parts, axis)

    def make(self, weights: Mapping[str, mx.array]) -> mx.array:
        """The lazy array, from the stored ones."""
        if self.operation == "stored":
            return weights[self.detail]
        return make_from(self, [source.make(weights) for source in self.sources])

    def stored_names(self) -> Iterator[str]:
        """The names of the stored tensors it is made from."""
        if self.operation == "stored":
            yield self.detail
        for source in self.sources:
            yield from source.stored_names()

    def __str__(self) -> str:
        if self.operation == "stored":
            return str(self.detail)
        detail = "" if self.detail is None else f", {self.detail}"
        return f"{self.operation}({', '.join(map(str, self.sources))}{detail})"


# What makes a model's parameters from stored tensors, by the names of parameters.
TensorPlan = dict[str, Tensor]


def make_from(tensor: Tensor, made: list[mx.array]) -> mx.array:
    """The array of a tensor that is not stored, from those of its sources."""
    return _MAKE[tensor.operation](made, tensor.detail)


def _slice(array: mx.array, axis: int, start: int, stop: int) -> mx.array:
    # Contiguous, or the slice would keep the whole source alive.
    return mx.contiguous(array[(slice(None),) * axis + (slice(start, stop),)])


def _minus_zero_points(scales: mx.array, packed: mx.array, bits: int) -> mx.array:
    """``-zero_point * scale`` for scales ``[out, groups]``, with zero points packed along ``out``,
    ``32 / bits`` of them in a word."""
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)[:, None]
    points = (packed.view(mx.uint32)[:, None, :] >> shifts) & (2**bits - 1)
    return -points.reshape(scales.shape).astype(scales.dtype) * scales


_MAKE = {
    "view": lambda made, _: made[0].view(mx.uint32),
    "slice": lambda made, detail: _slice(made[0], *detail),
    "reshape": lambda made, shape: made[0].reshape(shape),
    "multiply": lambda made, factor: made[0] * factor,
    "divide": lambda made, number: number / made[0],
    "zero points": lambda made, bits: _minus_zero_points(made[0], made[1], bits),
    "stack": lambda made, _: mx.stack(made),
    "concatenate": lambda made, axis: mx.concatenate(made, axis=axis),
}
