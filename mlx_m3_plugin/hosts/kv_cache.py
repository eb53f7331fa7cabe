"""Requests to quantize K and V, as both libraries make them after every step."""

from typing import Any


def check_same_bits(held: Any, group_size: int, bits: int) -> None:
    """Compare what is asked for with ``held``, K and V that are quantized already.

    Raises:
        ValueError: they have other bits or another group size, which nothing could change any more.
    """
    if (held.bits, held.group_size) != (bits, group_size):
        raise ValueError(
            f"this prompt cache holds K and V in {held.bits} bits with a group size of {held.group_size}, "
            f"not in {bits} bits with {group_size}: give --kv-bits {held.bits} --kv-group-size "
            f"{held.group_size}, leave --kv-bits out, or make the cache anew"
        )
