"""The tiny model that is written in every layout: config, parameters, and files.

No weight matrix of the text model is square, so that a transposed one cannot pass.
"""

import functools
import json
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_m3_plugin.model.config import text_config_of
from tests.checkpoints.layouts.arrange import PREFIX, PROJECTIONS
from tests.checkpoints.layouts.source import Json, Source, Weights
from tests.checkpoints.random_model import random_weights, write_random_model
from tests.checkpoints.small_model import EXPERTS

MOE_LAYERS = (1, 2)
_SPARSE = [0, 1, 1]
# MSA selects blocks and the MoE chooses experts; both need room to choose.
_TEXT = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "dense_intermediate_size": 384,
    "intermediate_size": 256,
    "shared_intermediate_size": 256,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_layer_freq": _SPARSE,
    "max_position_embeddings": 1048576,
    "num_mtp_modules": 7,
    "num_nextn_predict_layers": 1,
}
_MERGE = {"image_token_compression_method": "patch_merge", "spatial_merge_size": 2, "temporal_patch_size": 2}
_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 2016,
    "projection_dim": 128,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "vocab_size": 32000,
    "position_embedding_type": "rope",
    "rope_mode": "3d",
    "rope_theta": 10000.0,
    "img_token_compression_config": _MERGE,
    "vision_segment_max_frames": 4,
}


# --- config.json ---


@functools.cache
def demo_files() -> dict[str, bytes]:
    """The demo checkpoint's text files: tokenizer, chat template, and a config to start from."""
    with tempfile.TemporaryDirectory() as directory:
        write_random_model(Path(directory))
        skipped = (".safetensors", ".index.json")
        return {p.name: p.read_bytes() for p in Path(directory).iterdir() if not p.name.endswith(skipped)}


def published_config() -> Json:
    """As MiniMax published it, scaled down."""
    config = json.loads(demo_files()["config.json"])
    text = config["text_config"] | _TEXT
    for key in ("bos_token_id", "eos_token_id"):
        del text[key]
    text["sparse_attention_config"] |= {
        "sparse_num_index_heads": 2,
        "sparse_attention_freq": _SPARSE,
        "sparse_disable_index_value": _SPARSE,
    }
    return config | {
        "auto_map": {"AutoConfig": "configuration_minimax_m3_vl.MiniMaxM3VLConfig"},
        "transformers_version": "4.52.4",
        "image_seq_length": 576,
        "image_grid_pinpoints": "[[336, 336], [336, 672], [672, 336], [672, 672]]",
        "process_image_mode": "dynamic_res",
        "img_token_compression_config": _MERGE,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": 128,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "num_reward_heads": 0,
        "text_config": text,
        "vision_config": dict(_VISION),
    }


def parameters() -> Weights:
    config = text_config_of(published_config())
    names = {
        name.removeprefix(PREFIX): mx.array(array)
        for name, array in random_weights(config, np.random.default_rng(7))
    }
    for layer in MOE_LAYERS:
        moe = f"model.layers.{layer}.block_sparse_moe"
        for projection, stored in PROJECTIONS.items():
            experts = [names.pop(f"{moe}.experts.{expert}.{stored}.weight") for expert in range(EXPERTS)]
            names[f"{moe}.switch_mlp.{projection}.weight"] = mx.stack(experts)
    return names


def vision_parameters() -> Weights:
    """Published names."""
    rng = np.random.default_rng(8)
    hidden, wide, text = _VISION["hidden_size"], _VISION["intermediate_size"], _TEXT["hidden_size"]
    tower = "vision_tower.vision_model"
    shapes = {f"{tower}.embeddings.patch_embedding.weight": (hidden, 3, 2, 14, 14)}
    norms = [f"{tower}.pre_layrnorm"]
    linear = {
        "multi_modal_projector.linear_1": (text, hidden),
        "multi_modal_projector.linear_2": (text, text),
        "patch_merge_mlp.linear_1": (text, 4 * text),
        "patch_merge_mlp.linear_2": (text, text),
    }
    for layer in range(_VISION["num_hidden_layers"]):
        base = f"{tower}.encoder.layers.{layer}"
        norms += [f"{base}.layer_norm1", f"{base}.layer_norm2"]
        linear |= {f"{base}.self_attn.{x}_proj": (hidden, hidden) for x in ("q", "k", "v", "out")}
        linear |= {f"{base}.mlp.fc1": (wide, hidden), f"{base}.mlp.fc2": (hidden, wide)}
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    scale = {name: np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1 for name, shape in shapes.items()}
    return {
        name: mx.array((rng.standard_normal(shape) * scale[name]).astype(np.float32))
        for name, shape in shapes.items()
    }


@functools.cache
def tiny() -> Source:
    return Source(published_config(), parameters(), vision_parameters(), demo_files())
