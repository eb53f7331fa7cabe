"""Attention over selected key blocks in tiles of bounded memory, without a mask of all keys.

MSA is a mixture of key blocks: a query group that attends to 16 of n blocks is a token routed
to 16 of n experts.  Two forms of the same sum:

* :func:`_attend_by_pairs` sorts the (query, block) pairs by block and multiplies each query
  group with its block in place, by MLX's grouped matmuls.  Nothing of K or V is copied, and
  quantized K and V go the same way through ``gather_qmm``.
* :func:`_attend_by_query` gathers the selected tokens of K and V per query and calls the fused
  attention.  It takes any alignment of the rows in the cache.
"""

import mlx.core as mx

from .common import (
    KeysValues,
    Position,
    Quantized,
    default_tile_bytes,
    in_sequence,
    map_arrays,
    over_queries,
    query_positions,
    rows_apart,
    transposed,
)

# From this many queries on it pays to sort pairs; below, gathering is as fast and has fewer steps.
PAIRS_FROM = 16
# The largest score of a block without visible keys.  Unlike -inf it can be subtracted.
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
    tile_bytes: int | None = None,
) -> mx.array:
    """Softmax attention of every query over the visible keys of its blocks (paper, eq. 8).

    Query head ``j`` belongs to group ``j // (H // G)`` and reads that group's K and V.

    Args:
        queries: ``[B, H, L, D]``.
        keys: ``[B, G, S, D]``, an array or :class:`Quantized`.  May include unused slots after
            the last token.  No copy is made if S is a multiple of ``block_size``.
        values: ``[B, G, S, Dv]``, likewise.
        block_ids: ``[B, G, L, k]`` int32 from :func:`.select.select_blocks`; -1 is skipped.
        offset: content position of the first query; an int, or ``[B]`` int32.
        left_padding: ``[B]`` int32 cache slots before each row's first token, or None.
        block_size: keys per block.
        scale: factor of the dot products, ``D ** -0.5`` in M3.
        tile_bytes: bytes that the intermediate arrays of a tile may take; see ``common``.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``queries``; the softmax is accumulated in float32.
        Rows of padding queries are finite and without meaning.
    """
    length = queries.shape[2]
    tile_bytes = tile_bytes or default_tile_bytes()
    if length < PAIRS_FROM or not _has_float32_grouped_matmul(keys):
        return _attend_by_query(
            queries, keys, values, block_ids, offset, left_padding, block_size, scale, tile_bytes
        )
    if left_padding is None:
        return _attend_by_pairs(queries, keys, values, block_ids, offset, block_size, scale, tile_bytes)
    outputs = []
    for row, first, padding in rows_apart(offset, left_padding):
        # One slot of padding is left where the row has nothing else yet.
        content = slice(min(padding, keys.shape[2] - 1), None)
        k, v = _cut(keys, content, row), _cut(values, content, row)
        outputs.append(
            _attend_by_pairs(queries[row], k, v, block_ids[row], first, block_size, scale, tile_bytes)
        )
    return mx.concatenate(outputs)


def _attend_by_query(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Position,
    left_padding: mx.array | None,
    block_size: int,
    scale: float,
    tile_bytes: int,
) -> mx.array:
    batch, n_heads, _, dims = queries.shape
    groups, n_slots = keys.shape[1:3]
    # The gathered keys and values of each group, and their casts.
    n_tokens = block_ids.shape[3] * block_size
    bytes_per_query = 2 * 4 * batch * groups * n_tokens * (keys.shape[-1] + values.shape[-1])
    tile_length = max(1, tile_bytes // bytes_per_query)

    def attend_tile(start: int, tile: mx.array) -> mx.array:
        ids = block_ids[:, :, start : start + tile_length]
        positions = (ids[..., None] * block_size + mx.arange(block_size)).flatten(-2)
        query_at = query_positions(offset + start, tile.shape[2])
        # A padding query sees everything: a softmax over nothing is NaN, and NaN in K or V spreads.
        visible = ((positions >= 0) & (positions <= query_at)) | (query_at < 0)
        slots = positions if left_padding is None else positions + left_padding[:, None, None, None]
        k, v = (_take_tokens(x, mx.clip(slots, 0, n_slots - 1)) for x in (keys, values))

        # Every (row, group, query) is a batch entry of its own with one KV head.
        entries = batch * groups * tile.shape[2]
        grouped = mx.unflatten(tile, 1, (groups, -1)).swapaxes(2, 3).reshape(entries, -1, 1, dims)
        k, v = (x.reshape(entries, 1, n_tokens, -1) for x in (k, v))
        if mx.default_device() == mx.cpu:
            # MLX's CPU backend computes in the precision of its inputs.
            grouped, k, v = (x.astype(mx.float32) for x in (grouped, k, v))
        mask = visible.reshape(entries, 1, 1, -1)
        out = mx.fast.scaled_dot_product_attention(grouped, k, v, scale=scale, mask=mask)
        out = out.reshape(batch, groups, tile.shape[2], n_heads // groups, -1).swapaxes(2, 3)
        return out.reshape(batch, n_heads, tile.shape[2], -1)

    return over_queries(attend_tile, queries, tile_length).astype(queries.dtype)


def _attend_by_pairs(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Position,
    block_size: int,
    scale: float,
    tile_bytes: int,
) -> mx.array:
    """One KV group after the other, each in tiles of queries; for rows without padding."""
    batch, n_heads, length, _ = queries.shape
    groups, k = block_ids.shape[1], block_ids.shape[3]
    heads = n_heads // groups
    keys, values = (_whole_blocks(x, offset, length, block_size) for x in (keys, values))
    # Scores, probabilities and outputs: about six float32 arrays.
    tile_length = max(1, tile_bytes // (6 * 4 * batch * heads * k * block_size))

    def attend_group(group: int, queries: mx.array) -> mx.array:
        of_group = slice(group, group + 1)
        ids = block_ids[:, of_group]
        queries_per_block = batch * length * k * heads * block_size // keys.shape[2]
        key_blocks = _blocks(keys, of_group, block_size)
        if not isinstance(key_blocks, Quantized):
            key_blocks = transposed(key_blocks, queries_per_block)
        value_blocks = _blocks(values, of_group, block_size)

        def attend_tile(start: int, tile: mx.array) -> mx.array:
            tile_ids = ids[:, :, start : start + tile_length]
            return _attend_pairs(tile * scale, key_blocks, value_blocks, tile_ids, offset + start, block_size)

        return over_queries(attend_tile, queries, tile_length)

    wide = queries.astype(mx.float32)
    groups_of_heads = [(g, wide[:, g * heads : (g + 1) * heads]) for g in range(groups)]
    return mx.concatenate(in_sequence(attend_group, groups_of_heads), axis=1).astype(queries.dtype)


def _attend_pairs(
    queries: mx.array,
    key_blocks: KeysValues,
    value_blocks: KeysValues,
    block_ids: mx.array,
    offset: Position,
    block_size: int,
) -> mx.array:
    """The heads ``[B, heads, l, D]`` of one group, scaled, over the pairs ``[B, 1, l, k]``."""
    batch, _, length, _ = queries.shape
    k = block_ids.shape[3]
    n_blocks = key_blocks.shape[1]
    blocks = mx.maximum(block_ids, 0) + (mx.arange(batch) * n_blocks).reshape(batch, 1, 1, 1)
    # Pairs that share a block stand together, so that it is read once.
    order = mx.argsort(blocks.flatten())
    blocks, query = blocks.flatten()[order], order // k

    per_query = queries.swapaxes(1, 2).flatten(0, 1)
    scores = _grouped_matmul(per_query, key_blocks, query, blocks, transpose=True)
    positions = block_ids[..., None] * block_size + mx.arange(block_size)
    visible = (positions >= 0) & (positions <= query_positions(offset, length)[..., None])
    scores = mx.where(visible.flatten(0, 3)[order][:, None], scores, -mx.inf)

    # A softmax per pair, merged over the pairs of a query by their maxima and sums.
    largest = mx.maximum(scores.max(axis=-1, keepdims=True), _NOTHING)
    weights = mx.exp(scores - largest)
    out = _grouped_matmul(weights, value_blocks, mx.arange(order.size), blocks, transpose=False)
    back = mx.argsort(order)

    def by_query(x: mx.array) -> mx.array:
        return mx.unflatten(x[back], 0, (-1, k))

    largest, sums, out = by_query(largest), by_query(weights.sum(axis=-1, keepdims=True)), by_query(out)
    share = mx.exp(largest - largest.max(axis=1, keepdims=True))
    # A token's total is at least 1, and that of a padding query is 0.  The bound is not smaller,
    # because a gradient divides by its square.
    total = mx.maximum((share * sums).sum(axis=1), 0.5)
    out = (share * out).sum(axis=1) / total
    return mx.unflatten(out, 0, (batch, length)).swapaxes(1, 2)


def _grouped_matmul(
    x: mx.array, blocks: KeysValues, x_index: mx.array, block: mx.array, *, transpose: bool
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
            sorted_indices=True,
        )
    return mx.gather_mm(x, blocks, lhs_indices=x_index, rhs_indices=block, sorted_indices=True)


def _blocks(x: KeysValues, group: slice, block_size: int) -> KeysValues:
    """One group of ``[B, G, S, D]`` as ``[B, S / block_size, block_size, D]``."""

    def cut(a: mx.array) -> mx.array:
        return mx.unflatten(a[:, group].squeeze(1), 1, (-1, block_size))

    return map_arrays(cut, x)


def _take_tokens(x: KeysValues, slots: mx.array) -> mx.array:
    """Tokens in ``slots`` ``[B, G, l, n]`` of ``[B, G, S, D]`` -> ``[B, G, l, n, D]``; dequantized."""
    batch, groups = slots.shape[:2]
    row, group = mx.arange(batch).reshape(-1, 1, 1, 1), mx.arange(groups).reshape(1, -1, 1, 1)

    def take(a: mx.array) -> mx.array:
        return a[row, group, slots]

    taken = map_arrays(take, x)
    return taken.dequantize() if isinstance(taken, Quantized) else taken


def _cut(x: KeysValues, slots: slice, rows: slice = slice(None)) -> KeysValues:
    def cut(a: mx.array) -> mx.array:
        return a[rows, :, slots]

    return map_arrays(cut, x)


def _whole_blocks(x: KeysValues, offset: Position, length: int, block_size: int) -> KeysValues:
    """``x`` cut to the blocks in use, filled up with zeros, which nothing sees, if slots are missing."""
    n_slots = x.shape[2]
    n_keys = max(1, offset + length) if isinstance(offset, int) else n_slots
    wanted = -(-n_keys // block_size) * block_size

    def fit(a: mx.array) -> mx.array:
        if n_slots >= wanted:
            return a[:, :, :wanted]
        return mx.pad(a, [(0, 0), (0, 0), (0, wanted - n_slots), (0, 0)])

    return map_arrays(fit, x)


def _has_float32_grouped_matmul(keys: KeysValues) -> bool:
    # In 16 bits the scores of a grouped matmul would be rounded before the softmax.
    return isinstance(keys, Quantized) or keys.dtype == mx.float32
