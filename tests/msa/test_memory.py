"""The engine's memory on a CPU in bfloat16, at M3's head sizes: within its budget, whatever the context."""

from collections.abc import Callable

import mlx.core as mx
import pytest

from mlx_m3_plugin.msa import attend, select_blocks
from mlx_m3_plugin.msa.attend import CPU, Work, choose_form
from mlx_m3_plugin.msa.common import Chosen, default_tile_bytes
from mlx_m3_plugin.msa.gradient import with_gradient

BF16, DIMS, HEADS_PER_GROUP = mx.bfloat16, 128, 16
BLOCKS = {"block_size": 128, "topk_blocks": 16}
CONTEXTS = [8_192, 32_768, 131_072]

every_case = [
    pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"]),
    pytest.mark.parametrize("queries", [1, 16]),
    pytest.mark.parametrize("rows", [1, 4, 8]),
    pytest.mark.parametrize("context", CONTEXTS),
]


def in_every_case(test: Callable[..., None]) -> Callable[..., None]:
    for mark in every_case:
        test = mark(test)
    return test


def peak(function: Callable[[], mx.array]) -> int:
    """Bytes above what there is: the larger of two runs, because a busy machine runs ahead less far."""
    peaks = []
    for _ in range(2):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(function())
        peaks.append(mx.get_peak_memory() - before)
    return max(peaks)


def normal(*shape: int) -> mx.array:
    array = mx.random.normal(shape, dtype=BF16)
    mx.eval(array)
    return array


def positions(context: int, rows: int, queries: int, padded: bool) -> tuple:
    first = context - queries
    padding = [5 + 37 * row for row in range(rows)]
    return ([first - p for p in padding], padding) if padded else (first, None)


@pytest.mark.some(3)
@in_every_case
def test_selection(context: int, rows: int, queries: int, padded: bool) -> None:
    queries = max(1, queries // rows)
    index_queries, index_keys = normal(rows, 4, queries, DIMS), normal(rows, 1, context, DIMS)
    where = positions(context, rows, queries, padded)
    taken = peak(lambda: select_blocks(index_queries, index_keys, *where, **BLOCKS))
    # Beside the tiles there are the queries in float32, and what is returned.
    own = index_queries.size * 4 + 2 * rows * 4 * queries * BLOCKS["topk_blocks"] * 4
    assert taken <= default_tile_bytes() + own


@pytest.mark.some(3)
@in_every_case
def test_attention(
    context: int, rows: int, queries: int, padded: bool, count: Callable[[int, int], int]
) -> None:
    queries = max(1, queries // rows)
    groups = count(1, 4)
    q = normal(rows, groups * HEADS_PER_GROUP, queries, DIMS)
    keys, values = (mx.zeros((rows, groups, context, DIMS), BF16) for _ in range(2))
    # Blocks at random, and each query's own.
    n_blocks = (context - 512) // 128
    ids = mx.argsort(mx.random.uniform(shape=(rows, groups, queries, n_blocks)), axis=-1)[..., :16]
    ids = ids.astype(mx.int32)
    mx.eval(keys, values, ids)
    where = positions(context, rows, queries, padded)
    taken = peak(lambda: attend(q, keys, values, ids, *where, block_size=128, scale=DIMS**-0.5))
    tile = default_tile_bytes()
    work = Work.of(q, Chosen(keys, values, ids, *where, 128, DIMS**-0.5))
    copies = 4 * tile if choose_form(work, tile, CPU) == "by_pairs" else 0
    # Beside the tiles there are the queries in float32, and the output in tiles and as a whole.
    own = q.size * 4 + 2 * q.nbytes
    assert taken <= tile + copies + own


def test_a_gradient_keeps_nothing_of_the_forward_pass() -> None:
    context, queries, tile = 4_096, 128, 4 << 20
    q = mx.random.normal((1, HEADS_PER_GROUP, queries, DIMS))
    keys, values = (mx.random.normal((1, 1, context, DIMS)) for _ in range(2))
    ids = mx.argsort(mx.random.uniform(shape=(1, 1, queries, context // 128 - 1)), axis=-1)[..., :16]
    ids = ids.astype(mx.int32)
    mx.eval(q, keys, values, ids)
    where, options = (ids, context - queries, None), {"block_size": 128, "scale": 0.1, "tile_bytes": tile}

    def loss(q: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        attended = with_gradient(lambda *arrays: attend(*arrays, *where, **options), *where, **options)
        return attended(q, keys, values).sum()

    taken = peak(lambda: mx.grad(loss, argnums=[0, 1, 2])(q, keys, values))
    # K and V both ways, their gradients, and those of a tile; the output and gradients of queries in tiles.
    # The scores alone of all tiles are 64 times as large as q.
    assert taken <= tile + 7 * keys.nbytes + 4 * q.nbytes
