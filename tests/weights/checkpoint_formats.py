"""Whole tiny checkpoints, by format: float, MLX conversions, MXFP8, four-bit experts beside it.

Each maker returns a :class:`Checkpoint` with the float32 parameters that it stands for.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import checkpoint_parts as parts
import layout_makers
import mlx.core as mx
from checkpoint_parts import (
    MOE_LAYERS,
    Arrange,
    Json,
    Rename,
    nested,
    parameters,
    published,
    published_config,
    vision_parameters,
)
from layout_makers import EXPERTS, PROJECTIONS, Weights, as_they_are

# What mx.quantize takes, a dtype to cast to, or None for float32.
Precision = Json | mx.Dtype | None
# A module's path to how it is stored.
Policy = Callable[[str], Precision]


@dataclass
class Checkpoint:
    """What goes into a directory, and the parameters that it stands for.

    Attributes:
        float8: the uint8 tensors that the files call float8.
        other_files: JSON files beside the config.
    """

    tensors: Weights
    config: Json
    values: Weights
    float8: Iterable[str] = ()
    other_files: Json = field(default_factory=dict)

    def write(self, directory: Path) -> Weights:
        parts.write_files(directory, self.tensors, self.config, set(self.float8), self.other_files)
        return self.values


# --- float ---


def plain(
    arrange: Arrange = published,
    rename: Rename = nested,
    config: Callable[[], Json] = published_config,
    vision: bool = True,
    extra: Weights | None = None,
) -> Checkpoint:
    values = parameters()
    tensors = {rename(name): array for name, array in arrange(values).items()}
    if vision:
        tensors |= {rename(name): array for name, array in vision_parameters().items()}
    return Checkpoint(tensors | (extra or {}), config(), values)


def mtp_tensors() -> Weights:
    shapes = {"mtp.layers.0.self_attn.q_proj.weight": (256, 128), "mtp.norm.weight": (128,)}
    return {name: mx.ones(shape) for name, shape in shapes.items()}


# --- MLX ---

MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
# The largest e2m1 value times the largest e4m3 value.
_NVFP4_RANGE = 6 * 448


def affine(bits: int) -> Json:
    return {"group_size": 64, "bits": bits, "mode": "affine"}


@dataclass
class Encoded:
    """Parameters as stored, their values, and how each quantized module was."""

    stored: Weights
    values: Weights
    how: dict[str, Json]


def encode(weights: Weights, policy: Policy) -> Encoded:
    """Store each linear layer and embedding as ``policy`` says for its path."""
    stored, values, how = {}, {}, {}
    for name, array in weights.items():
        module = name.removesuffix(".weight")
        linear = module != name and not module.endswith("norm")
        precision = policy(module) if linear else None
        if isinstance(precision, dict):
            made = mx.quantize(array, **precision)
            stored |= {f"{module}.{p}": a for p, a in zip(("weight", "scales", "biases"), made, strict=False)}
            values[name] = mx.dequantize(*made, **precision, dtype=mx.float32)
            how[module] = precision
        else:
            stored[name] = array if precision is None else array.astype(precision)
            values[name] = stored[name].astype(mx.float32)
    return Encoded(stored, values, how)


def mlx(
    policy: Policy,
    base: Json | None = None,
    arrange: Arrange = as_they_are,
    rename: Rename = nested,
    config: Callable[[], Json] = published_config,
    vision: bool = False,
    indexer: bool = True,
    pack_shared_expert: bool | None = None,
    name_floats: bool = False,
) -> Checkpoint:
    """A conversion.  The config names the modules that differ from ``base``.

    Args:
        pack_shared_expert: mlx-vlm's flag; None leaves it out.
        name_floats: the config says ``false`` for modules that are not quantized.
    """
    base = base or affine(4)
    encoded = encode(parameters(indexer), policy)
    arranged = arrange(encoded.stored)
    tensors = {rename(name): array for name, array in arranged.items()}
    if vision:
        tensors |= {rename(name): array for name, array in vision_parameters().items()}
    modules = [name.removesuffix(".scales") for name in arranged if name.endswith(".scales")]
    # Fused halves have the same precision.
    how = {module: encoded.how[module.replace("gate_up_proj", "gate_proj")] for module in modules}
    entries: Json = {rename(module): entry for module, entry in how.items() if entry != base}
    if name_floats:
        floats = [n.removesuffix(".weight") for n in arranged if n.endswith((".gate.weight", "_proj.weight"))]
        entries |= {rename(module): False for module in floats if module not in how}
    made = config()
    if pack_shared_expert is not None:
        made.get("text_config", made)["pack_shared_expert"] = pack_shared_expert
    made["quantization"] = made["quantization_config"] = base | entries
    return Checkpoint(tensors, made, encoded.values)


def as_converted(base: Precision, router: Precision, **others: Precision) -> Policy:
    """``base`` for all but the router and the modules with a key of ``others`` in their path."""

    def policy(module: str) -> Precision:
        if module.endswith("block_sparse_moe.gate"):
            return router
        return next((precision for part, precision in others.items() if part in module), base)

    return policy


def config_i(module: str) -> Precision:
    """Two bits for experts; the ends, the router and the indexer protected."""
    if module.endswith("block_sparse_moe.gate"):
        return mx.float16
    if ".index_" in module:
        return mx.bfloat16
    if "layers.0." in module or "layers.2." in module or not module.startswith("model.layers."):
        return affine(8)
    if ".switch_mlp." in module:
        return affine(3 if "down_proj" in module else 2)
    return affine(4)


def oq4(module: str) -> Precision:
    """Attention above the base, and one layer's gate and up above its down."""
    if module.endswith("block_sparse_moe.gate"):
        return mx.float16
    if ".self_attn." in module:
        return affine(5)
    if not module.startswith("model.layers."):
        return affine(8)
    raised = "layers.1.block_sparse_moe." in module and "down_proj" not in module
    return affine(5 if raised else 4)


def mixed_3_6(module: str) -> Precision:
    """mlx-lm's recipe of that name."""
    more = module == "lm_head" or ("layers.2." in module and ("v_proj" in module or "down_proj" in module))
    return affine(6 if more else 3)


def nvfp4_with_tensor_scales(base: Policy) -> Checkpoint:
    """MLX's ``global_scale`` is the largest value of an expert, not what its values are multiplied by."""
    made = mlx(lambda module: None if ".switch_mlp." in module else base(module), NVFP4)
    for name in [n for n in made.values if ".switch_mlp." in n]:
        module = nested(name.removesuffix(".weight"))
        experts = made.tensors.pop(nested(name))
        largest = mx.abs(experts).max(axis=(-2, -1))
        rows = [
            mx.quantize(expert, **NVFP4, global_scale=scale)
            for expert, scale in zip(experts, largest, strict=True)
        ]
        packed, scales = (mx.stack(row) for row in zip(*rows, strict=True))
        made.tensors |= {
            f"{module}.weight": packed,
            f"{module}.scales": scales,
            f"{module}.global_scale": largest,
        }
        values = mx.dequantize(packed, scales, **NVFP4, dtype=mx.float32)
        made.values[name] = values * (largest / _NVFP4_RANGE)[:, None, None]
        made.config["quantization"][module] = NVFP4 | {"global_scale": True}
    return made


# --- MXFP8 ---

IGNORED = ("lm_head", "model.embed_tokens", "vision_tower", "multi_modal_projector", "patch_merge_mlp")
ROUTERS = tuple(f"model.layers.{layer}.block_sparse_moe.gate" for layer in MOE_LAYERS)


def official(module: str) -> Precision:
    return None if module in (*IGNORED, *ROUTERS) else MXFP8


def all_float(_: str) -> Precision:
    return None


def mxfp8_bytes(weights: Weights, scale: str = "weight_scale_inv") -> tuple[Weights, list[str]]:
    """The tensors in stored names, and which of them are float8."""
    stored = layout_makers.mxfp8_bytes(weights)
    modules = [n.removesuffix(".weight_scale_inv") for n in stored if n.endswith(".weight_scale_inv")]
    renamed = {nested(name.replace("weight_scale_inv", scale)): array for name, array in stored.items()}
    return renamed, [nested(f"{module}.weight") for module in modules]


def mxfp8(also_ignored: Iterable[str] = ()) -> Checkpoint:
    also = tuple(also_ignored)
    policy: Policy = lambda module: None if module.startswith(also) else official(module)
    encoded = encode(parameters(), policy)
    tensors, float8 = mxfp8_bytes(published(encoded.stored))
    config = published_config()
    config["text_config"]["num_mtp_modules"] = 1
    del config["text_config"]["num_nextn_predict_layers"]
    config["quantization_config"] = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "ignored_layers": [*IGNORED, *map(nested, ROUTERS), *map(nested, also)],
    }
    return Checkpoint(tensors | vision_parameters(), config, encoded.values, float8)


# --- routed experts in a format of their own ---

# One expert's projection and the largest value that shares its tensor scale, to the stored
# parts and the values that they stand for.
ExpertEncoder = Callable[[mx.array, mx.array], tuple[Weights, mx.array]]


def two_to_a_byte(precision: Json, weight: str) -> ExpertEncoder:
    """The first value in the low bits, as MLX packs them too."""

    def encoder(array: mx.array, _: mx.array) -> tuple[Weights, mx.array]:
        packed, scales = mx.quantize(array, **precision)
        values = mx.dequantize(packed, scales, **precision, dtype=mx.float32)
        return {weight: packed.view(mx.uint8), "weight_scale": scales}, values

    return encoder


def nvfp4_modelopt(array: mx.array, largest: mx.array) -> tuple[Weights, mx.array]:
    tensor_scale = largest / _NVFP4_RANGE
    stored, values = two_to_a_byte(NVFP4, "weight")(array / tensor_scale, largest)
    return stored | {"weight_scale_2": tensor_scale, "input_scale": mx.array(1.0)}, values * tensor_scale


def nvfp4_compressed_tensors(array: mx.array, largest: mx.array) -> tuple[Weights, mx.array]:
    """The tensor scale is a divisor here."""
    divisor = _NVFP4_RANGE / largest
    stored, values = two_to_a_byte(NVFP4, "weight_packed")(array * divisor, largest)
    scales = {"weight_global_scale": divisor.reshape(1), "input_global_scale": mx.array([1.0])}
    return stored | scales, values / divisor


def encode_experts(weights: Weights, encoder: ExpertEncoder) -> tuple[Weights, Weights, Weights]:
    """The routed experts as stored and their values, and all other parameters."""
    stored, values, others = {}, {}, dict(weights)
    for layer in MOE_LAYERS:
        moe = f"model.layers.{layer}.block_sparse_moe"
        stacks = {w: others.pop(f"{moe}.switch_mlp.{p}.weight") for p, w in PROJECTIONS.items()}
        made: dict[str, list[mx.array]] = {w: [] for w in stacks}
        for expert in range(EXPERTS):
            one = {w: stack[expert] for w, stack in stacks.items()}
            gate_up = mx.maximum(mx.abs(one["w1"]).max(), mx.abs(one["w3"]).max())
            for w, array in one.items():
                tensors, value = encoder(array, mx.abs(array).max() if w == "w2" else gate_up)
                stored |= {nested(f"{moe}.experts.{expert}.{w}.{p}"): a for p, a in tensors.items()}
                made[w].append(value)
        values |= {f"{moe}.switch_mlp.{p}.weight": mx.stack(made[w]) for p, w in PROJECTIONS.items()}
    return stored, values, others


def other_experts(
    encoder: ExpertEncoder,
    quantization: Json,
    rest: Policy = official,
    rest_scale: str = "weight_scale_inv",
    float8_scales: bool = False,
) -> Checkpoint:
    """The rest is as in the official MXFP8 checkpoint, or float."""
    experts, expert_values, others = encode_experts(parameters(), encoder)
    encoded = encode(others, rest)
    tensors, float8 = mxfp8_bytes(encoded.stored, rest_scale)
    if float8_scales:
        float8 += [name for name in experts if name.endswith(".weight_scale")]
    config = published_config() | {"quantization_config": quantization}
    tensors |= experts | vision_parameters()
    return Checkpoint(tensors, config, encoded.values | expert_values, float8)


def modelopt_mixed() -> Checkpoint:
    made = other_experts(nvfp4_modelopt, {}, float8_scales=True)
    layers: Json = {}
    for name in made.tensors:
        if name.endswith(".weight_scale_inv"):
            layers[name.removesuffix(".weight_scale_inv")] = {"quant_algo": "MXFP8"}
        elif name.endswith(".weight_scale_2"):
            layers[name.removesuffix(".weight_scale_2")] = {"quant_algo": "NVFP4", "group_size": 16}
    settings = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "exclude_modules": [*IGNORED, *map(nested, ROUTERS)],
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
CT_NVFP4 = (
    "nvfp4-pack-quantized",
    _EXPERTS,
    {"num_bits": 4, "group_size": 16, "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"},
)
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
