"""The quantization of each module, inferred from its tensors.

A config's quantization map names modules as they are stored, and some names are gone once tensors
have been split, merged or renamed.  The tensors themselves never lie: with the width of a module's
input, the widths of its ``weight`` and ``scales`` give bits and group size.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx

from .dtypes import name_of
from .tensor import HasShape

# What a quantized module stores: packed values, scales, and with some modes biases or a tensor scale.
PARTS = ("weight", "scales", "biases", "global_scale")
# Of MLX's mode ``affine``.
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
# MLX's modes with 8-bit scales -> bits, group size.
MICROSCALING = {"mxfp8": (8, 32), "mxfp4": (4, 32), "nvfp4": (4, 16)}

# Of a config: MLX's own name for it, and transformers'.
_ENTRIES = ("quantization", "quantization_config")

# The words of a config's quantization: ``group_size``, ``bits``, ``mode``, and perhaps ``global_scale``.
Spec = dict[str, Any]


def infer_quantization(
    weights: Mapping[str, HasShape], parameters: Mapping[str, HasShape]
) -> dict[str, Any] | None:
    """The ``quantization`` entry of a config that describes these tensors.

    Args:
        weights: mapped tensors, quantized ones with ``scales``.
        parameters: the model's, not quantized, for the input width of each module.

    Returns:
        See :func:`quantization_entry`.

    Raises:
        ValueError: shapes that no quantization of MLX makes; names the module.
    """
    # A module that the model does not have is for the check to name.
    modules = [path for path in quantized_in(weights) if f"{path}.weight" in parameters]
    return quantization_entry(
        {path: infer_module(path, weights, parameters[f"{path}.weight"].shape) for path in modules}
    )


def quantized_in(weights: Mapping[str, HasShape]) -> Iterator[str]:
    """The paths of modules that have scales."""
    for name in weights:
        path = name.removesuffix(".scales")
        if path != name and f"{path}.weight" in weights:
            yield path


def infer_module(path: str, weights: Mapping[str, HasShape], shape: tuple[int, ...]) -> Spec:
    """The quantization of one module; ``shape`` is its weight's before it was quantized.

    Raises:
        ValueError: shapes that no quantization of MLX makes; names the module.
    """
    weight, scales, width = weights[f"{path}.weight"], weights[f"{path}.scales"], shape[-1]
    bits, bits_rest = divmod(_last(weight) * 32, width or 1)
    group_size, group_rest = divmod(width, _last(scales) or width + 1)
    if scales.dtype == mx.uint8:
        fitting = (mode for mode, spec in MICROSCALING.items() if spec == (bits, group_size))
        mode = next(fitting, None)
    else:
        mode = "affine" if bits in AFFINE_BITS and group_size in AFFINE_GROUP_SIZES else None
    if mode is None or bits_rest or group_rest:
        raise ValueError(
            f"{path}: a weight of shape {tuple(weight.shape)} with scales of shape {tuple(scales.shape)} "
            f"and dtype {name_of(scales.dtype)} fits no quantization of MLX for {width} inputs"
        )
    spec: Spec = {"group_size": group_size, "bits": bits, "mode": mode}
    return spec | {"global_scale": True} if f"{path}.global_scale" in weights else spec


def quantization_entry(modules: Mapping[str, Spec]) -> dict[str, Any] | None:
    """The ``quantization`` entry of a config: what most modules have, and under its path every other one.

    None when nothing is quantized.
    """
    if not modules:
        return None
    most_common = Counter(tuple(spec.items()) for spec in modules.values()).most_common(1)[0][0]
    default = {key: value for key, value in most_common if key != "global_scale"}
    return {**default, **{path: spec for path, spec in modules.items() if spec != default}}


def with_quantization(config: Mapping[str, Any], quantization: dict[str, Any] | None) -> dict[str, Any]:
    """``config`` with this ``quantization``, or without any, in place of what it had."""
    kept = {key: value for key, value in config.items() if key not in _ENTRIES}
    return kept if quantization is None else kept | dict.fromkeys(_ENTRIES, quantization)


def _last(tensor: HasShape) -> int:
    return tensor.shape[-1] if tensor.shape else 0
