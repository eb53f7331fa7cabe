"""Keys or values as an array, or as MLX quantizes them."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import mlx.core as mx


class Quantized(NamedTuple):
    """What ``mx.quantize`` (affine) makes of ``[B, G, S, D]``.

    Attributes:
        weight: ``[B, G, S, D * bits / 32]`` uint32.
        scales: ``[B, G, S, D / group_size]``; ``biases``: likewise.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what was quantized."""
        return (*self.weight.shape[:-1], self.weight.shape[-1] * 32 // self.bits)

    def map(self, function: Callable[[mx.array], mx.array]) -> "Quantized":
        weight, scales, biases = (function(a) for a in (self.weight, self.scales, self.biases))
        return Quantized(weight, scales, biases, self.group_size, self.bits)

    def dequantize(self) -> mx.array:
        return mx.dequantize(
            self.weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits
        )


KeysValues: TypeAlias = mx.array | Quantized
