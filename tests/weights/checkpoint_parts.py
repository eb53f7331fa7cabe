"""What tiny checkpoints are made of: config, parameters, arrangements, names, and files.

No weight matrix of the text model is square, so that a transposed one cannot pass.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import layout_makers
import mlx.core as mx
import numpy as np
from layout_makers import EXPERTS, PREFIX, PROJECTIONS, Weights

from mlx_m3_plugin.model.config import text_config_of
from mlx_m3_plugin.toolbox.demo import random_weights, write_demo

Json = dict[str, Any]
Arrange = Callable[[Weights], Weights]
Rename = Callable[[str], str]

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
def demo_files() -> dict[str, str]:
    """The demo checkpoint's text files: tokenizer, chat template, and a config to start from."""
    with tempfile.TemporaryDirectory() as directory:
        write_demo(Path(directory))
        skipped = (".safetensors", ".index.json")
        return {p.name: p.read_text() for p in Path(directory).iterdir() if not p.name.endswith(skipped)}


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


_GONE_FROM_TEXT = (
    *("architectures", "sparse_attention_config", "moe_layer_freq", "use_gemma_norm", "use_qk_norm"),
    *("qk_norm_type", "scoring_func", "n_shared_experts", "use_routing_bias", "attention_output_gate"),
    *("rope_theta", "partial_rotary_factor", "num_mtp_modules", "num_nextn_predict_layers"),
)
_GONE_FROM_VISION = (
    *("projection_dim", "initializer_factor", "vocab_size", "position_embedding_type", "rope_mode"),
    *("rope_theta", "img_token_compression_config", "vision_segment_max_frames"),
)


def respelled_config() -> Json:
    """As transformers 5.x spells it, with no key left that it does not know itself."""
    config = published_config()
    text, vision = config["text_config"], config["vision_config"]
    rope = {"rope_type": "default", "rope_theta": 5000000, "partial_rotary_factor": 0.5}
    config["text_config"] = {key: value for key, value in text.items() if key not in _GONE_FROM_TEXT} | {
        "model_type": "minimax_m3_vl_text",
        "hidden_act": "silu",
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_block_size": 8,
        "index_topk_blocks": 4,
        "index_local_blocks": 1,
        "layer_types": ["minimax_m3_sparse" if sparse else "full_attention" for sparse in _SPARSE],
        "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in _SPARSE],
        "rope_parameters": rope,
        "bos_token_id": 200034,
        "eos_token_id": 200020,
        "pad_token_id": None,
    }
    config["vision_config"] = {k: v for k, v in vision.items() if k not in _GONE_FROM_VISION} | {
        "model_type": "minimax_m3_vl_vision",
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    }
    for key in ("auto_map", "img_token_compression_config", "torch_dtype"):
        del config[key]
    return config | {"dtype": "float32", "transformers_version": "5.23.0", "tie_word_embeddings": False}


def _text_only(config: Json) -> Json:
    return config["text_config"] | {"model_type": "minimax_m3", "architectures": ["MiniMaxM3ForCausalLM"]}


def flat_config() -> Json:
    """``model_type: minimax_m3``, all text keys on top."""
    return _text_only(published_config())


def respelled_flat_config() -> Json:
    return _text_only(respelled_config())


def text_config_config() -> Json:
    """``model_type: minimax_m3`` with the text keys one level down."""
    architectures = ["MiniMaxM3ForCausalLM"]
    text = published_config()["text_config"]
    return {"model_type": "minimax_m3", "architectures": architectures, "text_config": text}


# --- parameters, in the names of layout_makers.parameters() ---


def parameters(indexer: bool = True) -> Weights:
    config = text_config_of(published_config(), environ={})
    names = {
        name.removeprefix(PREFIX): mx.array(array)
        for name, array in random_weights(config, np.random.default_rng(7))
        if indexer or ".index_" not in name
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


# --- arrangements: which tensors there are; names without prefix ---


def in_each_moe_layer(arrange: Arrange) -> Arrange:
    """``layout_makers`` arranges layer 1 only."""

    def arranged(weights: Weights) -> Weights:
        out = dict(weights)
        for layer in MOE_LAYERS:
            own, first = f"model.layers.{layer}.", "model.layers.1."
            taken = {first + n.removeprefix(own): out.pop(n) for n in list(out) if n.startswith(own)}
            out |= {own + n.removeprefix(first): array for n, array in arrange(taken).items()}
        return out

    return arranged


published = in_each_moe_layer(layout_makers.published)
fused = in_each_moe_layer(layout_makers.fused)
shared_as_last_expert = in_each_moe_layer(layout_makers.shared_as_last_expert)
fused_shared_as_last_expert = in_each_moe_layer(layout_makers.fused_shared_as_last_expert)


def fused_experts_only(weights: Weights) -> Weights:
    shared = {n: a for n, a in weights.items() if ".shared_experts." in n}
    return fused({n: a for n, a in weights.items() if n not in shared}) | shared


def dense_under_block_sparse_moe(weights: Weights) -> Weights:
    return layout_makers.dense_under_block_sparse_moe(published(weights))


def in_memory(weights: Weights) -> Weights:
    """The modules of transformers 5.x: what its ``state_dict`` holds."""
    out = fused(weights)
    for part in ("weight", "scales", "biases"):
        for name in [n for n in out if n.endswith(f".mlp.gate_proj.{part}")]:
            up = out.pop(name.replace("gate_proj", "up_proj"))
            out[name.replace("gate_proj", "gate_up_proj")] = mx.concatenate([out.pop(name), up])
    renamed = {}
    for name, array in out.items():
        name = name.replace(".block_sparse_moe.e_score", ".mlp.gate.e_score")
        name = name.replace(".block_sparse_moe.", ".mlp.").replace(".self_attn.index_", ".self_attn.indexer.")
        if ".switch_mlp." in name:
            name = name.replace(".switch_mlp.", ".experts.").removesuffix(".weight")
        renamed[name] = array
    return renamed


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


# --- files ---

_DTYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint8: "U8",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.int64: "I64",
}


def write_safetensors(path: Path, tensors: Weights, float8: Iterable[str]) -> None:
    """MLX has no float8: its bytes are in uint8 arrays, and only the header says what they are."""
    header: Json = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, array in tensors.items():
        dtype = "F8_E4M3" if name in float8 else _DTYPES[array.dtype]
        start = len(data)
        data += np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_files(directory: Path, tensors: Weights, config: Json, float8: set[str], other: Json) -> None:
    """A checkpoint directory of three shards, cut without regard to layers and modules."""
    directory.mkdir(parents=True, exist_ok=True)
    names, weight_map = sorted(tensors), {}
    for shard in range(3):
        file = f"model-0000{shard + 1}-of-00003.safetensors"
        own = names[len(names) * shard // 3 : len(names) * (shard + 1) // 3]
        write_safetensors(directory / file, {name: tensors[name] for name in own}, float8)
        weight_map |= dict.fromkeys(own, file)
    metadata = {"total_size": sum(array.nbytes for array in tensors.values())}
    index = {"metadata": metadata, "weight_map": weight_map}
    texts = {"config.json": config, "model.safetensors.index.json": index, **other}
    for file, content in {**demo_files(), **texts}.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (directory / file).write_text(text, encoding="utf-8")
