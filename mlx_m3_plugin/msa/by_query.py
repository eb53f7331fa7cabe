"""Attention to the chosen blocks, their tokens gathered for each query."""

import mlx.core as mx

from .common import (
    KeysValues,
    Offset,
    Padding,
    Quantized,
    arange,
    fused,
    in_sequence,
    joined,
    later,
    map_arrays,
    on_gpu,
    over_queries,
    query_positions,
)


def attend_by_query(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Offset,
    left_padding: Padding,
    block_size: int,
    scale: float,
    tile_bytes: int,
) -> mx.array:
    """As :func:`.attend.attend`, for any alignment of the rows in the cache."""
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
