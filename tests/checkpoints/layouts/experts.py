"""Routed experts in a format of their own, as other libraries store them, and the rest as MXFP8 or float."""

from collections.abc import Callable

import mlx.core as mx

from .arrange import PROJECTIONS, STACK, nested
from .formats import (
    IGNORED,
    NVFP4,
    NVFP4_RANGE,
    Checkpoint,
    Policy,
    encode,
    mxfp8_bytes,
    official,
    routers,
)
from .source import Json, Source, Weights, as_published

# One expert's projection and the largest value that shares its tensor scale, to the stored
# parts and the values that they stand for.
ExpertEncoder = Callable[[mx.array, mx.array], tuple[Weights, mx.array]]


def two_to_a_byte(precision: Json, weight: str) -> ExpertEncoder:
    """The first value in the low bits, as MLX packs them too."""

    def encoder(array: mx.array, _: mx.array) -> tuple[Weights, mx.array]:
        packed, scales = mx.quantize(array, **precision)  # type: ignore[misc]
        values = mx.dequantize(packed, scales, **precision, dtype=mx.float32)
        return {weight: packed.view(mx.uint8), "weight_scale": scales}, values

    return encoder


def nvfp4_modelopt(array: mx.array, largest: mx.array) -> tuple[Weights, mx.array]:
    tensor_scale = largest / NVFP4_RANGE
    stored, values = two_to_a_byte(NVFP4, "weight")(array / tensor_scale, largest)
    return stored | {"weight_scale_2": tensor_scale, "input_scale": mx.array(1.0)}, values * tensor_scale


def nvfp4_compressed_tensors(array: mx.array, largest: mx.array) -> tuple[Weights, mx.array]:
    """The tensor scale is a divisor here."""
    divisor = NVFP4_RANGE / largest
    stored, values = two_to_a_byte(NVFP4, "weight_packed")(array * divisor, largest)
    scales = {"weight_global_scale": divisor.reshape(1), "input_global_scale": mx.array([1.0])}
    return stored | scales, values / divisor


def encode_experts(weights: Weights, encoder: ExpertEncoder) -> tuple[Weights, Weights, Weights]:
    """The routed experts as stored and their values, and all other parameters."""
    stored: Weights = {}
    values: Weights = {}
    others = dict(weights)
    for first in [name for name in weights if name.endswith(f"{STACK}gate_proj.weight")]:
        moe = first.removesuffix(".switch_mlp.gate_proj.weight")
        stacks = {w: others.pop(f"{moe}.switch_mlp.{p}.weight") for p, w in PROJECTIONS.items()}
        made: dict[str, list[mx.array]] = {w: [] for w in stacks}
        for expert in range(len(stacks["w1"])):
            one = {w: stack[expert] for w, stack in stacks.items()}
            gate_up = mx.maximum(mx.abs(one["w1"]).max(), mx.abs(one["w3"]).max())
            for w, array in one.items():
                tensors, value = encoder(array, mx.abs(array).max() if w == "w2" else gate_up)
                stored |= {nested(f"{moe}.experts.{expert}.{w}.{p}"): a for p, a in tensors.items()}
                made[w].append(value)
        values |= {f"{moe}.switch_mlp.{p}.weight": mx.stack(made[w]) for p, w in PROJECTIONS.items()}
    return stored, values, others


def encode_linears(weights: Weights, encoder: ExpertEncoder) -> tuple[Weights, Weights, Weights]:
    """The projections that are no experts as stored and their values, and all other parameters."""
    stored: Weights = {}
    values: Weights = {}
    others = dict(weights)
    for name in [n for n in weights if n.endswith("_proj.weight")]:
        array = others.pop(name)
        tensors, values[name] = encoder(array, mx.abs(array).max())
        stored |= {nested(f"{name.removesuffix('.weight')}.{p}"): a for p, a in tensors.items()}
    return stored, values, others


def nvfp4_everywhere(encoder: ExpertEncoder, quantization: Json, *, source: Source) -> Checkpoint:
    """Every linear layer but the router and the head, each with a tensor scale."""
    experts, expert_values, others = encode_experts(source.parameters, encoder)
    linears, linear_values, others = encode_linears(others, encoder)
    stored = experts | linears
    config = as_published(source.config) | {"quantization_config": quantization}
    floats = {nested(name): array for name, array in others.items()}
    return Checkpoint(
        stored | floats | source.vision,
        config,
        others | expert_values | linear_values,
        [name for name in stored if name.endswith(".weight_scale")],
    )


def other_experts(
    encoder: ExpertEncoder,
    quantization: Json,
    rest: Policy = official,
    rest_scale: str = "weight_scale_inv",
    float8_scales: bool = False,
    *,
    source: Source,
) -> Checkpoint:
    """The rest is as in the official MXFP8 checkpoint, or float."""
    experts, expert_values, others = encode_experts(source.parameters, encoder)
    encoded = encode(others, rest)
    tensors, float8 = mxfp8_bytes(encoded.stored, rest_scale)
    if float8_scales:
        float8 += [name for name in experts if name.endswith(".weight_scale")]
    config = as_published(source.config) | {"quantization_config": quantization}
    tensors |= experts | source.vision
    return Checkpoint(tensors, config, encoded.values | expert_values, float8)


def modelopt_mixed(*, source: Source) -> Checkpoint:
    made = other_experts(nvfp4_modelopt, {}, float8_scales=True, source=source)
    layers: Json = {}
    for name in made.tensors:
        if name.endswith(".weight_scale_inv"):
            layers[name.removesuffix(".weight_scale_inv")] = {"quant_algo": "MXFP8"}
        elif name.endswith(".weight_scale_2"):
            layers[name.removesuffix(".weight_scale_2")] = {"quant_algo": "NVFP4", "group_size": 16}
    settings = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "exclude_modules": [*IGNORED, *routers(source.parameters)],
        "quantized_layers": layers,
    }
    made.config["quantization_config"] = settings | {"quant_method": "modelopt"}
    producer = {"name": "modelopt", "version": "minimax-m3-mxfp8-nvfp4-mixed"}
    hf = {"producer": producer, "quant_method": "modelopt", "quantization": settings}
    made.other_files["hf_quant_config.json"] = hf
    return made


def compressed_tensors(*groups: tuple[str, str, Json]) -> Json:
    """A ``quantization_config`` of groups ``(format, target, weights)``."""
    common = {"type": "float", "symmetric": True, "dynamic": False}
    formats = {group[0] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": {
                "format": name,
                "targets": [target],
                "weights": common | weights,
                "input_activations": None,
                "output_activations": None,
            }
            for i, (name, target, weights) in enumerate(groups)
        },
        "ignore": [*map(nested, IGNORED[:1]), "re:.*embed_tokens", "re:.*gate$", *IGNORED[2:]],
        "kv_cache_scheme": None,
    }


_EXPERTS, _OTHERS = r"re:.*block_sparse_moe\.experts\..*", r"re:.*(self_attn|mlp|shared_experts)\..*_proj$"
_E8M0 = {"group_size": 32, "strategy": "group", "scale_dtype": "torch.uint8"}
CT_MXFP4 = ("mxfp4-pack-quantized", _EXPERTS, {"num_bits": 4, **_E8M0})
CT_MXFP8 = ("mxfp8-quantized", _OTHERS, {"num_bits": 8, **_E8M0})
_NVFP4 = {"num_bits": 4, "group_size": 16, "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
CT_NVFP4 = ("nvfp4-pack-quantized", _EXPERTS, _NVFP4)
# The default recipe of llm-compressor.
CT_NVFP4_LINEAR = ("nvfp4-pack-quantized", "Linear", _NVFP4)
NVFP4_LAYERS = {"quant_method": "modelopt", "quant_algo": "NVFP4", "quantized_layers": {}}
_QUARK_FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0"}
QUARK = {
    "quant_method": "quark",
    "global_quant_config": {
        "weight": _QUARK_FP4 | {"is_dynamic": False},
        "input_tensors": _QUARK_FP4 | {"is_dynamic": True},
        "output_tensors": None,
        "bias": None,
    },
    "layer_quant_config": {},
    "exclude": [*map(nested, IGNORED[:1]), "re:.*self_attn.*", "re:.*mlp.*", "re:.*gate", *IGNORED[2:]],
    "export": {"weight_format": "real_quantized", "pack_method": "reorder"},
}
