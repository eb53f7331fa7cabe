"""Random draft heads in the published layout, for the tiny model of ``tests/vlm``."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.checkpoints.layouts.source import Json, Weights
from tests.checkpoints.layouts.writing import write_files
from tests.drafts.reference import PREFIX

HIDDEN, VOCABULARY, N_LAYERS = 128, 704, 3
MXFP8: Json = {"group_size": 32, "bits": 8, "mode": "mxfp8"}


def config(**text: Any) -> Json:
    """``config.json`` with the published keys, scaled down."""
    own = {
        "num_hidden_layers": 2,
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rotary_dim": 16,
        "rope_theta": 10000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1048576,
        "dense_intermediate_size": 192,
        "dspark_ffn_hidden_size": 192,
        "dspark_use_dense_ffn": True,
        "moe_layer_freq": [0, 0],
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 24,
        "sparse_attention_config": None,
        "use_gemma_norm": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "hidden_act": "swigluoai",
        "dspark_block_size": 7,
        "dspark_noise_token_id": 650,
        "dspark_target_layer_ids": [0, 2],
        "dspark_markov_rank": 32,
        "dspark_markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "dspark_hybrid_context_fusion": False,
    } | text
    return {
        "architectures": ["DSparkMiniMaxDraftModel"],
        # What it says is not public; the target's is the hardest case.
        "model_type": "minimax_m3_vl",
        "dspark_config": {"dspark_hybrid_context_fusion": False},
        "text_config": own,
    }


def values(text: Json, seed: int) -> Weights:
    """Published names, linear maps of unit gain."""
    random = np.random.default_rng(seed)
    hidden, rank, vocabulary = text["hidden_size"], text["dspark_markov_rank"], text["vocab_size"]
    width, head = text["dense_intermediate_size"], text["head_dim"]
    heads, groups = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    shapes = {
        "fc.weight": (hidden, hidden * len(text["dspark_target_layer_ids"])),
        "hidden_norm.weight": (hidden,),
        "final_norm.weight": (hidden,),
        "markov_head.markov_w1.weight": (vocabulary, rank),
        "markov_head.markov_w2.weight": (vocabulary, rank),
        "confidence_head.proj.weight": (1, hidden + rank),
        "confidence_head.proj.bias": (1,),
    }
    for number in range(text["num_hidden_layers"]):
        layer = f"layers.{number}.decoder_layer"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_norm.weight": (head,),
            f"{layer}.self_attn.k_norm.weight": (head,),
            f"{layer}.self_attn.q_proj.weight": (heads, hidden),
            f"{layer}.self_attn.k_proj.weight": (groups, hidden),
            f"{layer}.self_attn.v_proj.weight": (groups, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, heads),
            f"{layer}.mlp.gate_proj.weight": (width, hidden),
            f"{layer}.mlp.up_proj.weight": (width, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, width),
        }
    gains = {name: shape[-1] ** -0.5 if len(shape) > 1 else 0.3 for name, shape in shapes.items()}
    arrays = {name: random.standard_normal(shape) * gains[name] for name, shape in shapes.items()}
    return {PREFIX + name: mx.array(array.astype(np.float32)) for name, array in arrays.items()}


def is_matrix_of_layer(name: str) -> bool:
    return name.endswith("_proj.weight") and ".layers." in name


def write(directory: Path, config: Json, weights: Weights, stored: str = "float32") -> Weights:
    """Write a head; returns the float32 values that it stands for, by published names.

    Args:
        stored: ``float32``, ``bfloat16``, ``mxfp8`` as published, or ``affine``, a conversion by MLX.
    """
    tensors, stands_for, float8 = {}, {}, set()
    for name, array in weights.items():
        if stored == "mxfp8" and is_matrix_of_layer(name):
            packed, scales = mx.quantize(array, **MXFP8)
            tensors |= {name: packed.view(mx.uint8), f"{name}_scale_inv": scales}
            float8.add(name)
            stands_for[name] = mx.dequantize(packed, scales, **MXFP8, dtype=mx.float32)
        elif stored == "affine" and is_matrix_of_layer(name):
            parts = mx.quantize(array, group_size=32, bits=4)
            module = name.removesuffix("weight")
            tensors |= {module + p: a for p, a in zip(("weight", "scales", "biases"), parts, strict=True)}
            stands_for[name] = mx.dequantize(*parts, group_size=32, bits=4)
        else:
            tensors[name] = array if stored in ("float32", "affine") else array.astype(mx.bfloat16)
            stands_for[name] = tensors[name].astype(mx.float32)
    config = dict(config)
    if stored == "mxfp8":
        config["quantization_config"] = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
    if stored == "affine":
        config["quantization"] = {"group_size": 32, "bits": 4}
    write_files(directory, tensors, config, float8, {}, {})
    return stands_for
