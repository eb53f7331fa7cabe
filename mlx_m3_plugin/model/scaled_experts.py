"""NVFP4 experts with a tensor scale each.

mlx-lm's own layer has such a scale from 0.32 on and gives it to ``gather_qmm``, which takes it
on some GPUs only; mlx-vlm's has none.  Here it multiplies what an expert puts out, which every
backend can.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# A tensor scale is the largest magnitude its tensor can express: 6 (e2m1) times 448 (e4m3).
NVFP4_LARGEST = 6.0 * 448.0


def hold_global_scales(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Prepare the expert layers that have a ``global_scale`` among ``weights`` to hold it.

    They stay instances of the host's class, and take ``global_scale=True`` when quantized.
    """
    for path, module in model.named_modules():
        if f"{path}.global_scale" in weights and hasattr(module, "to_quantized"):
            module.__class__ = _taking_a_scale(type(module))  # type: ignore[arg-type]


@cache
def _taking_a_scale(linear: Any) -> Any:
    def to_quantized(
        self: Any, group_size: int = 64, bits: int = 4, mode: str = "affine", global_scale: bool = False
    ) -> nn.Module:
        quantized = linear.to_quantized(self, group_size, bits, mode)
        if global_scale:
            quantized.__class__ = _scaled(type(quantized))  # type: ignore[arg-type]
            quantized.global_scale = mx.ones((self.weight.shape[0],))
        return quantized

    return type(linear.__name__, (linear,), {"to_quantized": to_quantized})


@cache
def _scaled(quantized: Any) -> Any:
    def __call__(self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = mx.gather_qmm(
            x,
            self["weight"],
            self["scales"],
            rhs_indices=indices,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )
        scale = self["global_scale"][indices] / NVFP4_LARGEST
        return (y * scale[..., None, None]).astype(y.dtype)

    return type(quantized.__name__, (quantized,), {"__call__": __call__})
