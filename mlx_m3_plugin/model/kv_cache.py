"""K and V in a ``KVCache`` of the host: plain, quantized, of a batch, or None without a cache."""

from typing import Any

import mlx.core as mx

from ..msa import KeysValues, Quantized


def n_slots(cache: Any) -> int:
    """Slots in use, padding included."""
    if cache is None:
        return 0
    # A batch cache counts its rows' tokens in ``offset``.
    return cache._idx if is_batch(cache) else cache.offset


def is_batch(cache: Any) -> bool:
    return hasattr(cache, "left_padding")


def left_padding(cache: Any) -> list[int] | None:
    """Padding slots before each row's first token; None where there are none.

    The array changes when rows join or leave the batch.  Only then does this wait for its values.
    """
    paddings = cache.left_padding.tolist() if is_batch(cache) else []
    return paddings if any(paddings) else None


def bits_and_group_size(cache: Any) -> tuple[int, int]:
    """Of quantized K and V; ``(0, 0)`` if they are not quantized."""
    return (cache.bits, cache.group_size) if hasattr(cache, "bits") else (0, 0)


def append(cache: Any, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
    """Append ``[B, G, L, D]``.  Returns K and V of all tokens so far, for the host's attention."""
    return (keys, values) if cache is None else cache.update_and_fetch(keys, values)


def append_to_slots(cache: Any, keys: mx.array, values: mx.array) -> tuple[KeysValues, KeysValues]:
    """As :func:`append`.  Returns all slots, including unused ones at the end, for ``msa.attend``.

    Cutting those off would cost a copy later.
    """
    if cache is None:
        return keys, values
    cache.update_and_fetch(keys, values)
    if not _is_quantized(cache):
        return cache.keys, cache.values
    settings = cache.group_size, cache.bits
    return Quantized(*cache.keys, *settings), Quantized(*cache.values, *settings)  # type: ignore[call-arg]


def keep_in_graph(cache: Any, arrays: list[mx.array]) -> None:
    """Have ``arrays`` evaluated whenever the cache is."""
    if cache is None:
        return
    if _is_quantized(cache):
        cache.keys = tuple(mx.depends(list(cache.keys), arrays))
    else:
        cache.keys = mx.depends(cache.keys, arrays)


def _is_quantized(cache: Any) -> bool:
    return isinstance(cache.keys, (tuple, list))
