"""Attention over selected key blocks in bounded memory: three forms of the same sum.

* :func:`.by_query.attend_by_query` gathers the chosen tokens of K and V for each query.  It moves the
  least for few queries.
* :func:`.by_pairs.attend_by_pairs` sorts the (query, block) pairs by block and multiplies each query
  group with its block in place.  It moves the least for many queries.
* :func:`.densely.attend_densely` is the fused attention over all keys with a mask of the chosen blocks.
  It computes more, at the rate of the GPU's best kernel, and pays in short contexts.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from .by_pairs import attend_by_pairs, pairs_fit
from .by_query import attend_by_query
from .common import KeysValues, Offset, Padding, Quantized, default_tile_bytes, on_gpu
from .densely import attend_densely

FORMS: dict[str, Callable[..., mx.array]] = {
    "by_query": attend_by_query,
    "by_pairs": attend_by_pairs,
    "densely": attend_densely,
}


def attend(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Offset,
    left_padding: Padding = None,
    *,
    block_size: int,
    scale: float,
    tile_bytes: int | None = None,
    form: str | None = None,
) -> mx.array:
    """Softmax attention of every query over the visible keys of its blocks (paper, eq. 8).

    Query head ``j`` belongs to group ``j // (H // G)`` and reads that group's K and V.

    Args:
        queries: ``[B, H, L, D]``.
        keys: ``[B, G, S, D]``, an array or :class:`Quantized`.  May include unused slots after
            the last token.  No copy is made if S is a multiple of ``block_size``.
        values: ``[B, G, S, Dv]``, likewise.
        block_ids: ``[B, G, L, k]`` int32 from :func:`.select.select_blocks`; -1 is skipped.
        offset: content position of the first query; for each row where ``left_padding`` is given.
        left_padding: cache slots before each row's first token, or None.
        block_size: keys per block.
        scale: factor of the dot products, ``D ** -0.5`` in M3.
        tile_bytes: bytes that the intermediate arrays of a tile may take; see ``common``.
        form: a key of ``FORMS``; None for the one that :func:`choose_form` expects to be the fastest.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``queries``; the softmax is accumulated in float32.
        Rows of padding queries are finite and without meaning.
    """
    tile_bytes = tile_bytes or default_tile_bytes()
    if form is None:
        work = Work.of(queries, keys, values, block_ids, block_size, left_padding is not None)
        form = choose_form(work, tile_bytes, rates_here() if on_gpu() else CPU)
    attended = FORMS[form](
        queries, keys, values, block_ids, offset, left_padding, block_size, scale, tile_bytes
    )
    return attended.astype(queries.dtype)


class Work(NamedTuple):
    """Sizes of one call: rows, heads, groups, queries, slots, chosen tokens, channels, bytes of a number.

    Padded rows go one after the other where blocks must stand in place.
    """

    rows: int
    heads: int
    groups: int
    length: int
    n_slots: int
    n_chosen: int
    channels: int
    itemsize: float
    is_quantized: bool
    is_padded: bool = False

    @classmethod
    def of(
        cls,
        queries: mx.array,
        keys: KeysValues,
        values: KeysValues,
        block_ids: mx.array,
        block_size: int,
        is_padded: bool = False,
    ) -> "Work":
        return cls(
            rows=queries.shape[0],
            heads=queries.shape[1],
            groups=keys.shape[1],
            length=queries.shape[2],
            n_slots=keys.shape[2],
            n_chosen=block_ids.shape[3] * block_size,
            channels=keys.shape[-1] + values.shape[-1],
            itemsize=queries.dtype.size if isinstance(keys, Quantized) else keys.dtype.size,
            is_quantized=isinstance(keys, Quantized),
            is_padded=is_padded,
        )


class Rates(NamedTuple):
    """Bytes, and operations of grouped products and of the fused attention, in a second; seconds a launch."""

    bytes: float
    grouped: float
    fused: float
    launch: float


# M3 Ultra: its memory's rate, and what was measured of MLX's products there (docs/benchmarks/gpu_cost.md).
GPU = Rates(bytes=819e9, grouped=9.5e12, fused=16.5e12, launch=4e-6)
# M5 Max, whose matrix units MLX's own products and fused attention in 16 bits can use.
GPU_WITH_MATRIX_UNITS = Rates(bytes=614e9, grouped=5e12, fused=55e12, launch=4e-6)
# One core, as measured by benchmarks/attention_forms.py.
CPU = Rates(bytes=8e9, grouped=6e9, fused=3.5e9, launch=2e-4)


@cache
def rates_here() -> Rates:
    """Of this machine's GPU, by its generation."""
    device_info = getattr(mx, "device_info", None) or mx.metal.device_info
    generation = re.search(r"applegpu_g(\d+)", str(device_info().get("architecture", "")))
    return GPU_WITH_MATRIX_UNITS if generation and int(generation[1]) >= 17 else GPU


def choose_form(work: Work, tile_bytes: int, rates: Rates) -> str:
    """The form of ``FORMS`` with the shortest expected time, from bytes and arithmetic."""
    seconds = expected_seconds(work, rates)
    of_a_row, gpu = work.n_slots * work.channels, rates is not CPU
    if not pairs_fit(of_a_row, work.itemsize, work.is_quantized, work.is_padded, tile_bytes, gpu):
        del seconds["by_pairs"]
    return min(seconds, key=seconds.__getitem__)


def expected_seconds(work: Work, rates: Rates) -> dict[str, float]:
    """What each form moves and computes, at these rates."""
    queries = work.rows * work.length
    turns = work.rows if work.is_padded else 1
    # Scores or weights of every head and chosen key, and as many partial outputs, float32.
    pass_bytes = 4 * queries * work.heads * work.n_chosen
    products = 2 * queries * work.heads * work.channels
    group_channels = work.rows * work.groups * work.channels
    # Written by the gather, read by it and by the attention.
    gathered = 3 * queries * work.groups * work.n_chosen * work.channels * work.itemsize
    casts = (
        0 if work.itemsize == 4 or work.is_quantized else group_channels * work.n_slots * (work.itemsize + 8)
    )
    seconds = {
        "by_query": gathered / rates.bytes + products * work.n_chosen / rates.fused + 5 * rates.launch,
        "by_pairs": (11 * pass_bytes + casts) / rates.bytes
        + products * work.n_chosen / rates.grouped
        + 30 * work.groups * turns * rates.launch,
    }
    if not work.is_quantized:
        mask = 3 * queries * work.groups * work.n_slots
        keys_values = group_channels * work.n_slots * work.itemsize
        seconds["densely"] = (
            (mask + keys_values) / rates.bytes
            + products * work.n_slots / rates.fused
            + 7 * turns * rates.launch
        )
    return seconds
