"""Attention to the chosen blocks as a mixture of key blocks.

A query group that attends to 16 of n blocks is a token routed to 16 of n experts: the (query, block)
pairs are sorted by block, and each query group is multiplied with its block in place, by MLX's grouped
matmuls.  Nothing of K or V is gathered, and quantized K and V go the same way through ``gather_qmm``.
"""

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
    row_by_row,
    transposed,
    without_padding,
)

# The largest score of a block without visible keys.  Unlike -inf it can be subtracted.
_NOTHING = -1e30
# Float32 arrays of the size of a tile's scores: scores, weights, partial outputs in two orders, and what
# MLX allocates ahead.
_ARRAYS = 5


def attend_by_pairs(
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
        return _attend(queries, keys, values, block_ids, offset, block_size, scale, tile_bytes)

    def attend_row(row: slice, queries: mx.array, first: int, padding: int) -> mx.array:
        k, v = without_padding(keys, row, padding), without_padding(values, row, padding)
        return _attend(queries, k, v, block_ids[row], first, block_size, scale, tile_bytes)

    return row_by_row(attend_row, queries, offset, left_padding)


def pairs_fit(n_slots: int, channels: int, itemsize: float, is_quantized: bool, tile_bytes: int) -> bool:
    """Whether one group's K and V in float32 fit in the memory of a tile beside a tile of scores.

    A CPU's tiles are small for another reason than memory: there they may take three times as much.
    """
    most = tile_bytes * 3 // 4 if on_gpu() else tile_bytes * 3
    return _cast_bytes(n_slots, channels, itemsize, is_quantized) <= most


def _cast_bytes(n_slots: int, channels: int, itemsize: float, is_quantized: bool) -> int:
    if is_quantized or (itemsize == 4 and on_gpu()):
        return 0
    # On a CPU the transposed keys are a copy, too.
    return int(n_slots * channels * (4 if itemsize < 4 else 2))


def _attend(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Offset,
    block_size: int,
    scale: float,
    tile_bytes: int,
) -> mx.array:
    """One KV group after the other, each in tiles of queries; for rows without padding."""
    batch, n_heads, length, _ = queries.shape
    groups, k = block_ids.shape[1], block_ids.shape[3]
    heads = n_heads // groups
    keys, values = (whole_blocks(x, offset, length, block_size) for x in (keys, values))
    quantized = isinstance(keys, Quantized)
    itemsize = 0 if isinstance(keys, Quantized) else keys.dtype.size
    casts = _cast_bytes(batch * keys.shape[2], keys.shape[-1] + values.shape[-1], itemsize, quantized)
    arrays_bytes = tile_bytes - casts if on_gpu() else tile_bytes
    tile_length = max(1, arrays_bytes // (_ARRAYS * 4 * batch * heads * k * block_size))
    queries_per_block = batch * length * k * heads * block_size // keys.shape[2]

    def attend_group(group: int, queries: mx.array) -> mx.array:
        of_group = slice(group, group + 1)
        # Each group's blocks are cast after the group before: the casts depend on its queries.
        key_blocks, value_blocks = (_after(queries, _blocks(x, of_group, block_size)) for x in (keys, values))
        if not isinstance(key_blocks, Quantized):
            key_blocks = transposed(key_blocks, queries_per_block).astype(mx.float32)
        if not isinstance(value_blocks, Quantized):
            value_blocks = value_blocks.astype(mx.float32)
        ids = block_ids[:, group]

        def attend_tile(start: int, tile: mx.array) -> mx.array:
            tile_ids = ids[:, start : start + tile_length]
            first = later(offset, start)
            return _attend_pairs(tile, key_blocks, value_blocks, tile_ids, first, block_size, original)

        return over_queries(attend_tile, queries, tile_length)

    original, wide = queries, _scaled(queries, mx.array(scale))
    groups_of_heads = [(g, wide[:, g * heads : (g + 1) * heads]) for g in range(groups)]
    return joined(in_sequence(attend_group, groups_of_heads), axis=1)


@fused
def _scaled(queries: mx.array, scale: mx.array) -> mx.array:
    return queries.astype(mx.float32) * scale


def _after(first: mx.array, x: KeysValues) -> KeysValues:
    def order(a: mx.array) -> mx.array:
        return mx.depends(a, first)

    return map_arrays(order, x)


def _attend_pairs(
    queries: mx.array,
    key_blocks: KeysValues,
    value_blocks: KeysValues,
    block_ids: mx.array,
    offset: Offset,
    block_size: int,
    like: mx.array,
) -> mx.array:
    """The heads ``[B, heads, l, D]`` of one group, scaled, over the blocks ``[B, l, k]`` of their queries.

    The block with the highest id is the only one of a query that may have keys after it.  Only its
    scores are masked.
    """
    batch, _, length, _ = queries.shape
    k, n_blocks = block_ids.shape[2], key_blocks.shape[1]
    block_ids = mx.sort(block_ids, axis=-1).flatten(0, 1)
    # The blocks of all rows one after the other.
    rows = arange(batch * length)[:, None]
    blocks = _blocks_of_rows(block_ids, rows, mx.array(length), mx.array(n_blocks))
    per_query = queries.swapaxes(1, 2).flatten(0, 1)
    every_query = arange(batch * length)

    last = _grouped_matmul(per_query, key_blocks, every_query, blocks[:, -1], transpose=True)
    query_at = mx.broadcast_to(query_positions(offset, length), (batch, 1, length, 1)).reshape(-1, 1, 1)
    last = _visible_only(last, block_ids[:, -1].reshape(-1, 1, 1), arange(block_size), query_at)
    largest = last.max(axis=-1, keepdims=True)
    if k == 1:
        weights = _weights(last, mx.stop_gradient(_at_least(largest, largest)))
        total = weights.sum(axis=-1, keepdims=True)
        out = _grouped_matmul(weights, value_blocks, every_query, blocks[:, -1], transpose=False)
        return _by_row(_average(out, mx.zeros_like(out), total, mx.zeros_like(total), like), batch)

    # All other pairs, sorted by block: those that share one stand together, so that it is read once.
    order = mx.argsort(blocks[:, :-1].flatten())
    back = mx.argsort(order)
    blocks_of_pairs = blocks[:, :-1].flatten()[order]

    def by_query(x: mx.array) -> mx.array:
        return mx.unflatten(x[back], 0, (-1, k - 1))

    scores = _grouped_matmul(
        per_query, key_blocks, order // (k - 1), blocks_of_pairs, transpose=True, is_sorted=True
    )
    ids = block_ids[:, :-1, None, None]
    largest_of_pairs = _used_only(by_query(scores.max(axis=-1, keepdims=True)), ids)
    # A softmax does not change with what is subtracted, so nothing is to be differentiated here.
    largest = mx.stop_gradient(_at_least(largest, largest_of_pairs.max(axis=1)))

    weights = _weights(last, largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = _grouped_matmul(weights, value_blocks, every_query, blocks[:, -1], transpose=False)
    weights = _weights(scores, _subtracted(largest[:, None], ids).flatten(0, 1)[order])
    total_of_pairs = by_query(weights.sum(axis=-1, keepdims=True)).sum(axis=1)
    out_of_pairs = _grouped_matmul(
        weights, value_blocks, arange(order.size), blocks_of_pairs, transpose=False, is_sorted=True
    )
    return _by_row(_average(out, by_query(out_of_pairs).sum(axis=1), total, total_of_pairs, like), batch)


def _by_row(x: mx.array, batch: int) -> mx.array:
    """``[B * l, heads, D]`` -> ``[B, heads, l, D]``."""
    return mx.unflatten(x, 0, (batch, -1)).swapaxes(1, 2)


@fused
def _blocks_of_rows(ids: mx.array, rows: mx.array, length: mx.array, n_blocks: mx.array) -> mx.array:
    return mx.maximum(ids, 0) + rows // length * n_blocks


@fused
def _used_only(scores: mx.array, ids: mx.array) -> mx.array:
    return mx.where(ids >= 0, scores, -mx.inf)


@fused
def _subtracted(largest: mx.array, ids: mx.array) -> mx.array:
    # Nothing of an unused pair is left: exp(-inf).
    return mx.where(ids >= 0, largest, mx.inf)


@fused
def _at_least(a: mx.array, b: mx.array) -> mx.array:
    return mx.maximum(mx.maximum(a, b), _NOTHING)


@fused
def _average(
    out: mx.array, out_of_pairs: mx.array, total: mx.array, total_of_pairs: mx.array, like: mx.array
) -> mx.array:
    # A token's total is at least 1, and that of a padding query is 0.  The bound is not smaller,
    # because a gradient divides by its square.
    return ((out + out_of_pairs) / mx.maximum(total + total_of_pairs, 0.5)).astype(like.dtype)


@fused
def _visible_only(scores: mx.array, ids: mx.array, token: mx.array, query_at: mx.array) -> mx.array:
    position = ids * token.size + token
    return mx.where((position >= 0) & (position <= query_at), scores, -mx.inf)


@fused
def _weights(scores: mx.array, largest: mx.array) -> mx.array:
    return mx.exp(scores - largest)


def _grouped_matmul(
    x: mx.array,
    blocks: KeysValues,
    x_index: mx.array,
    block: mx.array,
    *,
    transpose: bool,
    is_sorted: bool = False,
) -> mx.array:
    """``x[x_index[p]] @ blocks[block[p]]`` for every pair ``p``.

    Arrays are transposed already where needed; the product transposes quantized blocks.
    """
    if isinstance(blocks, Quantized):
        weight, scales, biases = (a.flatten(0, 1) for a in blocks[:3])
        return mx.gather_qmm(
            x,
            weight,
            scales.astype(x.dtype),
            biases.astype(x.dtype),
            lhs_indices=x_index,
            rhs_indices=block,
            transpose=transpose,
            group_size=blocks.group_size,
            bits=blocks.bits,
            sorted_indices=is_sorted,
        )
    return mx.gather_mm(
        x, blocks.flatten(0, 1), lhs_indices=x_index, rhs_indices=block, sorted_indices=is_sorted
    )


def _blocks(x: KeysValues, group: slice, block_size: int) -> KeysValues:
    """One group of ``[B, G, S, D]`` as ``[B, S / block_size, block_size, D]``."""

    def cut(a: mx.array) -> mx.array:
        return mx.unflatten(a[:, group].squeeze(1), 1, (-1, block_size))

    return map_arrays(cut, x)


def whole_blocks(x: KeysValues, offset: Offset, length: int, block_size: int) -> KeysValues:
    """``x`` cut to the blocks in use, filled up with zeros, which nothing sees, if slots are missing."""
    n_slots = x.shape[2]
    n_keys = max(1, offset + length) if isinstance(offset, int) else n_slots
    wanted = -(-n_keys // block_size) * block_size

    def fit(a: mx.array) -> mx.array:
        if n_slots >= wanted:
            return a[:, :, :wanted]
        return mx.pad(a, [(0, 0), (0, 0), (0, wanted - n_slots), (0, 0)])

    return map_arrays(fit, x)
