"""Matrices from files, as modules that multiply by them just as a loaded model does."""

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn

from ...weights.reading import TensorReader
from ...weights.tensor import Tensor
from ..precision import How, converted, tensor_scale

# Given a module's path and how it is stored: how it is to be, for a trial of other bits.
Change = Callable[[str, How], How]


def keep(path: str, how: How) -> How:
    return how


def parts_of(plan: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The planned tensors of a module: ``weight``, and what belongs to a quantized one."""
    names = ("weight", "scales", "biases", "global_scale")
    return {part: plan[f"{path}.{part}"] for part in names if f"{path}.{part}" in plan}


def read_linear(
    reader: TensorReader, parts: Mapping[str, Tensor], stored: How, path: str, change: Change = keep
) -> nn.Module:
    """``nn.Linear`` or ``nn.QuantizedLinear`` with the weights of one matrix, in memory."""
    arrays = {part: reader.read(tensor) for part, tensor in parts.items()}
    how = change(path, stored)
    if how != stored:
        arrays, stored = converted(arrays, stored, how), how
    if stored.bits is None:
        return _linear(arrays["weight"])
    linear = _quantized_linear(arrays, stored)
    return _Scaled(linear, arrays["global_scale"]) if "global_scale" in arrays else linear


class _Scaled(nn.Module):
    """NVFP4 with a tensor scale, which multiplies what comes out, as in a loaded model."""

    def __init__(self, linear: nn.Module, global_scale: mx.array):
        super().__init__()
        self.linear = linear
        self.scale = tensor_scale(global_scale)

    def __call__(self, x: mx.array) -> mx.array:
        return (self.linear(x) * self.scale).astype(x.dtype)


def _linear(weight: mx.array) -> nn.Module:
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = weight
    mx.eval(weight)
    return linear


def _quantized_linear(arrays: Mapping[str, mx.array], how: How) -> nn.Module:
    # Of any size: its arrays are replaced before they are made.
    linear = nn.QuantizedLinear(
        128, 128, bias=False, group_size=how.group_size, bits=how.bits or 0, mode=how.mode
    )
    for part in ("weight", "scales", "biases"):
        setattr(linear, part, arrays.get(part))
    mx.eval(arrays)
    return linear
