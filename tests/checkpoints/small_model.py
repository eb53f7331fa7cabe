"""One small model's parameters, and the arrangements of a checkpoint made from them.

``parameters`` is what a layout must be read back to.  Layer 0 is dense, layer 1 sparse with
experts.  Names here are without the ``language_model.`` in front; :func:`with_prefix` adds it.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_m3_plugin.model.config import TextConfig
from tests.checkpoints.layouts import arrange
from tests.checkpoints.layouts.arrange import PREFIX
from tests.checkpoints.layouts.source import Weights

HIDDEN, WIDTH, EXPERTS, VOCAB = 64, 64, 4, 50
MLP, MOE = "model.layers.0.mlp", "model.layers.1.block_sparse_moe"
LAYOUTS: dict[str, Callable[[Weights], Weights]] = {
    arrangement.__name__: arrangement
    for arrangement in (
        arrange.as_they_are,
        arrange.published,
        arrange.shared_as_last_expert,
        arrange.fused,
        arrange.fused_shared_as_last_expert,
        arrange.dense_under_block_sparse_moe,
    )
}

CONFIG = TextConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rotary_dim=16,
    intermediate_size=WIDTH,
    shared_intermediate_size=WIDTH,
    dense_intermediate_size=2 * WIDTH,
    num_local_experts=EXPERTS,
    num_experts_per_tok=2,
    layer_types=["full_attention", "minimax_m3_sparse"],
    mlp_layer_types=["dense", "sparse"],
    index_n_heads=2,
    index_head_dim=32,
    index_block_size=4,
    index_topk_blocks=2,
)


def parameters() -> Weights:
    """The parameters of a model of ``CONFIG``."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32))

    weights = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN),
        "model.norm.weight": normal(HIDDEN),
        "lm_head.weight": normal(VOCAB, HIDDEN),
    }
    for layer in range(2):
        base, attention = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{base}.{norm}.weight"] = normal(HIDDEN)
        for projection, width in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)):
            weights[f"{attention}.{projection}.weight"] = normal(width, HIDDEN)
        weights[f"{attention}.o_proj.weight"] = normal(HIDDEN, 128)
        for norm in ("q_norm", "k_norm"):
            weights[f"{attention}.{norm}.weight"] = normal(32)
    weights["model.layers.1.self_attn.index_q_proj.weight"] = normal(64, HIDDEN)
    weights["model.layers.1.self_attn.index_k_proj.weight"] = normal(32, HIDDEN)
    weights["model.layers.1.self_attn.index_q_norm.weight"] = normal(32)
    weights["model.layers.1.self_attn.index_k_norm.weight"] = normal(32)
    weights[f"{MLP}.gate_proj.weight"] = normal(2 * WIDTH, HIDDEN)
    weights[f"{MLP}.up_proj.weight"] = normal(2 * WIDTH, HIDDEN)
    weights[f"{MLP}.down_proj.weight"] = normal(HIDDEN, 2 * WIDTH)
    weights[f"{MOE}.gate.weight"] = normal(EXPERTS, HIDDEN)
    weights[f"{MOE}.e_score_correction_bias"] = normal(EXPERTS)
    for owner, experts in (("switch_mlp", (EXPERTS,)), ("shared_experts", ())):
        weights[f"{MOE}.{owner}.gate_proj.weight"] = normal(*experts, WIDTH, HIDDEN)
        weights[f"{MOE}.{owner}.up_proj.weight"] = normal(*experts, WIDTH, HIDDEN)
        weights[f"{MOE}.{owner}.down_proj.weight"] = normal(*experts, HIDDEN, WIDTH)
    return weights


def quantized(weights: Weights, **spec) -> Weights:
    """All linear layers quantized, the experts row by row."""
    kept = ["norm", "e_score_correction_bias", "embed_tokens", "lm_head"]
    if spec.get("mode") == "mxfp8":
        # As in the official checkpoint.
        kept.append("block_sparse_moe.gate.")
    out = {}
    for name, array in weights.items():
        if any(part in name for part in kept):
            out[name] = array
        else:
            parts = mx.quantize(array, **spec)
            for part, values in zip(("weight", "scales", "biases"), parts, strict=False):
                out[name.removesuffix("weight") + part] = values
    return out


def with_prefix(weights: Weights) -> Weights:
    return {PREFIX + name: array for name, array in weights.items()}


def with_other_parts(weights: Weights) -> Weights:
    """Vision, draft heads and what other engines store, beside the text model's."""
    one = mx.ones((2, 2))
    others = (
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias",
        "multi_modal_projector.linear_1.weight",
        "patch_merge_mlp.linear_2.bias",
        "model.vision_tower.pre_layrnorm.weight",
        "model.multi_modal_projector.linear_1.bias",
        "mtp.layers.0.self_attn.q_proj.weight",
        "model.mtp.norm.weight",
        "language_model.model.dspark.layers.0.decoder_layer.self_attn.q_proj.weight",
        "dspark.fc.weight",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "language_model.model.layers.1.self_attn.attn.k_scale",
        "language_model.model.layers.0.self_attn.v_proj.output_scale",
    )
    return weights | dict.fromkeys(others, one)
