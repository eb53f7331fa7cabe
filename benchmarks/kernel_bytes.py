"""Bytes that the Metal kernels of ``mlx_m3_plugin.msa.kernels`` read and write, as their sources do.

What a threadgroup reads counts once for each threadgroup, also where a cache would answer it.  Nothing is
assumed about queries that choose the same blocks: every block that a query can see is chosen by some query.
Arrays of a few numbers (offsets, paddings) are left out.  All arguments and results are plain ints.
``tests/msa/test_kernel_bytes.py`` compares these formulas with what the kernels read when they run.
"""

from mlx_m3_plugin.msa.kernels import attend, scores


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block_scores_bytes(
    *, batch: int, groups: int, length: int, n_keys: int, dims: int, block_size: int, itemsize: int
) -> int:
    """Of :func:`block_scores`: index queries and keys in, float32 scores out."""
    rows, n_blocks = groups * length, cdiv(n_keys, block_size)
    written = batch * rows * n_blocks * 4
    if length == 1:
        # Each block is a threadgroup for every four rows.
        tiles, readers_of_queries = cdiv(rows, scores.FEW_ROWS), n_blocks
    else:
        _, _, tiles, blocks = scores.tiling(batch, rows, n_blocks, itemsize)
        readers_of_queries = cdiv(n_blocks, blocks)
    keys = batch * tiles * n_keys * dims * itemsize
    queries = batch * rows * dims * itemsize * readers_of_queries
    return keys + queries + written


def choose_blocks_bytes(*, batch: int, groups: int, length: int, n_blocks: int, k: int) -> int:
    """Of :func:`choose_blocks`: float32 scores in, int32 ids out."""
    return batch * groups * length * (n_blocks + k) * 4


def attend_bytes(
    *,
    batch: int,
    heads: int,
    groups: int,
    length: int,
    n_keys: int,
    k: int,
    dims: int,
    value_dims: int,
    block_size: int,
    itemsize: int,
    token_bytes: int | None = None,
) -> int:
    """Of :func:`attend_blocks` with its merge.  Not of sorting the pairs, which is MLX's own.

    Args:
        n_keys: keys that the last query can see.
        itemsize: bytes of an element of queries and output.
        token_bytes: of one token's K and V of one group; of ``itemsize`` elements if not given.
    """
    token_bytes = token_bytes or (dims + value_dims) * itemsize
    n_pairs, per_group = batch * groups * length * k, heads // groups
    threadgroups = cdiv(n_pairs, attend.pairs_of_a_threadgroup(n_pairs, length))
    lists = batch * groups * cdiv(n_keys, block_size)
    # A threadgroup reads a block anew where its first pair is in the middle of a list, and at each new list.
    blocks_read = min(n_pairs, threadgroups + lists)
    pairs_in = n_pairs * (per_group * dims * itemsize + 2 * 4)  # queries, block id, number of the pair
    partials = n_pairs * per_group * (value_dims + 1) * 4
    merge = partials + batch * heads * length * value_dims * itemsize
    return blocks_read * block_size * token_bytes + pairs_in + partials + merge
