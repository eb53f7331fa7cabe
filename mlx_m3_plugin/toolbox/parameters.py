"""The parameters that a model of a config has, how a checkpoint stores them, and what is wrong with them.

Names are the published ones without a prefix, shapes those before any quantization.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from ..model.config import TextConfig
from ..model.tensor_scales import scale_shape
from ..weights import group_names
from ..weights.check import ShapeAndKind, compare
from ..weights.quantization import PARTS, infer_module, quantized_in
from ..weights.tensor import Tensor
from .precision import Quantization

Shapes = dict[str, tuple[int, ...]]
_Entries = Iterator[tuple[str, tuple[int, ...]]]

# Component -> what its tensors' published names contain; the first that fits counts.
COMPONENTS = {
    "embeddings": (".embed_tokens.",),
    "lm_head": ("lm_head.",),
    "vision tower": ("vision_tower.",),
    "projector": ("multi_modal_projector.",),
    "patch merge": ("patch_merge_mlp.",),
    "indexer": (".self_attn.index_",),
    "attention": (".self_attn.",),
    "dense MLP": (".mlp.",),
    "routed experts": (".switch_mlp.", ".experts."),
    "shared expert": (".shared_experts.",),
    "router": (".block_sparse_moe.",),
    "norms": ("norm.weight",),
}
OTHER = "other"


def component_of(name: str) -> str:
    """The part of the model that a published tensor name belongs to."""
    dotted = f".{name}"
    found = (part for part, marks in COMPONENTS.items() if any(mark in dotted for mark in marks))
    return next(found, OTHER)


def text_shapes(config: TextConfig, *, indexers: bool = True) -> Shapes:
    """The text model's, experts stacked; ``indexers=False`` for a checkpoint that has none."""
    return dict(_text(config, indexers))


def vision_shapes(config: Mapping[str, Any]) -> Shapes:
    """Those of the vision tower and the projectors, from the whole ``config.json``.

    What the config does not say is as in the released M3.

    Raises:
        ValueError: a size is not a number.
    """
    try:
        return dict(_vision(config))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"config: vision_config does not describe a vision tower ({error})") from None


def _text(config: TextConfig, indexers: bool) -> _Entries:
    hidden = config.hidden_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        base = f"model.layers.{layer}"
        yield f"{base}.input_layernorm.weight", (hidden,)
        yield f"{base}.post_attention_layernorm.weight", (hidden,)
        yield from _attention(f"{base}.self_attn", config)
        if indexers and config.is_sparse_attention(layer):
            yield from _indexer(f"{base}.self_attn", config)
        if config.is_moe(layer):
            yield from _mixture(f"{base}.block_sparse_moe", config)
        else:
            yield from _mlp(f"{base}.mlp", hidden, config.dense_intermediate_size)


def _attention(base: str, config: TextConfig) -> _Entries:
    hidden, head = config.hidden_size, config.head_dim
    yield f"{base}.q_proj.weight", (config.num_attention_heads * head, hidden)
    yield f"{base}.k_proj.weight", (config.num_key_value_heads * head, hidden)
    yield f"{base}.v_proj.weight", (config.num_key_value_heads * head, hidden)
    yield f"{base}.o_proj.weight", (hidden, config.num_attention_heads * head)
    if config.use_qk_norm:
        yield f"{base}.q_norm.weight", (head,)
        yield f"{base}.k_norm.weight", (head,)


def _indexer(base: str, config: TextConfig) -> _Entries:
    hidden, head = config.hidden_size, config.index_head_dim
    yield f"{base}.index_q_proj.weight", (config.index_n_heads * head, hidden)
    yield f"{base}.index_k_proj.weight", (head, hidden)
    yield f"{base}.index_q_norm.weight", (head,)
    yield f"{base}.index_k_norm.weight", (head,)


def _mixture(base: str, config: TextConfig) -> _Entries:
    hidden, experts = config.hidden_size, config.num_local_experts
    yield f"{base}.gate.weight", (experts, hidden)
    yield f"{base}.e_score_correction_bias", (experts,)
    yield from _mlp(f"{base}.switch_mlp", hidden, config.intermediate_size, experts)
    yield from _mlp(f"{base}.shared_experts", hidden, config.shared_intermediate_size)


def _mlp(base: str, hidden: int, width: int, *experts: int) -> _Entries:
    yield f"{base}.gate_proj.weight", (*experts, width, hidden)
    yield f"{base}.up_proj.weight", (*experts, width, hidden)
    yield f"{base}.down_proj.weight", (*experts, hidden, width)


def _vision(config: Mapping[str, Any]) -> _Entries:
    vision, text = config.get("vision_config") or {}, config.get("text_config") or config
    merging = vision.get("img_token_compression_config") or config.get("img_token_compression_config") or {}
    hidden, wide = vision.get("hidden_size", 1280), vision.get("intermediate_size", 5120)
    frames = vision.get("temporal_patch_size", merging.get("temporal_patch_size", 2))
    side = vision.get("patch_size", 14)
    tower = "vision_tower.vision_model"
    patch = (vision.get("num_channels", 3), frames, side, side)
    yield f"{tower}.embeddings.patch_embedding.weight", (hidden, *patch)
    yield from _with_bias(f"{tower}.pre_layrnorm", hidden)
    for layer in range(vision.get("num_hidden_layers", 32)):
        base = f"{tower}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _with_bias(f"{base}.{norm}", hidden)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _with_bias(f"{base}.self_attn.{projection}", hidden, hidden)
        yield from _with_bias(f"{base}.mlp.fc1", wide, hidden)
        yield from _with_bias(f"{base}.mlp.fc2", hidden, wide)

    out = text.get("hidden_size", TextConfig.hidden_size)
    between = config.get("projector_hidden_size", out)
    merged = vision.get("spatial_merge_size", merging.get("spatial_merge_size", 2)) ** 2 * out
    yield from _with_bias("multi_modal_projector.linear_1", between, hidden)
    yield from _with_bias("multi_modal_projector.linear_2", out, between)
    yield from _with_bias("patch_merge_mlp.linear_1", between, merged)
    yield from _with_bias("patch_merge_mlp.linear_2", out, between)


def _with_bias(module: str, *shape: int) -> _Entries:
    yield f"{module}.weight", shape
    yield f"{module}.bias", shape[:1]


# --- how they are stored ---

_PACKED, _FLOAT = "uint32", "float"


def quantized_modules(
    plan: Mapping[str, Tensor], shapes: Shapes
) -> tuple[dict[str, Quantization], list[str]]:
    """How each quantized module of ``shapes`` is, and a line for each that MLX could not have quantized."""
    quantized, problems = {}, []
    for module in quantized_in(plan):
        if (shape := shapes.get(f"{module}.weight")) is None:
            continue
        try:
            found = infer_module(module, plan, shape)
        except ValueError as error:
            problems.append(str(error))
        else:
            quantized[module] = Quantization(found["bits"], found["group_size"], found["mode"])
    return quantized, problems


def differences(
    plan: Mapping[str, Tensor], shapes: Shapes, quantized: Mapping[str, Quantization], prefix: str = ""
) -> list[str]:
    """What is missing, left over, or of another shape or kind of dtype, one line for each kind of module.

    Args:
        quantized: the modules that are, by their paths.
        prefix: what the model puts before the names of parameters, for those that are missing.
    """
    found = compare(plan, expected_parameters(plan, shapes, quantized))
    missing = group_names(prefix + name for name in found.missing)
    left_over = group_names(stored for name in found.left_over for stored in plan[name].stored_names())
    wrong: dict[str, list[str]] = defaultdict(list)
    for name, (has, wants) in found.wrong.items():
        wrong[f"is {_told(has)}, not {_told(wants)}"].append(prefix + name)
    return [
        *(f"missing: {line}" for line in missing),
        *(f"left over: {line}" for line in left_over),
        *(f"{line} {spec}" for spec, names in sorted(wrong.items()) for line in group_names(names)),
    ]


def expected_parameters(
    plan: Mapping[str, Tensor], shapes: Shapes, quantized: Mapping[str, Quantization]
) -> dict[str, ShapeAndKind | None]:
    """What a model of these shapes that is quantized so takes: the parameters of the loaded model.

    Returns:
        Name -> shape and kind of dtype; None where its quantization is wrong, which is reported elsewhere.
    """
    expected: dict[str, ShapeAndKind | None] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        spec = quantized.get(module)
        if spec is None or spec.bits is None:
            if name in plan and f"{module}.scales" in plan:
                parts = (f"{module}.{part}" for part in PARTS)
                expected |= dict.fromkeys(part for part in parts if part in plan)
            else:
                expected[name] = shape, _FLOAT
            continue
        *rows, width = shape
        groups = (*rows, width // spec.group_size)
        expected[name] = (*rows, width * spec.bits // 32), _PACKED
        expected[f"{module}.scales"] = groups, _FLOAT if spec.mode == "affine" else "uint8"
        if spec.mode == "affine":
            expected[f"{module}.biases"] = groups, _FLOAT
        if spec.mode == "nvfp4" and f"{module}.global_scale" in plan:
            expected[f"{module}.global_scale"] = scale_shape(shape), _FLOAT
    return expected


def _told(stored: ShapeAndKind) -> str:
    shape, kind = stored
    return f"{kind}{list(shape)}"
