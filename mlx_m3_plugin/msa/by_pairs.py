"""Attention to the chosen blocks as a mixture of key blocks.

A query group that attends to 16 of n blocks is a token routed to 16 of n experts: the (query, block)
pairs are sorted by block, and each query group is multiplied with its block in place, by MLX's grouped
matmuls.  Nothing of K or V is gathered, and quantized K and V go the same way through ``gather_qmm``.
"""

import mlx.core as mx

from .common import (
    Chosen,
    KeysValues,
    Quantized,
    arange,
    fused,
    in_sequence,
    joined,
    map_arrays,
    on_gpu,
    over_queries,
    over_rows,
    transposed,
)

# The largest score of a block without visible keys.  Unlike -inf it can be subtracted.
NOTHING = -1e30
# Float32 arrays of the size of a tile's scores: scores, weights, partial outputs in two orders, and what
# MLX allocates ahead.
_ARRAYS = 5


def attend_by_pairs(queries: mx.array, chosen: Chosen, tile_bytes: int) -> mx.array:
    """As :func:`.attend.attend`.  Rows go together where that copies nothing in vain."""
    # Without a cast, one group's blocks of several rows would have to be copied to stand together.
    is_cast = not isinstance(chosen.keys, Quantized) and chosen.keys.dtype.size < 4
    together = chosen.left_padding is None and (len(queries) == 1 or is_cast)
    if together and pairs_fit(*_sizes(chosen), False, tile_bytes, on_gpu()):
        return _attend(queries, chosen, tile_bytes)
    return over_rows(lambda row, tile: _attend(tile, chosen.of_row(row), tile_bytes), queries)


def pairs_fit(
    n_numbers: int, itemsize: float, is_quantized: bool, is_padded: bool, tile_bytes: int, gpu: bool
) -> bool:
    """Whether the copies of one group's K and V, of ``n_numbers`` together, fit beside a tile of scores."""
    copies = _copied_bytes(n_numbers, itemsize, is_quantized, is_padded, gpu)
    return copies <= _most_copied(tile_bytes, gpu)


def _most_copied(tile_bytes: int, gpu: bool) -> int:
    # A CPU's tiles are small for another reason than memory.
    return tile_bytes * 3 // 4 if gpu else tile_bytes * 4


def _copied_bytes(n_numbers: int, itemsize: float, is_quantized: bool, is_padded: bool, gpu: bool) -> int:
    if is_quantized:
        return 0
    # Without its padding, a row's last block may lack slots.
    bytes_of_a_number = itemsize if is_padded else 0
    if itemsize < 4:
        # In float32, and on a CPU the transposed keys before that.
        bytes_of_a_number += 4 if gpu else 4 + itemsize / 2
    return int(n_numbers * bytes_of_a_number)


def _sizes(chosen: Chosen) -> tuple[int, int, bool]:
    """The numbers in one group's K and V of all rows, bytes of each, and whether they are quantized."""
    keys = chosen.keys
    n_numbers = keys.shape[0] * keys.shape[2] * (keys.shape[3] + chosen.values.shape[3])
    return (n_numbers, 0, True) if isinstance(keys, Quantized) else (n_numbers, keys.dtype.size, False)


def _attend(queries: mx.array, chosen: Chosen, tile_bytes: int) -> mx.array:
    """One KV group after the other, each in tiles of queries; for rows without padding."""
    batch, n_heads, length, _ = queries.shape
    keys, values, block_ids, offset, _, block_size, scale = chosen
    assert isinstance(offset, int)
    groups, k = block_ids.shape[1], block_ids.shape[3]
    heads = n_heads // groups
    n_blocks = blocks_of(offset + length, block_size)
    must_pad = n_blocks * block_size > keys.shape[2]
    arrays_bytes = tile_bytes
    if on_gpu():
        arrays_bytes -= _copied_bytes(*_sizes(chosen), must_pad, gpu=True)
    tile_length = max(1, arrays_bytes // (_ARRAYS * 4 * batch * heads * k * block_size))
    tile_length = min(tile_length, most_sortable(batch * n_blocks, batch * k))
    queries_per_block = batch * length * k * heads // n_blocks
    if 4 * batch * keys.shape[2] * keys.shape[3] > _most_copied(tile_bytes, on_gpu()):
        # Too much to copy the transposed keys.
        queries_per_block = 0

    def attend_group(group: int, of_group: mx.array) -> mx.array:
        # Each group's blocks are cast after the group before: the casts depend on its queries.
        key_blocks, value_blocks = (
            _blocks(x, group, n_blocks, block_size, after=of_group) for x in (keys, values)
        )
        if not isinstance(key_blocks, Quantized):
            key_blocks = transposed(key_blocks, queries_per_block).astype(mx.float32)
        if not isinstance(value_blocks, Quantized):
            value_blocks = value_blocks.astype(mx.float32)

        def attend_tile(start: int, tile: mx.array) -> mx.array:
            ids = block_ids[:, group, start : start + tile_length]
            tile = mx.unflatten(tile, -1, (heads, -1)).flatten(0, 2)
            return _attend_pairs(tile, key_blocks, value_blocks, ids, offset + start, block_size, queries)

        return over_queries(attend_tile, of_group, tile_length)

    # Each group's heads beside one another: [B, G, L, heads * D].
    wide = scaled(mx.unflatten(queries, 1, (groups, heads)).swapaxes(2, 3), mx.array(scale)).flatten(3)
    queries_of_groups = [(group, wide[:, group : group + 1]) for group in range(groups)]
    return joined(in_sequence(attend_group, queries_of_groups), axis=1)


@fused
def scaled(queries: mx.array, scale: mx.array) -> mx.array:
    return queries.astype(mx.float32) * scale


def _attend_pairs(
    queries: mx.array,
    key_blocks: KeysValues,
    value_blocks: KeysValues,
    block_ids: mx.array,
    offset: int,
    block_size: int,
    like: mx.array,
) -> mx.array:
    """The heads ``[B * l, heads, D]`` of one group, scaled, over the blocks ``[B, l, k]`` of their queries.

    Returns ``[B, heads, l, Dv]`` in the dtype of ``like``.

    The block with the highest id is the only one of a query that may have keys after it.  Only its
    scores are masked.
    """
    batch, length, k = block_ids.shape
    n_blocks = key_blocks.shape[1]
    block_ids = mx.sort(block_ids, axis=-1).flatten(0, 1)
    every_query = arange(batch * length)
    # The blocks of all rows one after the other.
    sizes = mx.array(length), mx.array(n_blocks)
    last_block = _block_of_row(block_ids[:, -1], every_query, *sizes)

    last = _grouped_matmul(queries, key_blocks, every_query, last_block, transpose=True)
    ids, query = block_ids[:, -1, None, None], every_query[:, None, None]
    last = visible_only(last, ids, arange(block_size), query, mx.array(length), mx.array(offset), block_size)
    largest = last.max(axis=-1, keepdims=True)
    if k == 1:
        weights = exp_below(last, mx.stop_gradient(_at_least(largest, largest)))
        total = weights.sum(axis=-1, keepdims=True)
        out = _grouped_matmul(weights, value_blocks, every_query, last_block, transpose=False)
        return _by_row(_average(out, mx.zeros_like(out), total, mx.zeros_like(total), like), batch)

    # All other pairs, sorted by block: those that share one stand together, so that it is read once.
    n_pairs = batch * length * (k - 1)
    order, query, blocks = sorted_by_block(block_ids[:, :-1], *sizes)
    back = mx.argsort(order)

    def by_query(x: mx.array) -> mx.array:
        return mx.unflatten(x[back], 0, (-1, k - 1))

    scores = _grouped_matmul(queries, key_blocks, query, blocks, transpose=True, is_sorted=True)
    ids = block_ids[:, :-1, None, None]
    largest_of_pairs = _used_only(by_query(scores.max(axis=-1, keepdims=True)), ids)
    # A softmax does not change with what is subtracted, so nothing is to be differentiated here.
    largest = mx.stop_gradient(_at_least(largest, largest_of_pairs.max(axis=1)))

    weights = exp_below(last, largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = _grouped_matmul(weights, value_blocks, every_query, last_block, transpose=False)
    weights = exp_below(scores, _subtracted(largest[:, None], ids).flatten(0, 1)[order])
    total_of_pairs = by_query(weights.sum(axis=-1, keepdims=True)).sum(axis=1)
    out_of_pairs = _grouped_matmul(
        weights, value_blocks, arange(n_pairs), blocks, transpose=False, is_sorted=True
    )
    return _by_row(_average(out, by_query(out_of_pairs).sum(axis=1), total, total_of_pairs, like), batch)


def _by_row(x: mx.array, batch: int) -> mx.array:
    """``[B * l, heads, D]`` -> ``[B, heads, l, D]``."""
    return mx.unflatten(x, 0, (batch, -1)).swapaxes(1, 2)


def most_sortable(n_blocks: int, pairs: int) -> int:
    """The most queries, of so many pairs each, that :func:`sorted_by_block` takes."""
    # Its numbers hold a block and a pair in 32 bits.
    return max(1, (1 << 32) // (n_blocks * pairs))


def sorted_by_block(block_ids: mx.array, length: mx.array, n_blocks: mx.array) -> tuple[mx.array, ...]:
    """The pairs of queries and blocks ``[B * l, k]`` in the order of the blocks of all rows.

    Returns:
        Of each: its number, its query, and its block; unused slots count as block 0.
    """
    n_queries, k = block_ids.shape
    n_pairs = mx.array(n_queries * k, mx.uint32)
    pairs = mx.unflatten(arange(n_queries * k), 0, (-1, k))
    keys = _sort_keys(block_ids, pairs, arange(n_queries)[:, None], length, n_blocks, n_pairs)
    return _sorted_pairs(mx.sort(keys.flatten()), n_pairs, k)


@fused
def _block_of_row(ids: mx.array, query: mx.array, length: mx.array, n_blocks: mx.array) -> mx.array:
    return mx.maximum(ids, 0) + query // length * n_blocks


@fused
def _sort_keys(
    ids: mx.array,
    pair: mx.array,
    query: mx.array,
    length: mx.array,
    n_blocks: mx.array,
    n_pairs: mx.array,
) -> mx.array:
    """Numbers that are in the order of the blocks, and hold the pair's own number."""
    return (mx.maximum(ids, 0) + query // length * n_blocks).astype(mx.uint32) * n_pairs + pair.astype(
        mx.uint32
    )


@fused
def _sorted_pairs(keys: mx.array, n_pairs: mx.array, per_query: int) -> tuple[mx.array, ...]:
    """Of each sorted key: the pair, its query and its block."""
    pair = keys % n_pairs
    return pair, pair // per_query, keys // n_pairs


@fused
def _used_only(scores: mx.array, ids: mx.array) -> mx.array:
    return mx.where(ids >= 0, scores, -mx.inf)


@fused
def _subtracted(largest: mx.array, ids: mx.array) -> mx.array:
    # Nothing of an unused pair is left: exp(-inf).
    return mx.where(ids >= 0, largest, mx.inf)


@fused
def _at_least(a: mx.array, b: mx.array) -> mx.array:
    return mx.maximum(mx.maximum(a, b), NOTHING)


@fused
def _average(
    out: mx.array, out_of_pairs: mx.array, total: mx.array, total_of_pairs: mx.array, like: mx.array
) -> mx.array:
    # A token's total is at least 1, and that of a padding query is 0.  The bound is not smaller,
    # because a gradient divides by its square.
    return ((out + out_of_pairs) / mx.maximum(total + total_of_pairs, 0.5)).astype(like.dtype)


@fused
def visible_only(
    scores: mx.array,
    ids: mx.array,
    token: mx.array,
    query: mx.array,
    length: mx.array,
    offset: mx.array,
    block_size: int,
) -> mx.array:
    """``length`` queries of one row after those of another, the first at ``offset``."""
    position = ids * block_size + token
    return mx.where((position >= 0) & (position <= offset + query % length), scores, -mx.inf)


@fused
def exp_below(scores: mx.array, largest: mx.array) -> mx.array:
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


def _blocks(x: KeysValues, group: int, n_blocks: int, block_size: int, after: mx.array) -> KeysValues:
    """One group of ``[B, G, S, D]`` as ``[B, n_blocks, block_size, D]``, once ``after`` is computed."""

    def split(a: mx.array) -> mx.array:
        a = whole_blocks(mx.depends(a, after)[:, group : group + 1], n_blocks * block_size)
        return mx.unflatten(a.squeeze(1), 1, (n_blocks, block_size))

    return map_arrays(split, x)


def blocks_of(n_keys: int, block_size: int) -> int:
    return -(-max(1, n_keys) // block_size)


def whole_blocks(a: mx.array, wanted: int) -> mx.array:
    """The first ``wanted`` slots of ``a``, filled up with zeros, which nothing sees, if slots are missing."""
    missing = max(0, wanted - a.shape[2])
    return mx.pad(a, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else a[:, :, :wanted]
