"""mlx-lm as a :class:`~mlx_m3_plugin.model.host.Host`."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_m3_plugin.model.host import Host

from . import cache as caches


def attention_mask(hidden_states: mx.array, cache: caches.CacheList | None) -> Any:
    return create_attention_mask(hidden_states, None if cache is None else cache[0])


def attention(
    queries: mx.array, keys: Any, values: Any, *, cache: caches.CacheList | None, scale: float, mask: Any
) -> mx.array:
    keys_values = None if cache is None else cache[0]
    return scaled_dot_product_attention(queries, keys, values, cache=keys_values, scale=scale, mask=mask)


MLX_LM = Host(
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
