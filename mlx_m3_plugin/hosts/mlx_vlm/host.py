"""mlx-vlm as a :class:`~mlx_m3_plugin.model.host.Host`."""

from typing import Any

import mlx.core as mx
from mlx_vlm.models.base import create_attention_mask, scaled_dot_product_attention

from mlx_m3_plugin.model.host import Host

from . import cache as caches
from . import parts


def attention_mask(hidden_states: mx.array, cache: Any) -> Any:
    return create_attention_mask(hidden_states, caches.keys_values(cache))


def attention(queries: mx.array, keys: Any, values: Any, *, cache: Any, scale: float, mask: Any) -> mx.array:
    """mlx-vlm's fused attention, for layers and steps that attend to everything.

    Raises:
        NotImplementedError: a batch with quantized K and V, of which mlx-vlm has no form for
            MiniMax-M3; 0.6.4 would go on with the wrong masks.
    """
    held = caches.keys_values(cache)
    if caches.left_padding(cache) is not None and "Quant" in type(held).__name__:
        raise NotImplementedError(
            "KV quantization in a batch is not there for MiniMax-M3: leave --kv-bits out, or send one "
            "request at a time"
        )
    return scaled_dot_product_attention(queries, keys, values, cache=held, scale=scale, mask=mask)


initialize_rope, SwitchGLU = parts.rope_and_experts()

MLX_VLM = Host(
    SwitchGLU=SwitchGLU,
    initialize_rope=initialize_rope,
    attention_mask=attention_mask,
    attention=attention,
    adopt=caches.adopt,
    offset=caches.offset,
    left_padding=caches.left_padding,
    append_keys_values=caches.append_keys_values,
    append_index_keys=caches.append_index_keys,
    buffers=caches.buffers,
    keep_in_graph=caches.keep_in_graph,
)
