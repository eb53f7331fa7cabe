"""Quantizing K and V, which both libraries ask for after every step."""

from typing import Any


def quantized(cache: Any, group_size: int, bits: int) -> Any:
    """A ``KVCache`` of either library as its ``QuantizedKVCache``; itself if it is one already.

    Raises:
        ValueError: ``group_size`` does not divide the head size; or K and V are quantized already
            with other bits or another group size, which cannot be changed any more.
    """
    if not hasattr(cache, "bits"):
        if cache.keys is not None and cache.keys.shape[-1] % group_size:
            raise ValueError(
                f"a KV group size of {group_size} does not divide this model's head size of "
                f"{cache.keys.shape[-1]}; try --kv-group-size 32"
            )
        return cache.to_quantized(group_size=group_size, bits=bits)
    if (cache.bits, cache.group_size) != (bits, group_size):
        raise ValueError(
            f"this prompt cache holds K and V in {cache.bits} bits with a group size of {cache.group_size}, "
            f"not in {bits} bits with {group_size}: give --kv-bits {cache.bits} --kv-group-size "
            f"{cache.group_size}, leave --kv-bits out, or make the cache anew"
        )
    return cache
