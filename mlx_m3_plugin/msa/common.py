"""Keys and values as MLX holds them, positions of queries, and computing in tiles."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx

# The content position of the first query: one for all rows, or ``[B]`` int32.
Position: TypeAlias = int | mx.array


class Quantized(NamedTuple):
    """Keys or values ``[B, G, S, D]`` from ``mx.quantize`` (affine).

    Attributes:
        weight: ``[B, G, S, D * bits / 32]`` uint32.
        scales: ``[B, G, S, D / group_size]``; ``biases``: likewise.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what was quantized."""
        return (*self.weight.shape[:-1], self.weight.shape[-1] * 32 // self.bits)

    def dequantize(self) -> mx.array:
        return mx.dequantize(
            self.weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits
        )


KeysValues: TypeAlias = mx.array | Quantized


def map_arrays(function: Callable[[mx.array], mx.array], x: KeysValues) -> KeysValues:
    """``function`` of an array; of each of the three arrays of a quantized one."""
    if not isinstance(x, Quantized):
        return function(x)
    return x._replace(weight=function(x.weight), scales=function(x.scales), biases=function(x.biases))


def default_tile_bytes() -> int:
    """Bytes for the intermediate arrays of a tile.

    A CPU is fastest with tiles about the size of its caches, because memory that is new to the
    process costs it more than arithmetic.  A GPU needs enough work in each kernel to repay its start.
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


def over_queries(
    compute: Callable[[int, mx.array], mx.array], queries: mx.array, tile_length: int
) -> mx.array:
    """``compute(start, tile)`` for tiles of queries ``[B, H, tile_length, D]``, put together along L."""
    starts = range(0, queries.shape[2], tile_length)
    tiles = [(start, queries[:, :, start : start + tile_length]) for start in starts]
    return mx.concatenate(in_sequence(compute, tiles), axis=2)


def transposed(x: mx.array, uses: int) -> mx.array:
    """``[..., m, n]`` -> ``[..., n, m]``, to be multiplied with ``uses`` rows.

    The BLAS of MLX's CPU wheels multiplies by a transposed matrix at two thirds of its rate, so
    from some tens of rows on it is worth a copy there (``benchmarks/kernels.py``).
    """
    x = x.swapaxes(-1, -2)
    return mx.contiguous(x) if uses >= 64 and mx.default_device() == mx.cpu else x
