"""Attention to the chosen blocks, their tokens gathered for each query."""

import mlx.core as mx

from .common import (
    KeysValues,
    Offset,
    Padding,
    Quantized,
    arange,
    fused,
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
    batch, n_heads, _, dims = queries.shape
    groups, n_slots = keys.shape[1:3]
    n_tokens = block_ids.shape[3] * block_size
    # The gathered keys and values of each group, and their casts.
    bytes_per_query = 2 * 4 * batch * groups * n_tokens * (keys.shape[-1] + values.shape[-1])
    tile_length = max(1, tile_bytes // bytes_per_query)
    paddings = [0] * batch if left_padding is None else left_padding
    padding = mx.array(paddings, mx.int32).reshape(batch, 1, 1, 1)
    # Where a row and group begin, with all of them put one after the other.
    begin = mx.array([i * n_slots for i in range(batch * groups)], mx.int32).reshape(batch, groups, 1, 1)

    def attend_tile(start: int, tile: mx.array) -> mx.array:
        length = tile.shape[2]
        ids = block_ids[:, :, start : start + tile_length, :, None]
        query_at = query_positions(later(offset, start), length)
        slots, visible = _slots(
            ids, arange(block_size), query_at[..., None], padding[..., None], begin[..., None],
            mx.array(n_slots - 1),
        )  # fmt: skip
        slots = slots.flatten()
        k, v = (_take_tokens(x, slots) for x in (keys, values))

        # Every (row, group, query) is a batch entry of its own with one KV head.
        entries = batch * groups * length
        grouped = mx.unflatten(tile, 1, (groups, -1)).swapaxes(2, 3).reshape(entries, -1, 1, dims)
        k, v = (x.reshape(entries, 1, n_tokens, -1) for x in (k, v))
        if not on_gpu():
            # MLX's CPU backend computes in the precision of its inputs.
            grouped, k, v = (x.astype(mx.float32) for x in (grouped, k, v))
        mask = visible.reshape(entries, 1, 1, -1)
        out = mx.fast.scaled_dot_product_attention(grouped, k, v, scale=scale, mask=mask)
        out = out.reshape(batch, groups, length, n_heads // groups, -1).swapaxes(2, 3)
        return out.reshape(batch, n_heads, length, -1)

    return over_queries(attend_tile, queries, tile_length)


@fused
def _slots(
    ids: mx.array,
    token: mx.array,
    query_at: mx.array,
    padding: mx.array,
    begin: mx.array,
    last_slot: mx.array,
) -> tuple[mx.array, mx.array]:
    """Places of the chosen tokens ``[B, G, l, k, block_size]``, and which of them a query sees."""
    positions = ids * token.size + token
    # A padding query sees everything: a softmax over nothing is NaN, and NaN in K or V spreads.
    visible = ((positions >= 0) & (positions <= query_at)) | (query_at < 0)
    return begin + mx.clip(positions + padding, 0, last_slot), visible


def _take_tokens(x: KeysValues, slots: mx.array) -> mx.array:
    """Tokens ``[n, D]`` at these places of ``[B, G, S, D]``; dequantized."""

    def take(a: mx.array) -> mx.array:
        return mx.take(a.flatten(0, 2), slots, axis=0)

    taken = map_arrays(take, x)
    return taken.dequantize() if isinstance(taken, Quantized) else taken
