"""A model that is to be written, and what a directory of it holds beside the tensors."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

Weights = dict[str, mx.array]
Json = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A model in float32.

    Attributes:
        config: ``config.json`` in the published spelling, without quantization.
        parameters: of the text model in the arrangement of ``mlx_lm.convert`` (experts stacked in
            ``switch_mlp``, gate and up apart), with names that begin with ``model.`` or ``lm_head``.
        vision: tower and projectors in published names; empty for a text model.
        files: all other files of the directory, by name.
    """

    config: Json
    parameters: Weights
    vision: Weights
    files: dict[str, bytes]

    def without_indexer(self) -> "Source":
        kept = {name: array for name, array in self.parameters.items() if ".index_" not in name}
        return replace(self, parameters=kept)


# --- config.json in other spellings: each takes the published one ---

_GONE_FROM_TEXT = (
    *("architectures", "sparse_attention_config", "moe_layer_freq", "use_gemma_norm", "use_qk_norm"),
    *("qk_norm_type", "scoring_func", "n_shared_experts", "use_routing_bias", "attention_output_gate"),
    *("rope_theta", "partial_rotary_factor", "num_mtp_modules", "num_nextn_predict_layers"),
)
_GONE_FROM_VISION = (
    *("projection_dim", "initializer_factor", "vocab_size", "position_embedding_type", "rope_mode"),
    *("rope_theta", "img_token_compression_config", "vision_segment_max_frames"),
)
_GONE = ("auto_map", "img_token_compression_config", "torch_dtype")


def as_published(config: Json) -> Json:
    return copy.deepcopy(config)


def respelled(config: Json) -> Json:
    """As transformers 5.x spells it, with no key left that it does not know itself."""
    text, vision = config["text_config"], config["vision_config"]
    sparse, merge = text["sparse_attention_config"], config["img_token_compression_config"]
    kept_of_text = {key: value for key, value in text.items() if key not in _GONE_FROM_TEXT}
    kept_of_vision = {key: value for key, value in vision.items() if key not in _GONE_FROM_VISION}
    ends = {"bos_token_id": 200034, "eos_token_id": 200020}
    text_config = (ends | kept_of_text) | {
        "model_type": "minimax_m3_vl_text",
        "hidden_act": "silu",
        "index_n_heads": sparse["sparse_num_index_heads"],
        "index_head_dim": sparse["sparse_index_dim"],
        "index_block_size": sparse["sparse_block_size"],
        "index_topk_blocks": sparse["sparse_topk_blocks"],
        "index_local_blocks": sparse["sparse_local_block"],
        "layer_types": [
            "minimax_m3_sparse" if is_sparse else "full_attention"
            for is_sparse in sparse["sparse_attention_freq"]
        ],
        "mlp_layer_types": ["sparse" if is_moe else "dense" for is_moe in text["moe_layer_freq"]],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": text["rope_theta"],
            "partial_rotary_factor": text["partial_rotary_factor"],
        },
        "pad_token_id": None,
    }
    vision_config = kept_of_vision | {
        "model_type": "minimax_m3_vl_vision",
        "temporal_patch_size": merge["temporal_patch_size"],
        "spatial_merge_size": merge["spatial_merge_size"],
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision["rope_theta"]},
    }
    kept = {key: value for key, value in config.items() if key not in _GONE}
    return copy.deepcopy(
        kept
        | {
            "text_config": text_config,
            "vision_config": vision_config,
            "dtype": "float32",
            "transformers_version": "5.23.0",
            "tie_word_embeddings": False,
        }
    )


def flat(config: Json) -> Json:
    """``model_type: minimax_m3``, all text keys on top."""
    return _text_only(as_published(config))


def respelled_flat(config: Json) -> Json:
    return _text_only(respelled(config))


def _text_only(config: Json) -> Json:
    return config["text_config"] | {"model_type": "minimax_m3", "architectures": ["MiniMaxM3ForCausalLM"]}


def with_text_config(config: Json) -> Json:
    """``model_type: minimax_m3`` with the text keys one level down."""
    text = as_published(config)["text_config"]
    return {"model_type": "minimax_m3", "architectures": ["MiniMaxM3ForCausalLM"], "text_config": text}
