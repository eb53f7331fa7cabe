"""Block selection in tiles of bounded memory.

As ``tests/msa/reference.py`` defines it, but the scores of all queries with all keys never exist
at once, and nothing is compiled for a length.
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from .common import (
    Offset,
    Padding,
    arange,
    default_tile_bytes,
    fused,
    in_sequence,
    joined,
    later,
    of_row,
    on_gpu,
    over_queries,
    over_rows,
    query_positions,
    transposed,
    transposed_is_copied,
)

# MLX allocates the outputs of many operations ahead of the one that runs: ten arrays of a tile's scores.
_SCORES_AHEAD = 10
# Copies of the keys of so many tiles.  A CPU's tiles are small, so that more of them are ahead; and it is
# faster with copies that fit in its caches.
_KEYS_AHEAD, _KEYS_AHEAD_ON_CPU = 2, 16


def select_blocks(
    index_queries: mx.array,
    index_keys: mx.array,
    offset: Offset,
    left_padding: Padding = None,
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
        offset: content position of the first query; for each row where ``left_padding`` is given.
        left_padding: cache slots before each row's first token, or None.
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
    if groups * length < dims and _moved_scores_bytes(batch, groups, n_keys) <= tile_bytes:
        # Few queries: fewer scores per key than a key has channels, so the scores are moved.
        return _of_padded_rows(
            choose, index_queries, index_keys, offset, left_padding, block_size, tile_bytes
        )

    def choose_row(row: int, queries: mx.array) -> mx.array:
        keys = index_keys[row : row + 1, :, min(left_padding[row], n_keys - 1) :]
        return _in_tiles(choose, queries, keys, of_row(offset, row), block_size, tile_bytes)

    return over_rows(choose_row, index_queries)


def _choose(
    scores: mx.array, offset: Offset, *, k: int, block_size: int, local_blocks: int, init_blocks: int
) -> mx.array:
    """Ids ``[B, G, l, k]`` of the best blocks from their scores ``[B, G, l, n_blocks]``."""
    missing = k - scores.shape[3]
    if missing > 0:
        # A row with more padding than the others has fewer blocks.
        scores = mx.pad(scores, [(0, 0), (0, 0), (0, 0), (0, missing)], constant_values=-mx.inf)
    query_at = query_positions(offset, scores.shape[2])
    costs = _costs(scores, query_at, arange(scores.shape[3]), block_size, local_blocks, init_blocks)
    ids = mx.argpartition(costs, kth=k - 1, axis=-1)[..., :k]
    first = offset if isinstance(offset, int) else min(offset)
    if first // block_size + 1 >= k:
        # Every query has k blocks with a visible key.
        return mx.stop_gradient(ids.astype(mx.int32))
    # Block ids are choices, not numbers to differentiate: MLX refuses a gradient of an index.
    return mx.stop_gradient(_used(ids, mx.take_along_axis(costs, ids, axis=-1)))


@fused
def _costs(
    scores: mx.array,
    query_at: mx.array,
    block: mx.array,
    block_size: int,
    local_blocks: int,
    init_blocks: int,
) -> mx.array:
    """The smaller, the better: -inf for blocks that are always in, inf for those without visible keys."""
    own_block = query_at // block_size
    forced = ((block > own_block - local_blocks) | (block < init_blocks)) & (block <= own_block)
    return mx.where(forced, -mx.inf, -scores)


@fused
def _used(ids: mx.array, costs: mx.array) -> mx.array:
    return mx.where(costs == mx.inf, -1, ids.astype(mx.int32))


def _in_tiles(
    choose: partial[mx.array],
    index_queries: mx.array,
    index_keys: mx.array,
    offset: Offset,
    block_size: int,
    tile_bytes: int,
) -> mx.array:
    """Choose blocks for rows without padding, a tile of queries at a time."""
    batch, groups, length, _ = index_queries.shape
    n_blocks = -(-index_keys.shape[2] // block_size)
    if index_keys.size * 4 <= tile_bytes // 8:
        # Cast once for all tiles, where that leaves most of the memory to the scores.
        index_keys = index_keys.astype(mx.float32)
        tile_bytes -= index_keys.size * 4
    # Choosing makes about eight copies of the scores of blocks.  They take half of the bytes at most.
    bytes_per_query = 8 * 4 * batch * groups * n_blocks
    tile_length = min(length, max(1, tile_bytes // (2 * bytes_per_query)))
    scores_bytes = tile_bytes - tile_length * bytes_per_query

    def choose_tile(start: int, queries: mx.array) -> mx.array:
        first = later(offset, start)
        return choose(_block_scores(queries, index_keys, first, block_size, scores_bytes), first)

    return over_queries(choose_tile, index_queries, tile_length)


def _block_scores(
    queries: mx.array, index_keys: mx.array, offset: Offset, block_size: int, tile_bytes: int
) -> mx.array:
    """``[B, G, l, n_blocks]`` float32: the best visible key of each block, -inf where there is none."""
    batch, groups, length, _ = queries.shape
    n_keys = index_keys.shape[2]

    def pool_tile(start: int, queries: mx.array) -> mx.array:
        keys = index_keys[:, :, start : start + keys_per_tile]
        stop = start + keys.shape[2]
        if isinstance(offset, int) and start > offset + length - 1:
            # The whole tile is in the future of all queries.
            return mx.full((batch, groups, length, -(-(stop - start) // block_size)), -mx.inf)
        scores = _scores(queries, keys, groups)
        if not isinstance(offset, int) or stop - 1 > offset:
            scores = _mask_future(scores, start, offset)
        return _pool(scores, block_size)

    keys_per_tile = _keys_per_tile(queries, index_keys, block_size, tile_bytes)
    return _over_keys(pool_tile, queries, n_keys, keys_per_tile)


def _keys_per_tile(queries: mx.array, index_keys: mx.array, block_size: int, tile_bytes: int) -> int:
    batch, groups, length, dims = queries.shape
    cast = 0 if index_keys.dtype == mx.float32 else 4
    copy = index_keys.dtype.size if transposed_is_copied(groups * length) else 0
    ahead = _KEYS_AHEAD if on_gpu() else _KEYS_AHEAD_ON_CPU
    bytes_per_key = batch * (_SCORES_AHEAD * 4 * groups * length + ahead * (cast + copy) * dims)
    return max(1, tile_bytes // (bytes_per_key * block_size)) * block_size


def _over_keys(
    compute: Callable[[int, mx.array], mx.array], queries: mx.array, n_keys: int, keys_per_tile: int
) -> mx.array:
    """``compute(start, float32 rows of queries)`` for tiles of keys, put together along the last axis."""
    rows = queries.astype(mx.float32).flatten(1, 2)[:, None]
    tiles = [(start, rows) for start in range(0, n_keys, keys_per_tile)]
    return joined(in_sequence(compute, tiles), axis=-1)


def _scores(rows: mx.array, keys: mx.array, groups: int) -> mx.array:
    """``[B, 1, G * l, D]`` float32 and keys ``[B, 1, n, D]`` -> ``[B, G, l, n]``.

    The raw dot product: a positive scale would not change any choice.  The heads are rows of one
    product, so that keys are read once for all of them.
    """
    # A tile's keys are cast after the tile before, which the rows depend on.
    keys = mx.depends(keys, rows)
    scores = rows @ transposed(keys, uses=rows.shape[2]).astype(mx.float32)
    return mx.unflatten(scores.squeeze(1), 1, (groups, -1))


def _of_padded_rows(
    choose: partial[mx.array],
    index_queries: mx.array,
    index_keys: mx.array,
    offset: Offset,
    left_padding: list[int],
    block_size: int,
    tile_bytes: int,
) -> mx.array:
    """Choose blocks for all rows at once: scores in the order of the slots, moved to content order."""
    batch, groups = index_queries.shape[:2]
    n_keys = index_keys.shape[2]
    tile_length = tile_bytes // _moved_scores_bytes(batch, groups, n_keys)
    # Slots past a row's last token repeat a score, which no query of that row is late enough to see.
    slots = mx.minimum(arange(n_keys) + mx.array(left_padding)[:, None], n_keys - 1)[:, None, None]

    def choose_tile(start: int, queries: mx.array) -> mx.array:
        first = later(offset, start)
        keys_per_tile = _keys_per_tile(queries, index_keys, block_size, tile_bytes // 2)

        def score_tile(key: int, rows: mx.array) -> mx.array:
            return _scores(rows, index_keys[:, :, key : key + keys_per_tile], groups)

        scores = _over_keys(score_tile, queries, n_keys, keys_per_tile)
        scores = mx.take_along_axis(scores, slots, axis=-1)
        return choose(_pool(_mask_future(scores, 0, first), block_size), first)

    return over_queries(choose_tile, index_queries, tile_length)


def _moved_scores_bytes(batch: int, groups: int, n_keys: int) -> int:
    """For one query of each group: half of them for scores in both orders and what pooling makes of them."""
    return 2 * 6 * 4 * batch * groups * n_keys


def _mask_future(scores: mx.array, first_key: int, offset: Offset) -> mx.array:
    # Before pooling: a future key must not win a block for itself.
    length, n_keys = scores.shape[-2:]
    return _visible_only(scores, arange(n_keys), mx.array(first_key), query_positions(offset, length))


@fused
def _visible_only(scores: mx.array, key: mx.array, first_key: mx.array, query_at: mx.array) -> mx.array:
    return mx.where(key + first_key <= query_at, scores, -mx.inf)


def _pool(scores: mx.array, block_size: int) -> mx.array:
    tail = -scores.shape[-1] % block_size
    if tail:
        scores = mx.pad(scores, [(0, 0), (0, 0), (0, 0), (0, tail)], constant_values=-mx.inf)
    return mx.unflatten(scores, -1, (-1, block_size)).max(axis=-1)
