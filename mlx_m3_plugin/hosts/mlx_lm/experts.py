"""NVFP4 experts with a tensor scale each.

mlx-lm's own layer has such a scale from 0.32 on and gives it to ``gather_qmm``, which takes it
on some GPUs only.  Here it multiplies what an expert puts out, which every backend can.
"""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

# A tensor scale is the largest magnitude its tensor can express: 6 (e2m1) times 448 (e4m3).
_NVFP4_LARGEST = 6.0 * 448.0


class ScaledQuantizedSwitchLinear(QuantizedSwitchLinear):
    """With ``global_scale`` ``[num_experts]`` float32, in the meaning of ``mx.quantize``."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
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
        scale = self["global_scale"][indices] / _NVFP4_LARGEST
        return (y * scale[..., None, None]).astype(y.dtype)


class ScaledSwitchLinear(SwitchLinear):
    """Becomes a :class:`ScaledQuantizedSwitchLinear` when it is quantized with ``global_scale``."""

    def to_quantized(
        self, group_size: int = 64, bits: int = 4, mode: str = "affine", global_scale: bool = False
    ) -> QuantizedSwitchLinear:
        quantized = super().to_quantized(group_size, bits, mode)
        if global_scale:
            quantized.__class__ = ScaledQuantizedSwitchLinear
            quantized.global_scale = mx.ones((self.num_experts,))
        return quantized


def hold_global_scales(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Prepare the expert layers that have a ``global_scale`` among ``weights`` to hold it."""
    for path, module in model.named_modules():
        if type(module) is SwitchLinear and f"{path}.global_scale" in weights:
            module.__class__ = ScaledSwitchLinear
