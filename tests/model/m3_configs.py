"""The config of the real MiniMax-M3, in each spelling in circulation."""

from typing import Any

N_DENSE, N_SPARSE = 3, 57

# The published ``text_config``.
PUBLISHED_TEXT: dict[str, Any] = {
    "architectures": ["MiniMaxM3SparseForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 6144,
    "num_hidden_layers": 60,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 3072,
    "dense_intermediate_size": 12288,
    "shared_intermediate_size": 3072,
    "vocab_size": 200064,
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-6,
    "use_gemma_norm": True,
    "attention_output_gate": False,
    "num_mtp_modules": 1,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "partial_rotary_factor": 0.5,
    "hidden_act": "swigluoai",
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "routed_scaling_factor": 2.0,
    "moe_layer_freq": [0] * N_DENSE + [1] * N_SPARSE,
    "use_qk_norm": True,
    "qk_norm_type": "per_head",
    "tie_word_embeddings": False,
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_attention_freq": [0] * N_DENSE + [1] * N_SPARSE,
        "sparse_num_index_heads": 4,
        "sparse_index_dim": 128,
        "sparse_block_size": 128,
        "sparse_topk_blocks": 16,
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_score_type": "max",
        "sparse_disable_index_value": [0] * N_DENSE + [1] * N_SPARSE,
    },
}

PUBLISHED: dict[str, Any] = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "model_type": "minimax_m3_vl",
    "torch_dtype": "bfloat16",
    "image_token_index": 200025,
    "video_token_index": 200026,
    "text_config": PUBLISHED_TEXT,
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1280, "rope_theta": 10000.0},
}

# What transformers 5.23 writes after reading the above.
RESAVED: dict[str, Any] = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "model_type": "minimax_m3_vl",
    "dtype": "bfloat16",
    "merged_hidden_size": 24576,
    "projector_hidden_size": 6144,
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "text_config": {
        "attention_dropout": 0.0,
        "bos_token_id": 200034,
        "dense_intermediate_size": 12288,
        "eos_token_id": 200020,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 6144,
        "index_block_size": 128,
        "index_head_dim": 128,
        "index_local_blocks": 1,
        "index_n_heads": 4,
        "index_topk_blocks": 16,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_types": ["full_attention"] * N_DENSE + ["minimax_m3_sparse"] * N_SPARSE,
        "max_position_embeddings": 1048576,
        "mlp_layer_types": ["dense"] * N_DENSE + ["sparse"] * N_SPARSE,
        "model_type": "minimax_m3_vl_text",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 60,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "output_router_logits": False,
        "pad_token_id": None,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000000, "rope_type": "default"},
        "rotary_dim": 64,
        "routed_scaling_factor": 2.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "shared_intermediate_size": 3072,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 200064,
    },
    "vision_config": {"model_type": "minimax_m3_vl_vision", "hidden_size": 1280},
}

# Text-only extractions: the text config on top, or still nested.
FLAT: dict[str, Any] = {**PUBLISHED_TEXT, "model_type": "minimax_m3"}
FLAT_RESAVED: dict[str, Any] = {**RESAVED["text_config"], "model_type": "minimax_m3"}
NESTED_TEXT_ONLY: dict[str, Any] = {"model_type": "minimax_m3", "text_config": PUBLISHED_TEXT}
