"""Block selection in tiles of bounded memory.

As ``tests/msa/reference.py`` defines it, but the scores of all queries with all keys never exist
at once, and nothing is compiled for a length.
"""

from functools import partial

import mlx.core as mx

from .common import (
    Position,
    default_tile_bytes,
    in_sequence,
    over_queries,
    query_positions,
    rows_apart,
    transposed,
)


def select_blocks(
    index_queries: mx.array,
    index_keys: mx.array,
    offset: Position,
    left_padding: mx.array | None = None,
    *,
    block_size: int,
    topk_blocks: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    tile_bytes: int | None = None,
) -> mx.array:
    """The key blocks that each query of each group attends to (paper, eq. 6 and 7).

    Args:
        index_queries: ``[B, G, L, D]``, one head per KV group.
        index_keys: ``[B, 1, S, D]``, one head shared by all groups; the queries' own are the last.
        offset: content position of the first query; an int, or ``[B]`` int32.
        left_padding: ``[B]`` int32 cache slots before each row's first token, or None.
        block_size: keys per block.
        topk_blocks: the most blocks a query may attend to.
        local_blocks: blocks up to and with the query's own that are always in.
        init_blocks: blocks at the start of the row that are always in.
        tile_bytes: bytes that the intermediate arrays of a tile may take; see ``common``.

    Returns:
        ``[B, G, L, k]`` int32 block ids in no particular order, with
        ``k = min(topk_blocks, ceil(S / block_size))``; -1 marks an unused slot.
    """
    tile_bytes = tile_bytes or default_tile_bytes()
    batch, groups, length, dims = index_queries.shape
    n_keys = index_keys.shape[2]
    k = min(topk_blocks, -(-n_keys // block_size))
    choose = partial(_choose, k=k, block_size=block_size, local_blocks=local_blocks, init_blocks=init_blocks)
    if left_padding is None:
        return _in_tiles(choose, index_queries, index_keys, offset, block_size, tile_bytes)
    if groups * length < dims:
        # Few queries: fewer scores per key than a key has channels, so the scores are moved.
        tile_length = max(1, tile_bytes // (6 * 4 * batch * groups * n_keys))

        def choose_tile(start: int, queries: mx.array) -> mx.array:
            first = offset + start
            return choose(_scores_of_padded_rows(queries, index_keys, first, left_padding, block_size), first)

        return over_queries(choose_tile, index_queries, tile_length)
    rows_of_ids = []
    for row, first, padding in rows_apart(offset, left_padding):
        queries, keys = index_queries[row], index_keys[row, :, min(padding, n_keys - 1) :]
        rows_of_ids.append(_in_tiles(choose, queries, keys, first, block_size, tile_bytes))
    return mx.concatenate(rows_of_ids)


def _choose(
    scores: mx.array, offset: Position, *, k: int, block_size: int, local_blocks: int, init_blocks: int
) -> mx.array:
    """Ids ``[B, G, l, k]`` of the best blocks from their scores ``[B, G, l, n_blocks]``."""
    own_block = query_positions(offset, scores.shape[2]) // block_size
    block = mx.arange(scores.shape[3])
    forced = ((block > own_block - local_blocks) | (block < init_blocks)) & (block <= own_block)
    scores = mx.where(forced, mx.inf, scores)
    missing = k - scores.shape[3]
    if missing > 0:
        # A row with more padding than the others has fewer blocks.
        scores = mx.pad(scores, [(0, 0), (0, 0), (0, 0), (0, missing)], constant_values=-mx.inf)
    ids = mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k]
    chosen = mx.take_along_axis(scores, ids, axis=-1)
    # Block ids are choices, not numbers to differentiate: MLX refuses a gradient of an index.
    return mx.stop_gradient(mx.where(chosen == -mx.inf, -1, ids.astype(mx.int32)))


def _in_tiles(
    choose: partial[mx.array],
    index_queries: mx.array,
    index_keys: mx.array,
    offset: Position,
    block_size: int,
    tile_bytes: int,
) -> mx.array:
    """Choose blocks for rows without padding, a tile of queries at a time."""
    batch, groups = index_queries.shape[:2]
    n_blocks = -(-index_keys.shape[2] // block_size)
    # Half of the bytes for the scores of blocks, of which choosing makes about eight copies.
    tile_length = max(1, tile_bytes // (2 * 8 * 4 * batch * groups * n_blocks))

    def choose_tile(start: int, queries: mx.array) -> mx.array:
        first = offset + start
        return choose(_block_scores(queries, index_keys, first, block_size, tile_bytes // 2), first)

    return over_queries(choose_tile, index_queries, tile_length)


def _block_scores(
    queries: mx.array, index_keys: mx.array, offset: Position, block_size: int, tile_bytes: int
) -> mx.array:
    """``[B, G, l, n_blocks]`` float32: the best visible key of each block, -inf where there is none."""
    batch, groups, length, _ = queries.shape
    n_keys = index_keys.shape[2]
    # MLX allocates some ten operations ahead of the one that runs.
    keys_per_tile = max(1, tile_bytes // (10 * 4 * batch * groups * length * block_size)) * block_size

    def pool_tile(start: int, queries: mx.array) -> mx.array:
        stop = min(start + keys_per_tile, n_keys)
        if isinstance(offset, int) and start > offset + length - 1:
            # The whole tile is in the future of all queries.
            return mx.full((batch, groups, length, -(-(stop - start) // block_size)), -mx.inf)
        keys = index_keys[:, :, start:stop].astype(mx.float32)
        scores = queries @ transposed(keys, uses=groups * length)
        if not isinstance(offset, int) or stop - 1 > offset:
            scores = _mask_future(scores, start, offset)
        return _pool(scores, block_size)

    queries = queries.astype(mx.float32)
    tiles = [(start, queries) for start in range(0, n_keys, keys_per_tile)]
    return mx.concatenate(in_sequence(pool_tile, tiles), axis=-1)


def _scores_of_padded_rows(
    queries: mx.array, index_keys: mx.array, offset: Position, left_padding: mx.array, block_size: int
) -> mx.array:
    """As :func:`_block_scores`: scores in the order of the slots, moved to content order, pooled."""
    n_keys = index_keys.shape[2]
    scores = queries.astype(mx.float32) @ index_keys.astype(mx.float32).swapaxes(-1, -2)
    # Slots past a row's last token repeat a score, which no query of that row is late enough to see.
    slots = mx.minimum(mx.arange(n_keys) + left_padding[:, None], n_keys - 1)
    scores = mx.take_along_axis(scores, slots[:, None, None], axis=-1)
    return _pool(_mask_future(scores, 0, offset), block_size)


def _mask_future(scores: mx.array, first_key: int, offset: Position) -> mx.array:
    # Before pooling: a future key must not win a block for itself.
    length, n_keys = scores.shape[-2:]
    visible = mx.arange(first_key, first_key + n_keys) <= query_positions(offset, length)
    return mx.where(visible, scores, -mx.inf)


def _pool(scores: mx.array, block_size: int) -> mx.array:
    tail = -scores.shape[-1] % block_size
    if tail:
        scores = mx.pad(scores, [(0, 0), (0, 0), (0, 0), (0, tail)], constant_values=-mx.inf)
    return mx.unflatten(scores, -1, (-1, block_size)).max(axis=-1)
