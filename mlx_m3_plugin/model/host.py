"""What the model takes from the library it runs in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Host:
    """The classes and functions of mlx-lm or mlx-vlm that the model is built from.

    Both libraries own their caches and expert layers, and their tools test for them (LoRA,
    quantization, prefix caches, expert offload), so the model uses the host's own.
    ``entry`` below is one layer's entry of the host's prompt cache, ``kv_cache`` the host's
    ``KVCache`` in it: plain, quantized, or of a batch.  ``kv_cache.py`` uses what these share.

    Attributes:
        SwitchGLU: ``(input_dims, hidden_dims, num_experts, activation)`` -> expert layer.
        initialize_rope: ``(dims, base, traditional, scaling_config, max_position_embeddings)``.
        attention_mask: ``(hidden_states [B, L, D], kv_cache)`` -> None, ``"causal"`` or bool array.
        attention: fused ``(queries, keys, values, cache=kv_cache, scale, mask)`` -> ``[B, H, L, D]``.
        kv_cache: ``(entry)`` -> its ``kv_cache``; None for None.
        append_index_keys: ``(entry, index_keys [B, 1, L, D])`` -> all index keys so far, and the
            arrays that the entry holds them in.
        adopt: ``(prompt cache)``; prepares entries that the host made itself.
    """

    SwitchGLU: Callable[..., nn.Module]
    initialize_rope: Callable[..., nn.Module]
    attention_mask: Callable[[mx.array, Any], Any]
    attention: Callable[..., mx.array]
    kv_cache: Callable[[Any], Any]
    append_index_keys: Callable[[Any, mx.array], tuple[mx.array, list[mx.array]]]
    adopt: Callable[[Any], None]
