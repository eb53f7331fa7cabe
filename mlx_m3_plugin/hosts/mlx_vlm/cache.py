"""The prompt cache of a layer: upstream's classes, made to take part in more of what upstream offers.

Dense layers have a plain ``KVCache``, sparse ones a ``MiniMaxM3KVCache``, which holds the index
keys beside K and V.  mlx-vlm's prefix cache on disk knows that class by its name and module, so
ours keeps both; entries move freely between upstream's M3 class and ours.
"""

from typing import Any

import mlx.core as mx
from mlx_vlm.models.cache import KVCache, QuantizedKVCache

from mlx_m3_plugin.hosts.kv_cache import quantized

from . import parts

upstream: Any = parts.upstream("language")


class MiniMaxM3KVCache(upstream.MiniMaxM3KVCache):
    """Upstream's cache of a sparse layer, with ``to_quantized`` and what older callers reach for."""

    __module__ = upstream.__name__

    # mlx-vlm before 0.7 trims a reused cache through these.
    @property
    def keys(self) -> mx.array | None:
        return self.kv_cache.keys

    @keys.setter
    def keys(self, value: mx.array | None) -> None:
        self.kv_cache.keys = value

    @property
    def values(self) -> mx.array | None:
        return self.kv_cache.values

    @values.setter
    def values(self, value: mx.array | None) -> None:
        self.kv_cache.values = value

    @classmethod
    def merge(cls, caches: Any, prefix_lens: Any = None) -> Any:
        # In this very class: the prefix cache looks into its __dict__.
        return upstream.MiniMaxM3BatchKVCache.merge(caches, prefix_lens=prefix_lens)

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "QuantizedMiniMaxM3KVCache":
        """K and V quantized; the index keys stay as they are, for they decide what is attended to.

        Raises:
            ValueError: see :func:`.kv_cache.quantized`.
        """
        made = QuantizedMiniMaxM3KVCache()
        made.kv_cache = quantized(self.kv_cache, group_size, bits)
        made.index_keys, made.index_offset = self.index_keys, self.index_offset
        return made


class QuantizedMiniMaxM3KVCache(upstream.MiniMaxM3KVCache):
    """With K and V in a ``QuantizedKVCache``; the prefix cache takes it whole, by a snapshot.

    Under another name, because what upstream does by the first one slices plain arrays.
    """

    # No batch form: upstream has none for quantized caches of this kind, and asks with hasattr.
    to_batch = property()

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "QuantizedMiniMaxM3KVCache":
        """Itself.

        Raises:
            ValueError: it has other bits or another group size.
        """
        quantized(self.kv_cache, group_size, bits)
        return self

    def prefix_cache_snapshot(self) -> dict[str, Any]:
        held = self.kv_cache
        index = None if self.index_keys is None else self.index_keys[..., : self.index_offset, :]
        return {"kv": held.state, "meta": (held.group_size, held.bits, held.offset), "index": index}

    def prefix_cache_restore(self, snapshot: dict[str, Any]) -> None:
        group_size, bits, offset = snapshot["meta"]
        self.kv_cache = QuantizedKVCache(group_size=group_size, bits=bits)
        self.kv_cache.keys, self.kv_cache.values = map(tuple, snapshot["kv"])
        self.kv_cache.offset = offset
        self.index_keys = snapshot["index"]
        self.index_offset = 0 if self.index_keys is None else self.index_keys.shape[2]


def make_layer_cache(is_sparse_attention: bool) -> Any:
    return MiniMaxM3KVCache() if is_sparse_attention else KVCache()


def adopt(caches: list[Any]) -> None:
    """Give entries that upstream restored or extracted our methods."""
    for entry in caches:
        if type(entry) is upstream.MiniMaxM3KVCache:
            entry.__class__ = MiniMaxM3KVCache


def kv_cache(entry: Any) -> Any:
    """The part of an entry that holds K and V; None for None."""
    return getattr(entry, "kv_cache", entry)


def append_index_keys(entry: Any, index_keys: mx.array) -> tuple[mx.array, list[mx.array]]:
    return entry.update_index_and_fetch(index_keys), [entry.index_keys]
