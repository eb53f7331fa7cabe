"""Attention over selected key blocks in bounded memory: three forms of the same sum.

* :func:`attend_by_query` gathers the chosen tokens of K and V for each query.  It moves the least for few
  queries.
* :func:`.by_pairs.attend_by_pairs` sorts the (query, block) pairs by block and multiplies each query
  group with its block in place.  It moves the least for many queries.
* :func:`attend_densely` is the fused attention over all keys with a mask of the chosen blocks.  It computes
  more, at the rate of the GPU's best kernel, and pays in short contexts.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from .by_pairs import attend_by_pairs, blocks_of, pairs_fit, whole_blocks
from .common import (
    Chosen,
    KeysValues,
    Offset,
    Padding,
    Quantized,
    arange,
    default_tile_bytes,
    fused,
    in_sequence,
    joined,
    later,
    map_arrays,
    on_gpu,
    over_queries,
    over_rows,
    query_positions,
)


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
    chosen = Chosen(keys, values, block_ids, offset, left_padding, block_size, scale)
    tile_bytes = tile_bytes or default_tile_bytes()
    form = form or choose_form(Work.of(queries, chosen), tile_bytes, rates_here() if on_gpu() else CPU)
    return FORMS[form](queries, chosen, tile_bytes).astype(queries.dtype)


# --- which form ---


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
    def of(cls, queries: mx.array, chosen: Chosen) -> "Work":
        keys = chosen.keys
        return cls(
            rows=queries.shape[0],
            heads=queries.shape[1],
            groups=keys.shape[1],
            length=queries.shape[2],
            n_slots=keys.shape[2],
            n_chosen=chosen.block_ids.shape[3] * chosen.block_size,
            channels=keys.shape[-1] + chosen.values.shape[-1],
            itemsize=queries.dtype.size if isinstance(keys, Quantized) else keys.dtype.size,
            is_quantized=isinstance(keys, Quantized),
            is_padded=chosen.left_padding is not None,
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
    generation = re.search(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
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


# --- their tokens gathered for each query ---


def attend_by_query(queries: mx.array, chosen: Chosen, tile_bytes: int) -> mx.array:
    """As :func:`attend`, for any alignment of the rows in the cache."""
    keys, values, block_ids, offset, left_padding, block_size, scale = chosen
    batch, _, _, dims = queries.shape
    groups, n_slots = keys.shape[1:3]
    n_tokens = block_ids.shape[3] * block_size
    # Every row and group is an entry: where it begins, with all of them put one after the other, its first
    # position and its padding.
    n_entries = batch * groups
    begins = [entry * n_slots for entry in range(n_entries)]
    offsets = offset if isinstance(offset, int) else [first for first in offset for _ in range(groups)]
    paddings = [padding for padding in left_padding or [0] * batch for _ in range(groups)]
    ids_of_entries = block_ids.flatten(0, 1)[..., None]

    bytes_per_query = n_tokens * (keys.shape[-1] + values.shape[-1]) * _bytes_of_a_number(keys)
    per_tile = min(n_entries, max(1, tile_bytes // bytes_per_query))
    tile_length = max(1, tile_bytes // (per_tile * bytes_per_query))

    def attend_entries(first: int, of_entries: mx.array) -> mx.array:
        several = slice(first, first + per_tile)
        begin, padding = (mx.array(x[several]).reshape(-1, 1, 1, 1) for x in (begins, paddings))
        first_query = offsets if isinstance(offsets, int) else offsets[several]

        def attend_tile(start: int, tile: mx.array) -> mx.array:
            n, heads, length, _ = tile.shape
            ids = ids_of_entries[several, start : start + tile_length]
            query_at = query_positions(later(first_query, start), length).swapaxes(1, 2)
            last_slot = mx.array(n_slots - 1)
            slots, visible = _slots(ids, arange(block_size), query_at, padding, begin, last_slot, block_size)
            # The tokens are gathered after the tile before, which the queries depend on.
            slots = mx.stop_gradient(mx.depends(slots.flatten(), tile))
            k, v = (_take_tokens(x, slots).reshape(n * length, 1, n_tokens, -1) for x in (keys, values))
            q = tile.swapaxes(1, 2).reshape(n * length, heads, 1, dims)
            if not on_gpu():
                # MLX's CPU backend computes in the precision of its inputs.
                q, k, v = (x.astype(mx.float32) for x in (q, k, v))
            mask = visible.reshape(n * length, 1, 1, -1)
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
            return out.reshape(n, length, heads, -1).swapaxes(1, 2)

        return over_queries(attend_tile, of_entries, tile_length)

    of_entries = mx.unflatten(queries, 1, (groups, -1)).flatten(0, 1)
    tiles = [(first, of_entries[first : first + per_tile]) for first in range(0, n_entries, per_tile)]
    out = joined(in_sequence(attend_entries, tiles), axis=0)
    return mx.unflatten(out, 0, (batch, groups)).flatten(1, 2)


def _bytes_of_a_number(keys: KeysValues) -> int:
    """Of a gathered number and its copies, twice: MLX allocates ahead of what it computes."""
    if on_gpu():
        return 2 * 4
    itemsize, gathered = (keys.scales.dtype.size, 1) if isinstance(keys, Quantized) else (keys.dtype.size, 0)
    return 2 * (gathered + itemsize + (4 if itemsize < 4 else 0))


@fused
def _slots(
    ids: mx.array,
    token: mx.array,
    query_at: mx.array,
    padding: mx.array,
    begin: mx.array,
    last_slot: mx.array,
    block_size: int,
) -> tuple[mx.array, mx.array]:
    """Places of the chosen tokens ``[entries, l, k, block_size]``, and which of them a query sees."""
    positions = ids * block_size + token
    # A padding query sees everything: a softmax over nothing is NaN, and NaN in K or V spreads.
    visible = ((positions >= 0) & (positions <= query_at)) | (query_at < 0)
    return begin + mx.clip(positions + padding, 0, last_slot), visible


def _take_tokens(x: KeysValues, slots: mx.array) -> mx.array:
    """Tokens ``[n, D]`` at these places of ``[B, G, S, D]``; dequantized."""

    def take(a: mx.array) -> mx.array:
        return mx.take(a.flatten(0, 2), slots, axis=0)

    taken = map_arrays(take, x)
    return taken.dequantize() if isinstance(taken, Quantized) else taken


# --- all keys with a mask ---


def attend_densely(queries: mx.array, chosen: Chosen, tile_bytes: int) -> mx.array:
    """As :func:`attend`.  Padded rows go one after the other."""
    if chosen.left_padding is not None:
        return over_rows(lambda row, of_row: attend_densely(of_row, chosen.of_row(row), tile_bytes), queries)
    batch, n_heads, length, _ = queries.shape
    keys, values, block_ids, offset, _, block_size, scale = chosen
    assert isinstance(offset, int)
    groups = keys.shape[1]
    n_blocks = blocks_of(offset + length, block_size)
    k, v = (x.dequantize() if isinstance(x, Quantized) else x for x in (keys, values))
    k, v = (whole_blocks(x, n_blocks * block_size).flatten(0, 1)[:, None] for x in (k, v))
    if not on_gpu():
        # MLX's CPU backend computes in the precision of its inputs.
        queries, k, v = (x.astype(mx.float32) for x in (queries, k, v))
    # The mask and the blocks it is made of.
    tile_length = max(1, tile_bytes // (3 * batch * groups * n_blocks * block_size))

    def attend_tile(start: int, tile: mx.array) -> mx.array:
        ids = block_ids[:, :, start : start + tile_length]
        member = mx.zeros((*ids.shape[:-1], n_blocks + 1), dtype=mx.bool_)
        # One column more than there are blocks takes the unused slots.
        member = mx.put_along_axis(member, mx.where(ids < 0, n_blocks, ids), mx.array(True), axis=-1)
        query_at = query_positions(offset + start, tile.shape[2])
        mask = _mask(
            member[..., :n_blocks, None],
            arange(block_size),
            arange(n_blocks)[:, None],
            query_at[..., None],
            block_size,
        )
        # One group at a time along the batch axis, so that its heads share one mask.
        tile = tile.reshape(batch * groups, n_heads // groups, tile.shape[2], -1)
        mask = mask.reshape(batch * groups, 1, tile.shape[2], -1)
        out = mx.fast.scaled_dot_product_attention(tile, k, v, scale=scale, mask=mask)
        return out.reshape(batch, n_heads, tile.shape[2], -1)

    return over_queries(attend_tile, queries, tile_length)


@fused
def _mask(
    member: mx.array, token: mx.array, block: mx.array, query_at: mx.array, block_size: int
) -> mx.array:
    visible = block * block_size + token <= query_at
    # A softmax over nothing is NaN, and a NaN in a padded row would spread through K and V.
    return (member & visible) | (query_at < 0)


# Each takes queries, what they attend to, and the bytes of a tile.
FORMS: dict[str, Callable[[mx.array, Chosen, int], mx.array]] = {
    "by_query": attend_by_query,
    "by_pairs": attend_by_pairs,
    "densely": attend_densely,
}
