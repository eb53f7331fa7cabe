"""The prompt cache of a layer: upstream's classes, in upstream's arrangement.

A layer's entry is ``CacheList(KVCache)``, with a second ``KVCache`` on sparse layers that holds
the index keys as its keys, and values that nothing reads.  mlx-lm restores saved caches by the
class names in ``mlx_lm.models.cache``, so files move freely between its M3 class and ours.
"""

import sys
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as upstream
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from mlx_m3_plugin.hosts.kv_cache import check_same_bits
from mlx_m3_plugin.model.host import KeysValues, Quantized

# Upstream's M3 class gives the index cache values of width 0.  Before mlx-lm 0.32 (where caches
# had a ``meta_state``) mlx could not write such an array into a saved prompt cache.
_INDEX_VALUE_WIDTH = 1 if hasattr(KVCache, "meta_state") else 0


class CacheList(upstream.CacheList):
    """Upstream's ``CacheList``, which ``--kv-bits`` passes over, made to take part in it.

    The name is upstream's on purpose: it is what a saved cache is restored by.
    """

    @property
    def offset(self) -> Any:
        """Tokens so far; ``maybe_quantize_kv_cache`` compares it with ``--quantized-kv-start``.

        A cache that is quantized is past any start, so that a request for other bits is refused at once.
        """
        keys_values = self.caches[0]
        return sys.maxsize if isinstance(keys_values, QuantizedKVCache) else keys_values.offset

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "CacheList":
        """K and V quantized; the index keys stay as they are, for they decide what is attended to.

        Raises:
            ValueError: ``group_size`` does not divide the head size, or they are quantized otherwise.
        """
        keys_values, *index = self.caches
        if isinstance(keys_values, QuantizedKVCache):
            check_same_bits(keys_values, group_size, bits)
            return self
        head_dim = group_size if keys_values.keys is None else keys_values.keys.shape[-1]
        if head_dim % group_size:
            raise ValueError(
                f"a KV group size of {group_size} does not divide this model's head size of {head_dim}; "
                "try --kv-group-size 32"
            )
        return CacheList(keys_values.to_quantized(group_size=group_size, bits=bits), *index)


def make_layer_cache(is_sparse_attention: bool) -> CacheList:
    return CacheList(KVCache(), KVCache()) if is_sparse_attention else CacheList(KVCache())


def adopt(caches: list[Any]) -> None:
    """Give entries that upstream restored or made (from a file, from its M3 class) our methods."""
    for entry in caches:
        if type(entry) is upstream.CacheList:
            entry.__class__ = CacheList


def offset(cache: CacheList | None) -> Any:
    if cache is None:
        return 0
    tokens = cache[0].offset
    # A copy: before mlx-lm 0.32 batch caches move their offsets in place.
    return tokens if isinstance(tokens, int) else tokens + 0


def left_padding(cache: CacheList | None) -> mx.array | None:
    return None if cache is None else getattr(cache[0], "left_padding", None)


def append_keys_values(cache: CacheList | None, keys: mx.array, values: mx.array) -> Any:
    if cache is None:
        return keys, values
    if len(cache.caches) > 1:
        # Below the block budget nothing reads the index keys, and nothing ever reads their values:
        # left alone they pile up as unevaluated graph until Metal runs out of buffers.
        keys = mx.depends(keys, [cache[1].keys, cache[1].values])
    return cache[0].update_and_fetch(keys, values)


def append_index_keys(cache: CacheList | None, index_keys: mx.array) -> mx.array:
    if cache is None:
        return index_keys
    unread = mx.zeros((*index_keys.shape[:-1], _INDEX_VALUE_WIDTH), index_keys.dtype)
    return cache[1].update_and_fetch(index_keys, unread)[0]


def buffers(cache: CacheList | None, keys: mx.array, values: mx.array) -> tuple[KeysValues, KeysValues]:
    """All slots of the cache, with those to spare; cutting them off would cost a copy later."""
    if cache is None:
        return keys, values
    held = cache[0]
    if isinstance(held, QuantizedKVCache):
        settings = held.group_size, held.bits
        return Quantized(*held.keys, *settings), Quantized(*held.values, *settings)  # type: ignore[call-arg]
    return held.keys, held.values


def keep_in_graph(cache: CacheList | None, arrays: list[mx.array]) -> None:
    if cache is None:
        return
    if isinstance(cache[0], QuantizedKVCache):
        cache[0].keys = tuple(mx.depends(list(cache[0].keys), arrays))
    else:
        cache[0].keys = mx.depends(cache[0].keys, arrays)
