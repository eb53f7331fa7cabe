"""How each module is quantized, told by its tensors.

A config's quantization map names modules as they are stored, and some names are gone once
tensors have been split, merged or renamed.  The tensors themselves never lie: with the width
of a module's input, the widths of its ``weight`` and ``scales`` give bits and group size.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from .tensor import HasShape

# MLX's modes with 8-bit scales: (bits, group size) -> name.
_MODES = {(8, 32): "mxfp8", (4, 32): "mxfp4", (4, 16): "nvfp4"}
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUPS = (16, 32, 64, 128)
# Of a config: MLX's own name for it, and transformers'.
_ENTRIES = ("quantization", "quantization_config")


def infer_quantization(
    weights: Mapping[str, HasShape], parameters: Mapping[str, HasShape]
) -> dict[str, Any] | None:
    """The ``quantization`` entry of a config that describes these tensors.

    Args:
        weights: mapped tensors, quantized ones with ``scales``.
        parameters: the model's, not quantized: they tell the input width of each module.

    Returns:
        ``{"group_size": ..., "bits": ..., "mode": ...}`` of most modules, and under the path of
        every other quantized module its own; None when nothing is quantized.

    Raises:
        ValueError: shapes that no quantization of MLX makes; names the module.
    """
    modules = {}
    for name in weights:
        path = name.removesuffix(".scales")
        # A module the model does not have is for the check to name.
        if path != name and f"{path}.weight" in weights and f"{path}.weight" in parameters:
            modules[path] = _infer(path, weights, parameters[f"{path}.weight"].shape[-1])
    if not modules:
        return None
    most_common = Counter(tuple(spec.items()) for spec in modules.values()).most_common(1)[0][0]
    default = {key: value for key, value in most_common if key != "global_scale"}
    return {**default, **{path: spec for path, spec in modules.items() if spec != default}}


def with_quantization(config: Mapping[str, Any], quantization: dict[str, Any] | None) -> dict[str, Any]:
    """``config`` that tells of ``quantization``, or of none, whatever it told before."""
    kept = {key: value for key, value in config.items() if key not in _ENTRIES}
    return kept if quantization is None else kept | dict.fromkeys(_ENTRIES, quantization)


def _infer(path: str, weights: Mapping[str, HasShape], width: int) -> dict[str, Any]:
    weight, scales = weights[f"{path}.weight"], weights[f"{path}.scales"]
    bits, bits_rest = divmod(weight.shape[-1] * 32, width)
    group_size, group_rest = divmod(width, scales.shape[-1] or width + 1)
    spec: dict[str, Any] = {"group_size": group_size, "bits": bits}
    if str(scales.dtype) == str(mx.uint8):
        known = _MODES.get((bits, group_size))
    else:
        known = "affine" if bits in _AFFINE_BITS and group_size in _AFFINE_GROUPS else None
    if known is None or bits_rest or group_rest:
        raise ValueError(
            f"{path}: a weight of shape {tuple(weight.shape)} with scales of shape {tuple(scales.shape)} "
            f"and dtype {scales.dtype} is no quantization of {width} inputs that MLX knows"
        )
    spec["mode"] = known
    if f"{path}.global_scale" in weights:
        spec["global_scale"] = True
    return spec
