"""The prompt cache of a layer: upstream's classes, extended for more of upstream's features.

Dense layers have a plain ``KVCache``, sparse ones a ``MiniMaxM3KVCache``, which holds the index
keys beside K and V.  mlx-vlm's prefix cache on disk knows that class by its name and module, so
ours keeps both; entries move freely between upstream's M3 class and ours.
"""

from typing import Any

import mlx.core as mx
from mlx_vlm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from mlx_m3_plugin.hosts.kv_cache import quantized
from mlx_m3_plugin.model.kv_cache import is_batch, n_slots

from . import parts

upstream: Any = parts.upstream("language")


def _of_kv_cache(name: str) -> Any:
    """An attribute of the ``kv_cache`` of an entry."""
    return property(
        lambda entry: getattr(entry.kv_cache, name), lambda entry, value: setattr(entry.kv_cache, name, value)
    )


class MiniMaxM3KVCache(upstream.MiniMaxM3KVCache):
    """Upstream's cache of a sparse layer, with ``to_quantized`` and attributes for older callers."""

    __module__ = upstream.__name__

    # A reused cache was trimmed through these.  until: mlx-vlm 0.7
    keys, values = _of_kv_cache("keys"), _of_kv_cache("values")

    @classmethod
    def merge(cls, caches: Any, prefix_lens: Any = None) -> Any:
        # Defined in this class because the prefix cache looks into its __dict__.
        return upstream.MiniMaxM3BatchKVCache.merge(caches, prefix_lens=prefix_lens)

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "QuantizedMiniMaxM3KVCache":
        """K and V quantized; the index keys stay as they are, because they select the blocks.

        Raises:
            ValueError: see :func:`.kv_cache.quantized`.
        """
        made = QuantizedMiniMaxM3KVCache()
        made.kv_cache = quantized(self.kv_cache, group_size, bits)
        made.index_keys, made.index_offset = self.index_keys, self.index_offset
        return made


class QuantizedMiniMaxM3KVCache(upstream.MiniMaxM3KVCache):
    """With K and V in a ``QuantizedKVCache``; the prefix cache takes it whole, by a snapshot.

    It has another name, because upstream's code for the first name slices plain arrays.
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
    """Make entries that upstream restored or extracted instances of our class."""
    for entry in caches:
        if type(entry) is upstream.MiniMaxM3KVCache:
            entry.__class__ = MiniMaxM3KVCache


def kv_cache(entry: Any) -> Any:
    """The part of an entry that holds K and V; None for None."""
    return getattr(entry, "kv_cache", entry)


def append_index_keys(entry: Any, index_keys: mx.array) -> tuple[mx.array, list[mx.array]]:
    return entry.update_index_and_fetch(index_keys), [entry.index_keys]


# --- padding masks, which become part of the cache ---


def add_padding(cache: list[Any], mask: mx.array, shape: tuple[int, ...]) -> None:
    """Give a prompt cache the padding of the next tokens ``[B, L]``.

    Args:
        cache: an empty one becomes, in place, that of a batch whose rows are padded on the left.
        mask: ``[B, L]``, or ``[B, S + L]`` with the ``S`` slots that the cache holds; 1 for tokens,
            0 for padding.
        shape: ``(B, L)``.

    Raises:
        ValueError: the mask has another shape or other values, or it has padding that the cache
            cannot have: on the right, between tokens, or before tokens that it holds already.
    """
    batch, length = shape
    first = kv_cache(cache[0])
    held, padding = n_slots(first), first.left_padding if is_batch(first) else None
    tokens = _tokens(mask, (batch, length), (batch, held + length))
    slots = mx.arange(held + length - mask.shape[1], held + length)
    if (tokens == (slots >= (0 if padding is None else padding[:, None]))).all().item():
        return
    if padding is not None or held > 0:
        raise ValueError(
            "the mask does not fit the padding that the cache has for its tokens; give the mask with the "
            "first tokens of a prompt, or leave it out"
        )
    left = mx.argmax(tokens, axis=1)
    if (tokens != (slots >= left[:, None])).any().item():
        raise ValueError(
            "with a cache, MiniMax-M3 supports padding on the left only, and needs a token in every row"
        )
    cache[:] = batch_caches(cache, left.tolist())


def cache_for_padding(empty: list[Any], mask: mx.array, shape: tuple[int, ...]) -> list[Any] | None:
    """A cache for one run of tokens ``[B, L]``, to be dropped afterwards; None if nothing sees padding.

    Raises:
        ValueError: the mask is not ``[B, L]``, has other values than 1 for tokens and 0 for padding,
            or has padding between tokens.
    """
    tokens = _tokens(mask, shape)
    slots, left = mx.arange(shape[1]), mx.argmax(tokens, axis=1)
    run = (slots >= left[:, None]) & (slots < (left + tokens.sum(axis=1))[:, None])
    if (run != tokens).any().item():
        raise ValueError("the mask of MiniMax-M3 must have one run of tokens per row, with padding around it")
    # Nothing sees padding on the right.
    return batch_caches(empty, left.tolist()) if left.any().item() else None


def batch_caches(empty: list[Any], left: Any) -> list[Any]:
    """Empty entries that replace these, for rows with ``left`` slots of padding, a list of ints.

    Raises:
        ValueError: an entry has no form for batches, as quantized ones have none.
    """
    made = []
    for entry in empty:
        if isinstance(entry, MiniMaxM3KVCache):
            made.append(entry.to_batch(left))
        elif type(entry) is KVCache:
            made.append(BatchKVCache(left))
        else:
            raise ValueError(
                f"a {type(entry).__name__} cannot hold padded rows of MiniMax-M3: leave the mask out and "
                "give one row at a time, or use a cache that is not quantized"
            )
    return made


def _tokens(mask: mx.array, *shapes: tuple[int, ...]) -> mx.array:
    """Where the mask has tokens: bool, of the mask's shape."""
    if mask.shape not in shapes:
        raise ValueError(
            f"the mask must have the shape [B, L], here {tuple(shapes[0])}, not {tuple(mask.shape)}"
        )
    tokens = mask == 1
    if not (tokens | (mask == 0)).all().item():
        raise ValueError("the mask must be 1 for tokens and 0 for padding, without other values")
    return tokens
