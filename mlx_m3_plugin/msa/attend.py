"""Attention over chosen key blocks in tiles of bounded memory, without a mask of all keys.

MSA is a mixture of key blocks: a query group that attends to 16 of n blocks is a token routed
to 16 of n experts.  Two forms of the same sum:

* :func:`_attend_by_pairs` sorts the (query, block) pairs by block and multiplies each query
  group with its block where it lies, by MLX's grouped matmuls.  Nothing of K or V is copied,
  and quantized K and V take the same road through ``gather_qmm``.
* :func:`_attend_by_query` gathers the chosen tokens of K and V per query and calls the fused
  attention.  It takes any alignment of the rows in the cache.
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from .keys_values import KeysValues, Quantized
from .tiling import Position, in_sequence, query_positions, rows_apart

# Intermediate arrays of a tile, in bytes.
MEMORY_BUDGET = 64 << 20
# From this many queries on it pays to sort pairs; below, gathering is as fast and has fewer steps.
PAIRS_FROM = 16
# What stands for the score of a block without visible keys; unlike -inf it can be subtracted.
_NOTHING = -1e30


def attend(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Position,
    left_padding: mx.array | None = None,
    *,
    block_size: int,
    scale: float,
    memory_budget: int = MEMORY_BUDGET,
) -> mx.array:
    """Softmax attention of every query over the visible keys of its blocks (paper, eq. 8).

    Query head ``j`` belongs to group ``j // (H // G)`` and reads that group's K and V.

    Args:
        queries: ``[B, H, L, D]``.
        keys: ``[B, G, S, D]``, an array or :class:`Quantized`.  There may be slots after the
            last token, whatever they hold; a whole number of blocks spares a copy.
        values: ``[B, G, S, Dv]``, likewise.
        block_ids: ``[B, G, L, k]`` int32 from :func:`.select.select_blocks`; -1 is skipped.
        offset: content position of the first query; an int, or ``[B]`` int32.
        left_padding: ``[B]`` int32 cache slots before each row's first token, or None.
        block_size: keys per block.
        scale: factor of the dot products, ``D ** -0.5`` in M3.
        memory_budget: bytes that the intermediate arrays of a tile may take.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``queries``; the softmax is accumulated in float32.
        Rows of padding queries are finite and without meaning.
    """
    length = queries.shape[2]
    tiled = partial(_in_tiles, block_size=block_size, scale=scale, memory_budget=memory_budget)
    if length < PAIRS_FROM or not _has_float32_grouped_matmul(keys):
        return tiled(_attend_by_query, queries, keys, values, block_ids, offset, left_padding)
    if left_padding is None:
        keys, values = (_whole_blocks(x, offset, length, block_size) for x in (keys, values))
        return tiled(_attend_by_pairs, queries, keys, values, block_ids, offset)
    rows = []
    for row, first, padding in rows_apart(offset, left_padding):
        keys_of_row, values_of_row = (
            _whole_blocks(_slots(x, row, padding), first, length, block_size) for x in (keys, values)
        )
        rows.append(tiled(_attend_by_pairs, queries[row], keys_of_row, values_of_row, block_ids[row], first))
    return mx.concatenate(rows)


def _in_tiles(
    attend_tile: Callable[..., mx.array],
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Position,
    *padding: mx.array | None,
    block_size: int,
    scale: float,
    memory_budget: int,
) -> mx.array:
    batch, n_heads, length, _ = queries.shape
    if attend_tile is _attend_by_pairs:
        # Scores, probabilities and outputs: about six float32 arrays for each head.
        numbers = 6 * n_heads * block_size
    else:
        # The gathered keys and values of each group, and their casts.
        numbers = 2 * keys.shape[1] * block_size * (keys.shape[-1] + values.shape[-1])
    rows = max(1, memory_budget // (4 * batch * block_ids.shape[-1] * numbers))

    def compute(start: int, tile: mx.array) -> mx.array:
        ids = block_ids[:, :, start : start + rows]
        return attend_tile(
            tile, keys, values, ids, offset + start, *padding, block_size=block_size, scale=scale
        )

    tiles = [(start, queries[:, :, start : start + rows]) for start in range(0, length, rows)]
    return mx.concatenate(in_sequence(compute, tiles), axis=2).astype(queries.dtype)


def _attend_by_query(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Position,
    left_padding: mx.array | None,
    *,
    block_size: int,
    scale: float,
) -> mx.array:
    batch, n_heads, length, _ = queries.shape
    groups, n_slots = keys.shape[1:3]
    positions = (block_ids[..., None] * block_size + mx.arange(block_size)).flatten(-2)
    query_at = query_positions(offset, length)
    # A padding query sees everything: a softmax over nothing is NaN, and NaN in K or V spreads.
    visible = ((positions >= 0) & (positions <= query_at)) | (query_at < 0)
    slots = positions if left_padding is None else positions + left_padding[:, None, None, None]
    slots = mx.clip(slots, 0, n_slots - 1)
    slots = slots + (mx.arange(batch * groups) * n_slots).reshape(batch, groups, 1, 1)

    # Every (row, group, query) is a batch entry of its own with one KV head.
    entries = batch * groups * length
    grouped = mx.unflatten(queries, 1, (groups, -1)).swapaxes(2, 3).reshape(entries, -1, 1, queries.shape[-1])
    tokens = slots.reshape(entries, 1, -1)
    k, v = _take_tokens(keys, tokens), _take_tokens(values, tokens)
    if mx.default_device() == mx.cpu:
        # MLX's CPU backend computes in the precision of its inputs.
        grouped, k, v = (x.astype(mx.float32) for x in (grouped, k, v))
    mask = visible.reshape(entries, 1, 1, -1)
    out = mx.fast.scaled_dot_product_attention(grouped, k, v, scale=scale, mask=mask)
    out = out.reshape(batch, groups, length, n_heads // groups, -1).swapaxes(2, 3)
    return out.reshape(batch, n_heads, length, -1)


def _attend_by_pairs(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Position,
    *,
    block_size: int,
    scale: float,
) -> mx.array:
    batch, n_heads, length, _ = queries.shape
    groups, k = block_ids.shape[1], block_ids.shape[3]
    n_blocks = keys.shape[2] // block_size
    first_block = (mx.arange(batch * groups) * n_blocks).reshape(batch, groups, 1, 1)
    blocks = (mx.maximum(block_ids, 0) + first_block).flatten()
    # Pairs that share a block stand together, so that it is read once.
    order = mx.argsort(blocks)
    blocks, query = blocks[order], order // k

    # [B * G * L, heads of a group, D]
    grouped = mx.unflatten(queries, 1, (groups, -1)).swapaxes(2, 3).flatten(0, 2).astype(mx.float32)
    scores = _grouped_matmul(grouped * scale, keys, query, blocks, block_size, transpose=True)
    positions = block_ids[..., None] * block_size + mx.arange(block_size)
    visible = (positions >= 0) & (positions <= query_positions(offset, length)[..., None])
    scores = mx.where(visible.flatten(0, 3)[order][:, None], scores, -mx.inf)

    # A softmax per pair, merged over the pairs of a query by their maxima and sums.
    largest = mx.maximum(scores.max(axis=-1, keepdims=True), _NOTHING)
    weights = mx.exp(scores - largest)
    pairs = mx.arange(order.size)
    out = _grouped_matmul(weights, values, pairs, blocks, block_size, transpose=False)
    back = mx.argsort(order)

    def by_query(x: mx.array) -> mx.array:
        return mx.unflatten(x[back], 0, (-1, k))

    largest, sums, out = by_query(largest), by_query(weights.sum(axis=-1, keepdims=True)), by_query(out)
    share = mx.exp(largest - largest.max(axis=1, keepdims=True))
    # Only a padding query has nothing at all to attend to.
    total = mx.maximum((share * sums).sum(axis=1), 1e-30)
    out = (share * out).sum(axis=1) / total
    out = out.reshape(batch, groups, length, n_heads // groups, -1).swapaxes(2, 3)
    return out.reshape(batch, n_heads, length, -1)


def _grouped_matmul(
    x: mx.array, y: KeysValues, x_index: mx.array, block: mx.array, block_size: int, *, transpose: bool
) -> mx.array:
    """``x[x_index[p]] @ blocks of y[block[p]]`` for every pair ``p``, the block transposed or not."""
    if isinstance(y, Quantized):
        blocks = y.map(lambda a: mx.unflatten(a, 2, (-1, block_size)).flatten(0, 2))
        return mx.gather_qmm(
            x,
            blocks.weight,
            blocks.scales.astype(x.dtype),
            blocks.biases.astype(x.dtype),
            lhs_indices=x_index,
            rhs_indices=block,
            transpose=transpose,
            group_size=y.group_size,
            bits=y.bits,
            sorted_indices=True,
        )
    whole = mx.unflatten(y, 2, (-1, block_size))
    whole = whole.swapaxes(-1, -2) if transpose else whole
    return mx.gather_mm(x, whole, lhs_indices=x_index, rhs_indices=block, sorted_indices=True)


def _take_tokens(x: KeysValues, tokens: mx.array) -> mx.array:
    """Tokens of ``[B, G, S, D]`` by their index in the first three axes; dequantized."""
    if isinstance(x, Quantized):
        return x.map(lambda a: a.flatten(0, 2)[tokens]).dequantize()
    return x.flatten(0, 2)[tokens]


def _slots(x: KeysValues, row: slice, padding: int) -> KeysValues:
    """One row without its padding; a single slot of it where there is nothing else yet."""

    def cut(a: mx.array) -> mx.array:
        return a[row, :, min(padding, a.shape[2] - 1) :]

    return x.map(cut) if isinstance(x, Quantized) else cut(x)


def _whole_blocks(x: KeysValues, offset: Position, length: int, block_size: int) -> KeysValues:
    """``x`` cut to the blocks in use, filled up with zeros, which nothing sees, if slots are missing."""
    n_slots = x.shape[2]
    n_keys = max(1, offset + length) if isinstance(offset, int) else n_slots
    wanted = -(-n_keys // block_size) * block_size

    def fit(a: mx.array) -> mx.array:
        if n_slots >= wanted:
            return a[:, :, :wanted]
        return mx.pad(a, [(0, 0), (0, 0), (0, wanted - n_slots), (0, 0)])

    return x.map(fit) if isinstance(x, Quantized) else fit(x)


def _has_float32_grouped_matmul(keys: KeysValues) -> bool:
    # In 16 bits the scores of a grouped matmul would be rounded before the softmax.
    return isinstance(keys, Quantized) or keys.dtype == mx.float32
