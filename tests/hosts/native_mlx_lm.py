"""mlx-lm's own MiniMax-M3 module, where the installed mlx-lm has one, and small models of both.

Ours answers to the native module's name, so the native file is loaded under another one.
"""

import importlib.util
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx_lm.models
import numpy as np
import pytest
from mlx.utils import tree_flatten

MLX_LM_VERSION = tuple(int(part) for part in version("mlx-lm").split(".")[:3])

# Sizes that divide by 64: groups of 4-bit quantization.
TEXT: dict[str, Any] = {
    "model_type": "minimax_m3_vl_text",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 64,
    "dense_intermediate_size": 128,
    "shared_intermediate_size": 64,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * 3,
    "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_block_size": 8,
    "index_topk_blocks": 3,
    "index_local_blocks": 1,
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 2.0,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}


def native_module() -> ModuleType | None:
    """mlx-lm's file, or None where mlx-lm has none: before 0.32.2."""
    path = Path(mlx_lm.models.__path__[0]) / "minimax_m3_vl.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("mlx_lm.models.minimax_m3_vl_native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NATIVE = native_module()
needs_native = pytest.mark.skipif(NATIVE is None, reason="this mlx-lm has no M3 class of its own")


def config(model_type: str = "minimax_m3_vl", **changes: Any) -> dict[str, Any]:
    text = {**TEXT, **changes}
    return {**text, "model_type": model_type} if model_type == "minimax_m3" else _nested(text)


def _nested(text: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "minimax_m3_vl", "text_config": text}


def our_module(model_type: str = "minimax_m3_vl") -> ModuleType:
    return import_module(f"mlx_lm.models.{model_type}")


def our_model(model_type: str = "minimax_m3_vl", **changes: Any) -> Any:
    module = our_module(model_type)
    return randomized(module.Model(module.ModelArgs.from_dict(config(model_type, **changes))))


def native_twin(model: Any, **changes: Any) -> Any:
    """The native model with the same weights."""
    twin = NATIVE.Model(NATIVE.ModelArgs.from_dict(config(**changes)))
    twin.load_weights(tree_flatten(model.parameters()))
    return twin


def randomized(model: Any) -> Any:
    """Weights that make attention peaked and every norm, bias and expert matter; logits near 1."""
    rng = np.random.default_rng(0)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        scale = 0.3 if array.ndim == 1 else 1.0 if "embed" in name else array.shape[-1] ** -0.5
        weights.append((name, mx.array(rng.normal(0, scale, array.shape).astype(np.float32))))
    model.load_weights(weights)
    return model


def tokens(n: int, batch: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(1).integers(0, TEXT["vocab_size"], (batch, n)).astype(np.int32))


class FakeGroup:
    """One process of a group that isn't there."""

    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size
