"""Which tensors there are, and what they are called in the files.

Arrangements take and give the text model's parameters, in names that begin with ``model.`` or ``lm_head``,
and keep quantized parts (``weight``, ``scales``, ``biases``) together.
"""

from collections.abc import Iterator

import mlx.core as mx

from .source import Weights

PREFIX = "language_model."
PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
STACK, SHARED = ".block_sparse_moe.switch_mlp.", ".block_sparse_moe.shared_experts."


# --- arrangements ---


def as_they_are(weights: Weights) -> Weights:
    """Experts stacked, gate and up apart, the shared expert apart: what ``mlx_lm.convert`` writes."""
    return dict(weights)


def published(weights: Weights) -> Weights:
    """One tensor for each expert's projection."""
    out = dict(weights)
    for name in _of(weights, STACK):
        moe, projection, part = _split(name, STACK)
        for expert, array in enumerate(out.pop(name)):
            out[f"{moe}.block_sparse_moe.experts.{expert}.{PROJECTIONS[projection]}.{part}"] = array
    return out


def shared_as_last_expert(weights: Weights) -> Weights:
    """``switch_mlp`` of 128 + 1 rows."""
    out = dict(weights)
    for name in _of(weights, STACK):
        shared = out.pop(name.replace(STACK, SHARED))
        out[name] = mx.concatenate([out[name], shared[None]])
    return out


def fused(weights: Weights) -> Weights:
    """Gate and up as one ``gate_up_proj``, the gate first; of the stack and of the shared expert."""
    return _fused(weights, STACK, SHARED)


def fused_experts_only(weights: Weights) -> Weights:
    return _fused(weights, STACK)


def fused_shared_as_last_expert(weights: Weights) -> Weights:
    """What ``mlx_vlm.convert`` writes by default."""
    return fused(shared_as_last_expert(weights))


def dense_under_block_sparse_moe(weights: Weights) -> Weights:
    return {name.replace(".mlp.", ".block_sparse_moe."): array for name, array in published(weights).items()}


def in_memory(weights: Weights) -> Weights:
    """The modules of transformers 5.x: what its ``state_dict`` holds."""
    renamed = {}
    for name, array in _fused(weights, STACK, SHARED, ".mlp.").items():
        name = name.replace(".block_sparse_moe.e_score", ".mlp.gate.e_score")
        name = name.replace(".block_sparse_moe.", ".mlp.").replace(".self_attn.index_", ".self_attn.indexer.")
        if ".switch_mlp." in name:
            name = name.replace(".switch_mlp.", ".experts.").removesuffix(".weight")
        renamed[name] = array
    return renamed


def _fused(weights: Weights, *owners: str) -> Weights:
    out = dict(weights)
    for owner in owners:
        for name in _of(weights, f"{owner}gate_proj."):
            halves = [out.pop(name), out.pop(name.replace("gate_proj", "up_proj"))]
            out[name.replace("gate_proj", "gate_up_proj")] = mx.concatenate(halves, axis=-2)
    return out


def _of(weights: Weights, part: str) -> Iterator[str]:
    return (name for name in list(weights) if part in name)


def _split(name: str, owner: str) -> tuple[str, str, str]:
    """A layer's path, a projection, and ``weight``, ``scales`` or ``biases``."""
    layer, _, rest = name.partition(owner)
    projection, part = rest.split(".")
    return layer, projection, part


# --- names: what a text or vision tensor, or its module, is called in the files ---


def is_text(name: str) -> bool:
    return name.startswith(("model.", "lm_head"))


def nested(name: str) -> str:
    return PREFIX + name if is_text(name) else name


def text_only(name: str) -> str:
    return name


def model_around(name: str) -> str:
    return "model." + nested(name)


def model_language_model(name: str) -> str:
    """The outer names of transformers 5.x: ``lm_head`` stays on top."""
    if name.startswith("lm_head"):
        return name
    return "model.language_model." + name.removeprefix("model.") if is_text(name) else "model." + name


def model_language_model_and_head(name: str) -> str:
    return f"model.language_model.{name}" if name.startswith("lm_head") else model_language_model(name)


def in_memory_names(name: str) -> str:
    """As ``model_language_model``, with transformers' vision modules."""
    for old, new in (
        ("vision_tower.vision_model.embeddings.patch_embedding.", "vision_tower.embeddings.proj."),
        ("vision_tower.vision_model.encoder.layers.", "vision_tower.layers."),
        ("vision_tower.vision_model.pre_layrnorm.", "vision_tower.pre_layrnorm."),
        ("patch_merge_mlp.linear_", "multi_modal_projector.merge_linear_"),
    ):
        name = name.replace(old, new)
    return model_language_model(name)
