"""Matrices from files, as modules that multiply by them just as a loaded model does."""

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...model.tensor_scales import hold_scale
from ...weights.quantization import PARTS
from ...weights.tensor import Tensor
from ..precision import Quantization, computes_in_float32, converted, float32_values
from ..shards import TensorReader

# Of a matrix's values in float32 at a time.
_BYTES_OF_VALUES = 256 << 20
# Given a module's path and how it is stored: how it is to be, for a trial of other bits.
Change = Callable[[str, Quantization], Quantization]


def keep(path: str, spec: Quantization) -> Quantization:
    return spec


def parts_of(plan: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The planned tensors of a module: ``weight``, and what belongs to a quantized one."""
    return {part: plan[f"{path}.{part}"] for part in PARTS if f"{path}.{part}" in plan}


def read_linear(
    reader: TensorReader, parts: Mapping[str, Tensor], stored: Quantization, path: str, change: Change = keep
) -> nn.Module:
    """``nn.Linear`` or ``nn.QuantizedLinear`` with the weights of one matrix, in memory."""
    arrays = {part: reader.read(tensor) for part, tensor in parts.items()}
    spec = change(path, stored)
    if spec != stored:
        arrays, stored = converted(arrays, stored, spec), spec
    if computes_in_float32():
        return _InFloat32(arrays, stored)
    if stored.bits is None:
        return _linear(arrays["weight"])
    linear = _quantized_linear(arrays, stored)
    return hold_scale(linear, arrays["global_scale"]) if "global_scale" in arrays else linear


class _InFloat32(nn.Module):
    """On the CPU: multiplies by the values of a matrix in float32, some rows at a time.

    With numpy, whose BLAS is ten times and more as fast as the one in MLX's wheels.
    """

    def __init__(self, stored: Mapping[str, mx.array], spec: Quantization):
        super().__init__()
        self._stored, self._spec = stored, spec
        mx.eval(stored)

    def __call__(self, x: mx.array) -> mx.array:
        rows = np.asarray(x.reshape(-1, x.shape[-1]).astype(mx.float32))
        outputs = self._stored["weight"].shape[0]
        y = np.empty((len(rows), outputs), np.float32)
        step = max(1, _BYTES_OF_VALUES // (4 * x.shape[-1]))
        for start in range(0, outputs, step):
            some = {
                # An NVFP4 matrix has one scale besides.
                name: array[start : start + step] if array.ndim == 2 else array
                for name, array in self._stored.items()
            }
            y[:, start : start + step] = rows @ np.asarray(float32_values(some, self._spec)).T
        return mx.array(y).reshape(*x.shape[:-1], outputs).astype(x.dtype)


def _linear(weight: mx.array) -> nn.Module:
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = weight
    mx.eval(weight)
    return linear


def _quantized_linear(arrays: Mapping[str, mx.array], spec: Quantization) -> nn.Module:
    # Of any size: its arrays are replaced before they are made.
    linear = nn.QuantizedLinear(
        128, 128, bias=False, group_size=spec.group_size, bits=spec.bits or 0, mode=spec.mode
    )
    for part in ("weight", "scales", "biases"):
        setattr(linear, part, arrays.get(part))
    mx.eval(arrays)
    return linear
