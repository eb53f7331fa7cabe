"""The prompt cache of a layer: upstream's classes, in upstream's arrangement.

A layer's entry is ``CacheList(KVCache)``, with a second ``KVCache`` on sparse layers that holds
the index keys as its keys, and values that nothing reads.  mlx-lm restores saved caches by the
class names in ``mlx_lm.models.cache``, so its M3 class and ours read each other's files.
"""

import sys
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as upstream
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from mlx_m3_plugin.hosts.kv_cache import quantized

# Upstream's M3 class gives the index cache values of width 0.  Older caches, with a ``meta_state``,
# could not save such an array.  until: mlx-lm 0.32
_INDEX_VALUE_WIDTH = 1 if hasattr(KVCache, "meta_state") else 0


class CacheList(upstream.CacheList):
    """Upstream's ``CacheList``, which ``--kv-bits`` skips, with K and V that can be quantized.

    It has upstream's name because saved caches are restored by it.
    """

    @property
    def offset(self) -> Any:
        """Tokens so far; ``maybe_quantize_kv_cache`` compares it with ``--quantized-kv-start``.

        A quantized cache is past any start, so that a request for other bits is refused at once.
        """
        keys_values = self.caches[0]
        return sys.maxsize if isinstance(keys_values, QuantizedKVCache) else keys_values.offset

    @offset.setter
    def offset(self, n_tokens: int) -> None:
        """As of a ``KVCache``: exo sets it wherever an entry has it, after trimming."""
        for held in self.caches:
            held.offset = n_tokens

    def trim(self, n: int) -> int:
        """Remove the last ``n`` tokens; none for a negative ``n``, with which drafts that are interrupted
        would bring back removed ones."""
        return super().trim(max(n, 0))

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "CacheList":
        """K and V quantized; the index keys stay as they are, because they select the blocks.

        Raises:
            ValueError: see :func:`.kv_cache.quantized`.
        """
        held, *index = self.caches
        made = quantized(held, group_size, bits)
        return self if made is held else CacheList(made, *index)


def make_layer_cache(is_sparse_attention: bool) -> CacheList:
    return CacheList(KVCache(), KVCache()) if is_sparse_attention else CacheList(KVCache())


def adopt(caches: list[Any]) -> None:
    """Make entries that upstream restored from a file, or its M3 class made, instances of our class."""
    for entry in caches:
        if type(entry) is upstream.CacheList:
            entry.__class__ = CacheList


def kv_cache(entry: CacheList | None) -> Any:
    return None if entry is None else entry[0]


def append_index_keys(entry: CacheList, index_keys: mx.array) -> tuple[mx.array, list[mx.array]]:
    index = entry[1]
    unread = mx.zeros((*index_keys.shape[:-1], _INDEX_VALUE_WIDTH), index_keys.dtype)
    return index.update_and_fetch(index_keys, unread)[0], [index.keys, index.values]
