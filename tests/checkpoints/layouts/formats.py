"""Whole checkpoints, by format: float, MLX conversions, MXFP8, four-bit experts beside it.

Each maker takes a :class:`.source.Source` and returns a :class:`Checkpoint` with the float32 parameters
that it stands for.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx

from .arrange import as_they_are, nested, published
from .source import Json, Source, Weights, as_published
from .writing import write_files

# What mx.quantize takes, a dtype to cast to, or None for float32.
Precision = Json | mx.Dtype | None
# A module's path to how it is stored.
Policy = Callable[[str], Precision]
Arrange = Callable[[Weights], Weights]
Rename = Callable[[str], str]
Spelling = Callable[[Json], Json]


@dataclass
class Checkpoint:
    """What goes into a directory, and the parameters that it stands for.

    Attributes:
        float8: the uint8 tensors that the files call float8.
        other_files: JSON files beside the config.
        folder: of the shards, inside the directory; empty for the directory itself.
        beside: checkpoints of other models, by the names of their folders.
    """

    tensors: Weights
    config: Json
    values: Weights
    float8: Iterable[str] = ()
    other_files: Json = field(default_factory=dict)
    folder: str = ""
    beside: "dict[str, Checkpoint]" = field(default_factory=dict)

    def write(self, directory: Path, files: dict[str, bytes]) -> Weights:
        """With ``files`` beside what it has itself."""
        write_files(
            directory, self.tensors, self.config, set(self.float8), files, self.other_files, self.folder
        )
        for name, other in self.beside.items():
            other.write(directory / name, {})
        return self.values


# --- float ---


def plain(
    arrange: Arrange = published,
    rename: Rename = nested,
    config: Spelling = as_published,
    vision: bool = True,
    extra: Weights | None = None,
    folder: str = "",
    *,
    source: Source,
) -> Checkpoint:
    tensors = {rename(name): array for name, array in arrange(source.parameters).items()}
    if vision:
        tensors |= {rename(name): array for name, array in source.vision.items()}
    made = Checkpoint(tensors | (extra or {}), config(source.config), source.parameters)
    return replace(made, folder=folder)


def mtp_tensors() -> Weights:
    shapes = {"mtp.layers.0.self_attn.q_proj.weight": (256, 128), "mtp.norm.weight": (128,)}
    return {name: mx.ones(shape) for name, shape in shapes.items()}


# --- MLX ---

MXFP4: Json = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
MXFP8: Json = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
NVFP4: Json = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
# The largest e2m1 value times the largest e4m3 value.
NVFP4_RANGE = 6 * 448


def affine(bits: int) -> Json:
    return {"group_size": 64, "bits": bits, "mode": "affine"}


@dataclass
class Encoded:
    """Parameters as stored, their values, and how each quantized module was."""

    stored: Weights
    values: Weights
    spec: dict[str, Json]


def encode(weights: Weights, policy: Policy) -> Encoded:
    """Store each linear layer and embedding as ``policy`` says for its path."""
    stored: Weights = {}
    values: Weights = {}
    spec: dict[str, Json] = {}
    for name, array in weights.items():
        module = name.removesuffix(".weight")
        linear = module != name and not module.endswith("norm")
        precision = policy(module) if linear else None
        if isinstance(precision, dict):
            made = mx.quantize(array, **precision)
            stored |= {f"{module}.{p}": a for p, a in zip(("weight", "scales", "biases"), made, strict=False)}
            values[name] = mx.dequantize(*made, **precision, dtype=mx.float32)
            spec[module] = precision
        else:
            stored[name] = array if precision is None else array.astype(precision)
            values[name] = stored[name].astype(mx.float32)
    return Encoded(stored, values, spec)


def mlx(
    policy: Policy,
    base: Json | None = None,
    arrange: Arrange = as_they_are,
    rename: Rename = nested,
    config: Spelling = as_published,
    vision: bool = False,
    indexer: bool = True,
    pack_shared_expert: bool | None = None,
    name_floats: bool = False,
    *,
    source: Source,
) -> Checkpoint:
    """A conversion.  The config names the modules that differ from ``base``.

    Args:
        pack_shared_expert: mlx-vlm's flag; None leaves it out.
        name_floats: the config says ``false`` for modules that are not quantized.
    """
    base = base or affine(4)
    encoded = encode((source if indexer else source.without_indexer()).parameters, policy)
    arranged = arrange(encoded.stored)
    tensors = {rename(name): array for name, array in arranged.items()}
    if vision:
        tensors |= {rename(name): array for name, array in source.vision.items()}
    modules = [name.removesuffix(".scales") for name in arranged if name.endswith(".scales")]
    # Fused halves have the same precision.
    spec = {module: encoded.spec[module.replace("gate_up_proj", "gate_proj")] for module in modules}
    entries: Json = {rename(module): entry for module, entry in spec.items() if entry != base}
    if name_floats:
        floats = [n.removesuffix(".weight") for n in arranged if n.endswith((".gate.weight", "_proj.weight"))]
        entries |= {rename(module): False for module in floats if module not in spec}
    made = config(source.config)
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


def nvfp4_with_tensor_scales(base: Policy, *, source: Source) -> Checkpoint:
    """MLX's ``global_scale`` is the largest value of an expert, not what its values are multiplied by."""
    made = mlx(lambda module: None if ".switch_mlp." in module else base(module), NVFP4, source=source)
    for name in [n for n in made.values if ".switch_mlp." in n]:
        module = nested(name.removesuffix(".weight"))
        experts = made.tensors.pop(nested(name))
        largest = mx.abs(experts).max(axis=(-2, -1))
        rows = [
            mx.quantize(expert, **NVFP4, global_scale=scale)
            for expert, scale in zip(experts, largest, strict=True)
        ]
        packed, scales = (mx.stack(list(row)) for row in zip(*rows, strict=True))
        made.tensors |= {
            f"{module}.weight": packed,
            f"{module}.scales": scales,
            f"{module}.global_scale": largest,
        }
        values = mx.dequantize(packed, scales, **NVFP4, dtype=mx.float32)
        made.values[name] = values * (largest / NVFP4_RANGE)[:, None, None]
        made.config["quantization"][module] = NVFP4 | {"global_scale": True}
    return made


# --- MXFP8 ---

IGNORED = ("lm_head", "model.embed_tokens", "vision_tower", "multi_modal_projector", "patch_merge_mlp")


def official(module: str) -> Precision:
    return None if module in IGNORED or is_router(module) else MXFP8


def is_router(module: str) -> bool:
    return module.endswith(".block_sparse_moe.gate")


def is_index_projection(module: str) -> bool:
    return ".self_attn.index_" in module and module.endswith("_proj")


def routers(weights: Weights) -> list[str]:
    """Their names in the files."""
    return [nested(m) for m in modules_of(weights) if is_router(m)]


def modules_of(weights: Weights) -> list[str]:
    return [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]


def all_float(_: str) -> Precision:
    return None


def mxfp8_bytes(weights: Weights, scale: str = "weight_scale_inv") -> tuple[Weights, list[str]]:
    """The tensors in stored names, and which of them are float8."""
    stored = as_mxfp8_bytes(weights)
    modules = [n.removesuffix(".weight_scale_inv") for n in stored if n.endswith(".weight_scale_inv")]
    renamed = {nested(name.replace("weight_scale_inv", scale)): array for name, array in stored.items()}
    return renamed, [nested(f"{module}.weight") for module in modules]


def as_mxfp8_bytes(weights: Weights) -> Weights:
    """MLX's ``mxfp8`` as the official checkpoint stores it: e4m3 bytes and exponents."""
    out = {}
    for name, array in weights.items():
        if name.endswith(".scales"):
            out[name.removesuffix("scales") + "weight_scale_inv"] = array
        else:
            out[name] = array.view(mx.uint8) if array.dtype == mx.uint32 else array
    return out


def mxfp8(also_ignored: Callable[[str], bool] = lambda _: False, *, source: Source) -> Checkpoint:
    also = [module for module in modules_of(source.parameters) if also_ignored(module)]
    policy: Policy = lambda module: None if module in also else official(module)
    encoded = encode(source.parameters, policy)
    tensors, float8 = mxfp8_bytes(published(encoded.stored))
    config = as_published(source.config)
    config["text_config"]["num_mtp_modules"] = 1
    config["text_config"].pop("num_nextn_predict_layers", None)
    config["quantization_config"] = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "ignored_layers": [*IGNORED, *routers(source.parameters), *map(nested, also)],
    }
    return Checkpoint(tensors | source.vision, config, encoded.values, float8)
