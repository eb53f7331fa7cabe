"""What the model takes from the library it runs in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..msa import KeysValues, Quantized

__all__ = ["Host", "KeysValues", "Quantized"]


@dataclass(frozen=True)
class Host:
    """The classes and functions of mlx-lm or mlx-vlm that the model is built from.

    Both libraries own their caches and expert layers, and their tools test for them (LoRA,
    quantization, prefix caches, expert offload), so the model uses the host's own.
    ``cache`` below is one layer's entry of the host's prompt cache, or None.

    Attributes:
        SwitchGLU: ``(input_dims, hidden_dims, num_experts, activation)`` -> expert layer.
        initialize_rope: ``(dims, base, traditional, scaling_config, max_position_embeddings)``.
        attention_mask: ``(hidden_states [B, L, D], cache)`` -> None, ``"causal"`` or bool array.
        attention: fused ``(queries, keys, values, cache, scale, mask)`` -> ``[B, H, L, D]``.
        adopt: ``(prompt cache)``; entries that the host made itself are prepared for use.
        offset: ``(cache)`` -> content position of the next token; an int, or ``[B]`` int32.
        left_padding: ``(cache)`` -> padding slots before each row's first token, ``[B]`` or None.
        append_index_keys: ``(cache, index_keys [B, 1, L, D])`` -> all index keys so far.
        append_keys_values: ``(cache, keys, values)`` -> all keys and values so far; comes second.
        buffers: ``(cache, keys, values)`` -> all slots of K and V, with those not yet used.
        keep_in_graph: ``(cache, arrays)``; evaluating the cache shall evaluate these too.
    """

    SwitchGLU: Callable[..., nn.Module]
    initialize_rope: Callable[..., nn.Module]
    attention_mask: Callable[[mx.array, Any], Any]
    attention: Callable[..., mx.array]
    adopt: Callable[[Any], None]
    offset: Callable[[Any], Any]
    left_padding: Callable[[Any], mx.array | None]
    append_keys_values: Callable[[Any, mx.array, mx.array], Any]
    append_index_keys: Callable[[Any, mx.array], mx.array]
    buffers: Callable[[Any, mx.array, mx.array], tuple[KeysValues, KeysValues]]
    keep_in_graph: Callable[[Any, list[mx.array]], None]
