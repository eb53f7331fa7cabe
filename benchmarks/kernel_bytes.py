"""Bytes that the Metal kernels of ``mlx_m3_plugin.msa.kernels`` read and write, as their sources do.

What a threadgroup reads counts once for each threadgroup, also where a cache would answer it.  Nothing is
assumed about queries that choose the same blocks: every block that a query can see is chosen by some query.
Arrays of a few numbers (offsets, paddings) are left out.  All arguments and results are plain ints.
``tests/msa/test_kernel_bytes.py`` compares these formulas with what the kernels read when they run.
"""

from collections.abc import Callable
from math import prod
from typing import Any

from mlx_m3_plugin.msa.kernels import attend, scores


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block_scores_bytes(
    *, batch: int, groups: int, length: int, n_keys: int, dims: int, block_size: int, itemsize: int
) -> int:
    """Index queries and keys in, float32 scores out."""
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
    """Float32 scores in, int32 ids out."""
    return batch * groups * length * (n_blocks + k) * 4


def attend_pairs_bytes(
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
    """Queries, K and V in, float32 partial outputs out.  Sorting the pairs is MLX's own and not in it.

    Args:
        n_keys: keys that the last query can see.
        itemsize: bytes of an element of the queries.
        token_bytes: of one token's K and V of one group; of ``itemsize`` elements if not given.
    """
    token_bytes = token_bytes or (dims + value_dims) * itemsize
    n_pairs, per_group = batch * groups * length * k, heads // groups
    threadgroups = cdiv(n_pairs, attend.pairs_of_a_threadgroup(n_pairs, length))
    lists = batch * groups * cdiv(n_keys, block_size)
    # A threadgroup reads a block anew where its first pair is in the middle of a list, and at each new list.
    blocks_read = min(n_pairs, threadgroups + lists)
    # Queries, the block's id, and the pair's place in the order.
    pairs_in = n_pairs * (per_group * dims * itemsize + (2 if length >= attend.SORT_FROM else 1) * 4)
    return blocks_read * block_size * token_bytes + pairs_in + n_pairs * per_group * (value_dims + 1) * 4


def merge_pairs_bytes(*, batch: int, heads: int, length: int, k: int, value_dims: int, itemsize: int) -> int:
    """Float32 partial outputs in, the output out."""
    rows = batch * heads * length
    return rows * k * (value_dims + 1) * 4 + rows * value_dims * itemsize


# Of a call in a graph: ``inputs`` are arrays, ``outputs`` are (shape, dtype), ``template`` is a dict.


def _block_scores(call: Any) -> tuple[int, int]:
    queries, keys = call.inputs[:2]
    batch, groups, length, dims = queries.shape
    block_size, n_blocks = call.template["BLOCK"], call.outputs[0][0][3]
    n_keys = min(n_blocks * block_size, keys.shape[2])
    moved = block_scores_bytes(
        batch=batch,
        groups=groups,
        length=length,
        n_keys=n_keys,
        dims=dims,
        block_size=block_size,
        itemsize=queries.dtype.size,
    )
    return moved, 2 * prod(queries.shape) * n_keys


def _choose_blocks(call: Any) -> tuple[int, int]:
    batch, groups, length, n_blocks = call.inputs[0].shape
    k = call.template["K"]
    moved = choose_blocks_bytes(batch=batch, groups=groups, length=length, n_blocks=n_blocks, k=k)
    return moved, batch * groups * length * n_blocks


def _attend_pairs(call: Any) -> tuple[int, int]:
    queries, *rest = call.inputs
    block_ids, tokens = rest[-6], rest[:-6]
    batch, groups, length, k = block_ids.shape
    dims, value_dims, block_size = (call.template[name] for name in ("D", "DV", "BLOCK"))
    moved = attend_pairs_bytes(
        batch=batch,
        heads=queries.shape[1],
        groups=groups,
        length=length,
        n_keys=tokens[0].shape[2],
        k=k,
        dims=dims,
        value_dims=value_dims,
        block_size=block_size,
        itemsize=queries.dtype.size,
        token_bytes=sum(x.shape[3] * x.dtype.size for x in tokens),
    )
    rows = batch * queries.shape[1] * length * k
    return moved, 2 * rows * block_size * (dims + value_dims)


def _merge_pairs(call: Any) -> tuple[int, int]:
    n_pairs, _, value_dims = call.inputs[0].shape
    shape, dtype = call.outputs[0]
    batch, heads, length, _ = shape
    k = n_pairs * call.template["HEADS"] // (batch * heads * length)
    moved = merge_pairs_bytes(
        batch=batch, heads=heads, length=length, k=k, value_dims=value_dims, itemsize=dtype.size
    )
    return moved, 2 * prod(shape) * k


# The beginning of a kernel's name -> (bytes, operations) of a call.
COSTS: dict[str, Callable[[Any], tuple[int, int]]] = {
    "mlx_m3_plugin_block_scores": _block_scores,
    "mlx_m3_plugin_choose_blocks": _choose_blocks,
    "mlx_m3_plugin_attend_pairs": _attend_pairs,
    "mlx_m3_plugin_merge_pairs": _merge_pairs,
}
