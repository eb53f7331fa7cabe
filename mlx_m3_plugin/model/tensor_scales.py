"""NVFP4 with tensor scales: one more float32 scale for each matrix, or for each expert in a stack.

MLX's layers have no tensor scale, and mlx-lm's experts have none (until: mlx-lm 0.32).  Those of 0.32
give it to ``gather_qmm``, which takes it on some GPUs only.  Here it multiplies the output of a matrix,
which works on every backend.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

# A tensor scale is the largest magnitude its tensor can express: 6 (e2m1) times 448 (e4m3).
NVFP4_LARGEST = 6.0 * 448.0


def scale_shape(weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor scales of a weight: ``()`` of a matrix, ``(n,)`` of a stack of ``n``."""
    return weight[:-2]


def factor(global_scale: mx.array) -> mx.array:
    """The float32 factor of a matrix's values."""
    return global_scale.astype(mx.float32) / NVFP4_LARGEST


def expect_scales(model: nn.Module, weights: Mapping[str, object]) -> None:
    """Prepare the layers that have a ``global_scale`` among ``weights`` to hold it.

    They stay instances of the host's class, and take ``global_scale=True`` when quantized.
    """
    for path, module in model.named_modules():
        if f"{path}.global_scale" in weights and hasattr(module, "to_quantized"):
            module.__class__ = _taking_a_scale(type(module))  # type: ignore[arg-type]


def dequantize_scaled_layers(model: nn.Module) -> None:
    """Replace each layer that has a tensor scale by the host's float layer with its values, in bfloat16.

    Both libraries' own ``dequantize_model`` gives bfloat16 too, and leaves tensor scales out.
    """
    layers = [(path, _dequantized(module)) for path, module in model.named_modules() if is_scaled(module)]
    model.update_modules(tree_unflatten(layers))


def is_scaled(module: nn.Module) -> bool:
    return "global_scale" in module


def _dequantized(scaled: Any) -> nn.Module:
    # Without its tensor scale a value of NVFP4 has few enough bits to be exact in bfloat16.
    values = mx.dequantize(
        scaled["weight"],
        scaled["scales"],
        group_size=scaled.group_size,
        bits=scaled.bits,
        mode=scaled.mode,
        dtype=mx.bfloat16,
    )
    weight = (values * factor(scaled["global_scale"])[..., None, None]).astype(mx.bfloat16)
    layer: nn.Module = scaled.float_class(*weight.shape[::-1], bias=False)
    layer.weight = weight
    return layer


def hold_scale(quantized: nn.Module, global_scale: mx.array) -> nn.Module:
    """A quantized layer, of a matrix or of a stack of experts, that multiplies by its tensor scale."""
    scaled = _scaled_experts if quantized.weight.ndim > 2 else _scaled_linear
    quantized.__class__ = scaled(type(quantized))  # type: ignore[arg-type]
    quantized.global_scale = global_scale
    # Not trainable, like its other parts.
    quantized.freeze(recurse=False)
    return quantized


@cache
def _taking_a_scale(linear: Any) -> Any:
    def to_quantized(
        self: Any, group_size: int = 64, bits: int = 4, mode: str = "affine", global_scale: bool = False
    ) -> nn.Module:
        quantized = linear.to_quantized(self, group_size, bits, mode)
        if not global_scale:
            return quantized
        scaled = hold_scale(quantized, mx.ones(scale_shape(self.weight.shape)))
        scaled.float_class = linear
        return scaled

    return type(linear.__name__, (linear,), {"to_quantized": to_quantized})


def _refuse(self: Any) -> None:
    """Code that reads this attribute is about to dequantize, and would ignore the tensor scale."""
    raise NotImplementedError(
        "layers in NVFP4 with tensor scales cannot be fused with adapters or trained with DoRA, because the "
        "scales would be lost: first convert the checkpoint, with `mlx_lm.convert --dequantize` or "
        "`mlx-m3 convert`"
    )


@cache
def _scaled_linear(quantized: Any) -> Any:
    def __call__(self: Any, x: mx.array) -> mx.array:
        y = quantized.__call__(self, x)
        return (y * factor(self["global_scale"])).astype(y.dtype)

    return type(quantized.__name__, (quantized,), {"__call__": __call__, "biases": property(_refuse)})


@cache
def _scaled_experts(quantized: Any) -> Any:
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
        return (y * factor(self["global_scale"][indices])[..., None, None]).astype(y.dtype)

    return type(quantized.__name__, (quantized,), {"__call__": __call__, "biases": property(_refuse)})
