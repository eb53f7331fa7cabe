"""Attention to all keys with a mask of the chosen blocks, by the fused attention of ``mx.fast``."""

import mlx.core as mx

from .by_pairs import blocks_of, whole_blocks
from .common import (
    KeysValues,
    Offset,
    Padding,
    Quantized,
    arange,
    attend_row_by_row,
    fused,
    on_gpu,
    over_queries,
    query_positions,
)


def attend_densely(
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
    """As :func:`.attend.attend`.  Padded rows go one after the other."""
    if left_padding is None:
        assert isinstance(offset, int)
        return _attend(queries, keys, values, block_ids, offset, block_size, scale, tile_bytes)
    settings = block_size, scale, tile_bytes
    return attend_row_by_row(_attend, queries, keys, values, block_ids, offset, left_padding, *settings)


def _attend(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: int,
    block_size: int,
    scale: float,
    tile_bytes: int,
) -> mx.array:
    batch, n_heads, length, _ = queries.shape
    groups = keys.shape[1]
    n_blocks = blocks_of(offset + length, block_size)
    k, v = (whole_blocks(x, n_blocks * block_size) for x in (keys, values))
    k, v = (x.dequantize() if isinstance(x, Quantized) else x for x in (k, v))
    k, v = (x.flatten(0, 1)[:, None] for x in (k, v))
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
