"""Positions of queries, and doing a long computation in tiles."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import mlx.core as mx

# The content position of the first query: one for all rows, or ``[B]`` int32.
Position: TypeAlias = int | mx.array


def default_memory_budget() -> int:
    """Bytes for the intermediate arrays of a tile.

    A CPU is fastest with tiles near its caches: memory that is new to the process costs it more
    than arithmetic.  A GPU wants enough work in each kernel to be worth its start.
    """
    return 16 << 20 if mx.default_device() == mx.cpu else 512 << 20


def query_positions(offset: Position, length: int) -> mx.array:
    """Content positions of ``length`` queries, ``[1 or B, 1, length, 1]``."""
    return (mx.array(offset).reshape(-1, 1) + mx.arange(length))[:, None, :, None]


def rows_apart(offset: Position, left_padding: mx.array) -> Iterator[tuple[slice, int, int]]:
    """Each row as ``(slice of the batch axis, its offset, its padding)``; waits for their values."""
    paddings: Any = left_padding.tolist()
    offsets: Any = [offset] * len(paddings) if isinstance(offset, int) else offset.tolist()
    for row, (first, padding) in enumerate(zip(offsets, paddings, strict=True)):
        yield slice(row, row + 1), first, padding


def in_sequence(
    compute: Callable[[int, mx.array], mx.array], tiles: Sequence[tuple[int, mx.array]]
) -> list[mx.array]:
    """``[compute(start, tile) for start, tile in tiles]``, ordered in the graph.

    Each tile's input depends on the result before it.  Without that MLX may run several tiles
    side by side, and their intermediate arrays exist at the same time.
    """
    results: list[mx.array] = []
    for start, tile in tiles:
        results.append(compute(start, mx.depends(tile, results[-1]) if results else tile))
    return results


def over_queries(compute: Callable[[int, mx.array], mx.array], queries: mx.array, rows: int) -> mx.array:
    """``compute(start, tile)`` for tiles of ``rows`` queries ``[B, H, L, D]``, put together along L."""
    length = queries.shape[2]
    tiles = [(start, queries[:, :, start : start + rows]) for start in range(0, length, rows)]
    return mx.concatenate(in_sequence(compute, tiles), axis=2)


def transposed(x: mx.array, uses: int) -> mx.array:
    """``[..., m, n]`` -> ``[..., n, m]``, to be multiplied with ``uses`` rows.

    The BLAS of MLX's CPU wheels multiplies by a transposed matrix at two thirds of its rate, so
    from some tens of rows on it is worth a copy there (``benchmarks/kernels.py``).
    """
    x = x.swapaxes(-1, -2)
    return mx.contiguous(x) if uses >= 64 and mx.default_device() == mx.cpu else x
