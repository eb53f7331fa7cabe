"""The gradient of attention over chosen blocks, in tiles that keep nothing of the forward pass.

MLX's own derivative of a form in ``attend.py`` keeps the scores of all tiles until the backward pass.
Here each tile computes its weights again, as in FlashAttention (arXiv 2205.14135, algorithm 4), whatever
form computed the output.  The pairs of a query and a block are sorted by block, so that the gradients of a
block's K and V are one product over all pairs of a tile that share it.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx

from .by_pairs import NOTHING, blocks_of, exp_below, most_sortable, scaled, sorted_by_block, visible_only
from .common import Offset, Padding, arange, default_tile_bytes, fused, joined, transposed

# Of queries, keys and values.
Gradients: TypeAlias = tuple[mx.array, mx.array, mx.array]

# Float32 arrays of the size of a tile's scores that exist at the same time.
_ARRAYS = 9


def with_gradient(
    attend: Callable[[mx.array, mx.array, mx.array], mx.array],
    block_ids: mx.array,
    offset: Offset,
    left_padding: Padding,
    *,
    block_size: int,
    scale: float,
    tile_bytes: int | None = None,
) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """``attend``, a function of queries, keys and values, with the gradient that is computed here.

    The other arguments are those of :func:`.attend.attend`.  K and V are not quantized.
    """
    function: Any = mx.custom_function(attend)

    @function.vjp
    def gradients(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        queries, keys, values = primals
        batch, groups, n_slots = keys.shape[:3]
        offsets = [offset] * batch if isinstance(offset, int) else offset
        queries, cotangent = (mx.unflatten(x, 1, (groups, -1)) for x in (queries, cotangent))
        found: list[list[mx.array]] = [[], [], []]
        for row, padding in enumerate(left_padding or [0] * batch):
            for group in range(groups):
                entry = row, group
                of_entry = _of_group(
                    # After the row and group before.
                    mx.depends(queries[entry], found[0][-1:]),
                    keys[entry][padding:],
                    values[entry][padding:],
                    cotangent[entry],
                    block_ids[entry],
                    offsets[row],
                    block_size,
                    scale,
                    tile_bytes or default_tile_bytes(),
                )
                in_slots = of_entry[0], *(_fit(x, padding, n_slots) for x in of_entry[1:])
                for of_all, x in zip(found, in_slots, strict=True):
                    of_all.append(x)
        return [
            mx.stack(of_all).reshape(x.shape).astype(x.dtype)
            for of_all, x in zip(found, primals, strict=True)
        ]

    return function  # type: ignore[no-any-return]


def _of_group(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cotangent: mx.array,
    block_ids: mx.array,
    offset: int,
    block_size: int,
    scale: float,
    tile_bytes: int,
) -> Gradients:
    """Of queries ``[heads, L, D]``, keys and values ``[S, D]``, and block ids ``[L, k]``."""
    heads, length, _ = queries.shape
    n_blocks, k = blocks_of(offset + length, block_size), block_ids.shape[1]

    def blocks(x: mx.array) -> mx.array:
        x = _fit(mx.depends(x, queries), 0, n_blocks * block_size)
        return mx.unflatten(x, 0, (n_blocks, block_size)).astype(mx.float32)

    key_blocks, value_blocks = blocks(keys), blocks(values)
    uses = length * k * heads // n_blocks
    across = transposed(key_blocks, uses), transposed(value_blocks, uses)
    widest = max(block_size, keys.shape[1], values.shape[1])
    tile_length = max(1, tile_bytes // (_ARRAYS * 4 * heads * k * widest))
    tile_length = min(tile_length, most_sortable(n_blocks, k))
    d_queries: list[mx.array] = []
    d_keys, d_values = mx.zeros_like(key_blocks), mx.zeros_like(value_blocks)
    for start in range(0, length, tile_length):
        tile = slice(start, start + tile_length)
        # After the tile before.
        q = mx.depends(queries[:, tile], [d_keys, d_values, *d_queries[-1:]])
        d_q, d_k, d_v = _of_tile(
            scaled(q.swapaxes(0, 1), mx.array(scale)),
            key_blocks,
            *across,
            cotangent[:, tile].swapaxes(0, 1).astype(mx.float32),
            block_ids[tile],
            mx.array(offset + start),
        )
        d_queries.append((d_q * scale).swapaxes(0, 1).astype(queries.dtype))
        d_keys, d_values = d_keys + d_k, d_values + d_v
    return joined(d_queries, axis=1), d_keys.flatten(0, 1), d_values.flatten(0, 1)


def _fit(x: mx.array, before: int, length: int) -> mx.array:
    """``[n, D]`` -> ``[length, D]``: zeros before it, and cut or filled up with zeros after it."""
    x = x[: length - before]
    return mx.pad(x, [(before, length - before - x.shape[0]), (0, 0)])


def _of_tile(
    queries: mx.array,
    key_blocks: mx.array,
    keys_across: mx.array,
    values_across: mx.array,
    cotangent: mx.array,
    block_ids: mx.array,
    offset: mx.array,
) -> Gradients:
    """Of scaled queries ``[l, heads, D]``, and of all blocks ``[n_blocks, block_size, D]``; in float32."""
    n_blocks, block_size, _ = key_blocks.shape
    k, heads = block_ids.shape[1], queries.shape[1]
    length = mx.array(len(block_ids))
    order, query, block = sorted_by_block(block_ids, length, mx.array(n_blocks))
    back = mx.argsort(order)

    def total(x: mx.array) -> mx.array:
        """Over the pairs of each query."""
        return mx.unflatten(x[back], 0, (-1, k)).sum(axis=1)

    def product(x: mx.array, blocks: mx.array, x_index: mx.array) -> mx.array:
        return mx.gather_mm(x, blocks, lhs_indices=x_index, rhs_indices=block, sorted_indices=True)

    def of_blocks(x: mx.array, y: mx.array) -> mx.array:
        """``sum over the pairs of a block of x^T y``."""
        return mx.segmented_mm(x.flatten(0, 1).T, y[query].flatten(0, 1), segments)

    starts = (block < arange(n_blocks + 1)[:, None]).sum(axis=1).astype(mx.uint32) * heads
    segments = mx.stack([starts[:-1], starts[1:]], axis=1)

    scores = product(queries, keys_across, query)
    ids, queries_of = block_ids.flatten()[order][:, None, None], query[:, None, None]
    scores = visible_only(scores, ids, arange(block_size), queries_of, length, offset, block_size)
    largest = mx.unflatten(scores.max(axis=-1, keepdims=True)[back], 0, (-1, k)).max(axis=1)
    weights = exp_below(scores, mx.maximum(largest, NOTHING)[query])
    weights = _shares(weights, total(weights.sum(axis=-1, keepdims=True))[query])
    d_weights = product(cotangent, values_across, query)
    mean = total((weights * d_weights).sum(axis=-1, keepdims=True))[query]
    d_scores = _d_scores(weights, d_weights, mean)
    d_queries = total(product(d_scores, key_blocks, arange(query.size)))
    return d_queries, of_blocks(d_scores, queries), of_blocks(weights, cotangent)


@fused
def _shares(weights: mx.array, total: mx.array) -> mx.array:
    # Of a token it is at least 1; a padding query sees nothing.
    return weights / mx.maximum(total, 0.5)


@fused
def _d_scores(weights: mx.array, d_weights: mx.array, mean: mx.array) -> mx.array:
    return weights * (d_weights - mean)
