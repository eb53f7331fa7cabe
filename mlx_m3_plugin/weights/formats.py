"""Quantized formats of other libraries, read as MLX's own without touching a value.

MLX packs a quantized matrix as ``weight`` (uint32), ``scales`` and, for affine quantization,
``biases``.  Microscaling formats have the same bytes under other names of parts:

=============  ==========================  ======================  =====================
MLX's mode     values                      scales                  tensor scale
=============  ==========================  ======================  =====================
``mxfp8``      e4m3, one per byte          E8M0 per 32 inputs      none
``mxfp4``      e2m1, two per byte          E8M0 per 32 inputs      none
``nvfp4``      e2m1, two per byte          e4m3 per 16 inputs      float32
=============  ==========================  ======================  =====================

``mx.load`` gives 8-bit floats as uint8, so the mode follows from how many bytes share a scale.

compressed-tensors' integers are MLX's ``affine``: packed into an int32 in the same order, and
``(q - zero_point) * scale``, with half of their range as the zero point unless one is stored.
"""

import re
from collections import defaultdict
from typing import NoReturn

import mlx.core as mx

from ..model.config import TextConfig
from ..model.tensor_scales import NVFP4_LARGEST
from .dtypes import name_of
from .names import EXPERT_PROJECTIONS
from .quantization import MICROSCALING
from .tensor import Tensor, TensorPlan

# Bytes of values per scale -> MLX's mode.
_BYTES_PER_SCALE = {bits * group_size // 8: mode for mode, (bits, group_size) in MICROSCALING.items()}
_SCALES = ("weight_scale_inv", "weight_scale")
# For quantizing activations; here only weights are read.
FOR_ACTIVATIONS = ("input_scale", "input_global_scale")
# Modules whose input is as wide as the hidden states.
_TAKE_HIDDEN_STATES = (
    *("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"),
    *("gate", "gate_proj", "up_proj", "gate_up_proj", "lm_head"),
)
FOREIGN_PART = re.compile(
    r"\.(weight_scale_inv|weight_scale|weight_scale_2|weight_global_scale|weight_packed|weight_shape"
    r"|weight_zero_point|input_scale|input_global_scale|qweight|qzeros|g_idx)$"
)


def read_formats(plan: TensorPlan, config: TextConfig) -> None:
    """Turn every module that is quantized in a format of another library into MLX's parts.

    Raises:
        ValueError: MLX has no mode for a format; names it and a tensor.
    """
    foreign: dict[str, set[str]] = defaultdict(set)
    for name in plan:
        if part := FOREIGN_PART.search(name):
            foreign[name.removesuffix(part[0])].add(part[1])
    for module, parts in foreign.items():
        _read_module(plan, module, parts, config)


def _read_module(plan: TensorPlan, module: str, parts: set[str], config: TextConfig) -> None:
    for part in FOR_ACTIVATIONS:
        plan.pop(f"{module}.{part}", None)
    values = next((p for p in ("weight_packed", "weight") if f"{module}.{p}" in plan), None)
    scale = next((p for p in _SCALES if p in parts), None)
    if values is None or scale is None:
        if {"qweight", "qzeros", "g_idx", "weight_packed", "weight_zero_point"} & parts:
            _refuse(plan, module, parts)
        # A part is missing; the check before loading will name it.
        return
    packed, scales = plan[f"{module}.{values}"], plan[f"{module}.{scale}"]
    is_integer = values == "weight_packed" and packed.dtype == mx.int32
    bits = _integer_bits(packed, scales, module, config) if is_integer else None
    mode = None if is_integer else _mode(packed, scales)
    if bits is None and mode is None:
        _refuse(plan, module, parts)
    del plan[f"{module}.{values}"], plan[f"{module}.{scale}"]
    plan |= {f"{module}.weight": packed.view_as_uint32(), f"{module}.scales": scales}
    if bits is not None:
        plan[f"{module}.biases"] = _biases_of_integers(plan, module, scales, bits)
    elif mode == "nvfp4":
        _read_tensor_scale(plan, module)


def _mode(values: Tensor, scales: Tensor) -> str | None:
    one_byte = values.dtype == scales.dtype == mx.uint8
    if not one_byte or len(values.shape) < 2 or len(values.shape) != len(scales.shape):
        return None
    if values.shape[:-1] != scales.shape[:-1] or not scales.shape[-1] or values.shape[-1] % 4:
        return None
    per_scale, rest = divmod(values.shape[-1], scales.shape[-1])
    return None if rest else _BYTES_PER_SCALE.get(per_scale)


def _integer_bits(values: Tensor, scales: Tensor, module: str, config: TextConfig) -> int | None:
    """Bits of packed integers, from the width of the module's input; None if MLX has no such groups."""
    width = _input_width(module, config)
    if width is None or len(values.shape) != 2 or values.shape[:1] != scales.shape[:1]:
        return None
    bits, rest = divmod(values.shape[-1] * 32, width)
    grouped = scales.shape[-1] * 32 <= width <= scales.shape[-1] * 128
    return bits if bits in (4, 8) and grouped and not rest else None


def _input_width(module: str, config: TextConfig) -> int | None:
    name = module.rpartition(".")[2]
    projection = EXPERT_PROJECTIONS.get(name, name)
    if projection == "down_proj":
        if ".shared_experts." in module:
            return config.shared_intermediate_size
        return config.intermediate_size if ".experts." in module else config.dense_intermediate_size
    if projection == "o_proj":
        return config.num_attention_heads * config.head_dim
    return config.hidden_size if projection in _TAKE_HIDDEN_STATES else None


def _biases_of_integers(plan: TensorPlan, module: str, scales: Tensor, bits: int) -> Tensor:
    plan.pop(f"{module}.weight_shape", None)
    zero_points = plan.pop(f"{module}.weight_zero_point", None)
    if zero_points is None:
        return scales.apply("multiply", -float(2 ** (bits - 1)))
    return scales.apply("zero points", bits, zero_points)


def _read_tensor_scale(plan: TensorPlan, module: str) -> None:
    factor = plan.pop(f"{module}.weight_scale_2", None)
    divisor = plan.pop(f"{module}.weight_global_scale", None)
    if factor is not None:
        # ModelOpt: value = e2m1 * weight_scale * weight_scale_2.
        plan[f"{module}.global_scale"] = _scalar(factor).apply("multiply", NVFP4_LARGEST)
    elif divisor is not None:
        # compressed-tensors: value = e2m1 * weight_scale / weight_global_scale.
        plan[f"{module}.global_scale"] = _scalar(divisor).apply("divide", NVFP4_LARGEST)


def _scalar(tensor: Tensor) -> Tensor:
    if any(n != 1 for n in tensor.shape) or tensor.dtype != mx.float32:
        raise ValueError(f"{_describe(tensor)}: a tensor scale must be one float32")
    return tensor.reshape()


def _refuse(plan: TensorPlan, module: str, parts: set[str]) -> NoReturn:
    names = [f"{module}.{part}" for part in sorted({*parts, "weight"})]
    tensors = ", ".join(_describe(plan[name]) for name in names if name in plan)
    raise ValueError(
        f"MLX has no quantization mode for {_format_name(plan, module, parts)}: {tensors}. "
        "Use the published bf16 or MXFP8 checkpoint, or dequantize this one first"
    )


def _describe(tensor: Tensor) -> str:
    """With its stored name."""
    return f"{tensor} {name_of(tensor.dtype)}{list(tensor.shape)}"


def _format_name(plan: TensorPlan, module: str, parts: set[str]) -> str:
    if {"qweight", "qzeros", "g_idx"} & parts:
        return "GPTQ or AWQ packing (qweight)"
    if "weight_packed" in parts and plan[f"{module}.weight_packed"].dtype != mx.uint8:
        return "integers of compressed-tensors other than 4 or 8 bits in groups of 32 to 128"
    scales = next(plan[f"{module}.{part}"] for part in _SCALES if part in parts)
    if scales.dtype != mx.uint8:
        return "fp8 with float scales per block or channel"
    return "this packing"
