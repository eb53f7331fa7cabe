"""Padding masks become part of the cache, which in MiniMax-M3 knows the slots that are padding."""

from typing import Any

import mlx.core as mx
from mlx_vlm.models.cache import BatchKVCache, KVCache

from mlx_m3_plugin.model import kv_cache

from . import cache as caches


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
    first = caches.kv_cache(cache[0])
    held = kv_cache.n_slots(first)
    padding = first.left_padding if kv_cache.is_batch(first) else None
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
            "with a cache, MiniMax-M3 takes padding on the left only, and a token in every row after it"
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
        raise ValueError("MiniMax-M3 takes a mask of one run of tokens per row, with padding around it")
    # Nothing sees padding on the right.
    return batch_caches(empty, left.tolist()) if left.any().item() else None


def batch_caches(empty: list[Any], left_padding: Any) -> list[Any]:
    """Empty entries that replace these, for rows with ``left_padding``, a list of ints.

    Raises:
        ValueError: an entry has no form for batches, as quantized ones have none.
    """
    made = []
    for entry in empty:
        if isinstance(entry, caches.MiniMaxM3KVCache):
            made.append(entry.to_batch(left_padding))
        elif type(entry) is KVCache:
            made.append(BatchKVCache(left_padding))
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
            f"MiniMax-M3 takes a mask of shape [B, L], here {tuple(shapes[0])}, not {tuple(mask.shape)}"
        )
    tokens = mask == 1
    if not (tokens | (mask == 0)).all().item():
        raise ValueError("MiniMax-M3 takes a mask of 1 for tokens and 0 for padding, not of other values")
    return tokens
