"""Writes the golden models beside this file: random transformers models and what they answer.

    python tests/golden/make_golden.py

Needs torch and transformers; the tests that read the files need neither.  Running it again
with the versions in ``versions.json`` writes the same bytes.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1]))
from tests.live import oracle  # noqa: E402

SEED = 0
N_TOKENS = 120
# Files of a repository: as small as the arithmetic allows, and no cheaper in blocks or layers.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "head_dim": 8,
    "index_head_dim": 8,
    "intermediate_size": 12,
    "dense_intermediate_size": 20,
    "shared_intermediate_size": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    # The defaults of transformers lie outside this vocabulary.
    "bos_token_id": None,
    "eos_token_id": None,
}
NAMES = ("as_published", "no_local_block", "two_local_blocks", "all_dense", "yarn")
# The biggest vision tensors stay out.  The small ones are there to be dropped by their names.
VISION = ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")
VISION_BYTES = 4096


def main() -> None:
    torch.set_num_threads(1)
    for name in NAMES:
        made = oracle.make_oracle({**SMALL, **oracle.SHAPES[name]}, SEED, N_TOKENS)
        write(HERE / name, made)
        print(f"{name}: {len(made.ties)} ties, {size_of(HERE / name)} bytes")
    write_published_spelling(HERE / "as_published", HERE / "published_spelling")
    packages = ("torch", "transformers", "numpy", "safetensors")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    write_json(HERE / "versions.json", versions)


def write(path: Path, made: oracle.Oracle) -> None:
    path.mkdir(exist_ok=True)
    made.save(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    weights = {
        name: array
        for name, array in load_file(path / "model.safetensors").items()
        if not (name.startswith(VISION) and array.nbytes > VISION_BYTES)
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    answer = {
        "tokens": made.tokens.astype(np.int32),
        "logits": made.logits.astype(np.float32),
        "ties": np.array(sorted(made.ties), dtype=np.int32),
    }
    save_file(answer, path / "golden.safetensors")


def write_published_spelling(source: Path, path: Path) -> None:
    """The same model under the keys that the published checkpoints use; it shares the weights."""
    path.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    sparse = [int(kind == oracle.SPARSE) for kind in text["layer_types"]]
    kept = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "dense_intermediate_size", "shared_intermediate_size", "vocab_size"),
        *("max_position_embeddings", "rms_norm_eps", "swiglu_alpha", "swiglu_limit", "num_local_experts"),
        *("num_experts_per_tok", "routed_scaling_factor", "tie_word_embeddings"),
    )
    rope = text["rope_parameters"]
    published_text: dict[str, Any] = {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "dtype": "float32",
        **{key: text[key] for key in kept},
        "rope_theta": rope["rope_theta"],
        "rotary_dim": int(text["head_dim"] * rope["partial_rotary_factor"]),
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "hidden_act": "swigluoai",
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "moe_layer_freq": [int(kind == "sparse") for kind in text["mlp_layer_types"]],
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "attention_output_gate": False,
        "num_mtp_modules": 1,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_attention_freq": sparse,
            "sparse_num_index_heads": text["index_n_heads"],
            "sparse_index_dim": text["index_head_dim"],
            "sparse_block_size": text["index_block_size"],
            "sparse_topk_blocks": text["index_topk_blocks"],
            "sparse_init_block": 0,
            "sparse_local_block": text["index_local_blocks"],
            "sparse_score_type": "max",
            "sparse_disable_index_value": sparse,
        },
    }
    vision = {k: v for k, v in config["vision_config"].items() if k not in ("model_type", "rope_parameters")}
    published = {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "torch_dtype": "float32",
        "image_token_index": config["image_token_index"],
        "video_token_index": config["video_token_index"],
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": config["projector_hidden_size"],
        "num_reward_heads": 0,
        "text_config": published_text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "rope_mode": "3d",
            "rope_theta": 10000.0,
            **vision,
        },
    }
    write_json(path / "config.json", published)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


if __name__ == "__main__":
    main()
