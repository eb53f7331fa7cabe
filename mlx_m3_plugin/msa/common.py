"""Keys and values as MLX holds them, positions of queries, and computing in tiles."""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx

# The content position of the first query: one for all rows, or one for each.
Offset: TypeAlias = int | list[int]
# Bytes for the intermediate arrays of a tile on a GPU.
GPU_TILE_BYTES = 512 << 20
# The cache slots before each row's first token; None where there are none.
Padding: TypeAlias = list[int] | None


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


class Chosen(NamedTuple):
    """K and V, and the blocks of them that each query attends to; see :func:`.attend.attend`."""

    keys: KeysValues
    values: KeysValues
    block_ids: mx.array
    offset: Offset
    left_padding: Padding
    block_size: int
    scale: float

    def of_row(self, row: int) -> "Chosen":
        """One row without its padding."""
        padding = 0 if self.left_padding is None else self.left_padding[row]

        def cut(a: mx.array) -> mx.array:
            # One slot of padding is left where the row has nothing else yet.
            return a[row : row + 1, :, min(padding, a.shape[2] - 1) :]

        return self._replace(
            keys=map_arrays(cut, self.keys),
            values=map_arrays(cut, self.values),
            block_ids=self.block_ids[row : row + 1],
            offset=of_row(self.offset, row),
            left_padding=None,
        )


def on_gpu() -> bool:
    return mx.default_device() != mx.cpu


def default_tile_bytes() -> int:
    """Bytes for the intermediate arrays of a tile.

    A CPU is fastest with tiles about the size of its caches, because memory that is new to the
    process costs it more than arithmetic.  A GPU needs enough work in each kernel to repay its start.
    """
    return GPU_TILE_BYTES if on_gpu() else 16 << 20


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, a chain of elementwise operations, as one kernel on a GPU.

    It is traced once for all shapes, so it must not read a shape: what depends on one is an argument,
    for each value of which it is traced again.  On a CPU it runs as it is: there MLX would start a C++
    compiler, and gain nothing.
    """
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def call(*args: Any) -> Any:
        return compiled(*args) if on_gpu() else function(*args)

    return call


def arange(n: int) -> mx.array:
    """``[n]`` int32, a view of numbers made once: every layer of every token needs them."""
    return _first_numbers(1 << max(0, n - 1).bit_length())[:n]


@lru_cache(maxsize=32)
def _first_numbers(n: int) -> mx.array:
    # Evaluating waits for all that the device has to do, so that there must be few different n.
    numbers = mx.arange(n)
    mx.eval(numbers)
    return numbers


def query_positions(offset: Offset, length: int) -> mx.array:
    """Content positions of ``length`` queries, ``[1 or B, 1, length, 1]`` int32."""
    first = mx.array(offset, mx.int32).reshape(-1, 1, 1, 1)
    return first if length == 1 else first + arange(length)[:, None]


def of_row(offset: Offset, row: int) -> int:
    return offset if isinstance(offset, int) else offset[row]


def later(offset: Offset, n: int) -> Offset:
    """The position of the query ``n`` after the first."""
    return offset + n if isinstance(offset, int) else [first + n for first in offset]


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


def over_rows(compute: Callable[[int, mx.array], mx.array], queries: mx.array) -> mx.array:
    """``compute(row, its queries)`` of each row, put together."""
    rows = [(row, queries[row : row + 1]) for row in range(len(queries))]
    return joined(in_sequence(compute, rows), axis=0)


def over_queries(
    compute: Callable[[int, mx.array], mx.array], queries: mx.array, tile_length: int
) -> mx.array:
    """``compute(start, tile)`` for tiles of queries ``[B, H, tile_length, D]``, put together along L."""
    starts = range(0, queries.shape[2], tile_length)
    tiles = [(start, queries[:, :, start : start + tile_length]) for start in starts]
    return joined(in_sequence(compute, tiles), axis=2)


def joined(arrays: Sequence[mx.array], axis: int) -> mx.array:
    """``mx.concatenate``, which copies even a single array."""
    return arrays[0] if len(arrays) == 1 else mx.concatenate(list(arrays), axis=axis)


def transposed(x: mx.array, uses: int) -> mx.array:
    """``[..., m, n]`` -> ``[..., n, m]``, to be multiplied with ``uses`` rows.

    The BLAS of MLX's CPU wheels multiplies by a transposed matrix at two thirds of its rate, so
    from some tens of rows on it is worth a copy there (``benchmarks/kernels.py``).
    """
    x = x.swapaxes(-1, -2)
    return mx.contiguous(x) if transposed_is_copied(uses) else x


def transposed_is_copied(uses: int) -> bool:
    return uses >= 64 and not on_gpu()
