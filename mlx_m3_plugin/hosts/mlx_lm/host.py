"""mlx-lm as a :class:`~mlx_m3_plugin.model.host.Host`, and the caches it generates with.

The prompt cache is made of upstream's own classes, in the arrangement of upstream's M3
class: mlx-lm restores saved caches by the names in ``mlx_lm.models.cache``, so no other
class could be loaded again, and files move freely between the two model classes.
A layer's entry is ``CacheList(KVCache)``, with a second ``KVCache`` on sparse layers that
holds the index keys as its keys, and values that nothing reads.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import CacheList, KVCache
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_m3_plugin.model.host import Host

# Upstream's M3 class gives the index cache values of width 0.  Before mlx-lm 0.32 (where caches
# had a ``meta_state``) mlx could not write such an array into a saved prompt cache.
_INDEX_VALUE_WIDTH = 1 if hasattr(KVCache, "meta_state") else 0


def make_layer_cache(is_sparse_attention: bool) -> CacheList:
    return CacheList(KVCache(), KVCache()) if is_sparse_attention else CacheList(KVCache())


def attention_mask(hidden_states: mx.array, cache: CacheList | None) -> Any:
    return create_attention_mask(hidden_states, None if cache is None else cache[0])


def attention(
    queries: mx.array, keys: Any, values: Any, *, cache: CacheList | None, scale: float, mask: Any
) -> mx.array:
    kv_cache = None if cache is None else cache[0]
    return scaled_dot_product_attention(queries, keys, values, cache=kv_cache, scale=scale, mask=mask)


def offset(cache: CacheList | None) -> Any:
    return 0 if cache is None else cache[0].offset


def left_padding(cache: CacheList | None) -> mx.array | None:
    return None if cache is None else getattr(cache[0], "left_padding", None)


def append_keys_values(cache: CacheList | None, keys: mx.array, values: mx.array) -> Any:
    if cache is None:
        return keys, values
    keys_values = cache[0].update_and_fetch(keys, values)
    if len(cache.caches) > 1:
        # Below the block budget nothing reads the index keys, and their empty values never
        # are: left alone they pile up as unevaluated graph until Metal runs out of buffers.
        keep_in_graph(cache, [cache[1].keys, cache[1].values])
    return keys_values


def append_index_keys(cache: CacheList | None, index_keys: mx.array) -> mx.array:
    if cache is None:
        return index_keys
    unread = mx.zeros((*index_keys.shape[:-1], _INDEX_VALUE_WIDTH), index_keys.dtype)
    return cache[1].update_and_fetch(index_keys, unread)[0]


def keep_in_graph(cache: CacheList | None, arrays: list[mx.array]) -> None:
    if cache is not None:
        cache[0].keys = mx.depends(cache[0].keys, arrays)


MLX_LM = Host(
    SwitchGLU=SwitchGLU,
    initialize_rope=initialize_rope,
    attention_mask=attention_mask,
    attention=attention,
    offset=offset,
    left_padding=left_padding,
    append_keys_values=append_keys_values,
    append_index_keys=append_index_keys,
    keep_in_graph=keep_in_graph,
)
