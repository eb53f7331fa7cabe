"""Rates of the primitives that the attention engine can be built from, on this machine.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --dtype bfloat16

Which form is fast is a property of the backend and changes with it: the reference BLAS inside
the Linux wheel of MLX runs ``a @ b`` and ``a @ b.T`` at different rates, and a large new array
costs more than the arithmetic that fills it.  Every row is the minimum of several runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx

KEYS, HEAD_DIM, BLOCK, GROUP_HEADS = 131072, 128, 128, 16


class Row(NamedTuple):
    name: str
    run: Callable[[], mx.array]
    flops: float = 0
    moved: float = 0
    items: float = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row (default: 0.5)")
    args = parser.parse_args()
    dtype = getattr(mx, args.dtype)
    print(f"# Rates of primitives, {args.dtype}, {mx.default_device()}, mlx {mx.__version__}\n")
    print(f"Copy bandwidth, read and written: {copy_bandwidth() / 1e9:.1f} GB/s. ", end="")
    print(f"Matrix product, best form, float32: {matmul_rate() / 1e9:.1f} GFLOP/s.\n")
    print("| primitive | ms | GFLOP/s | GB/s | M items/s |\n|---|--:|--:|--:|--:|")
    for rows in (products, elementwise, block_products, gathers, partitions, small_operations):
        for row in rows(dtype):
            print(table_row(row, args.seconds), flush=True)


def fastest(run: Callable[[], mx.array], seconds: float, at_least: int = 3) -> float:
    """Seconds of the fastest run, of as many as fit."""
    mx.eval(run())
    times: list[float] = []
    while len(times) < at_least or sum(times) < seconds:
        begin = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - begin)
    return min(times)


def copy_bandwidth(n_bytes: int = 1 << 28) -> float:
    """Bytes per second, read and written, of scaling a large array in its own place."""
    # In place, because fresh memory from the system costs more than the copy itself.
    held = [mx.zeros((n_bytes // 4,))]
    one = mx.array(1.0)
    mx.eval(held, one)

    def run() -> mx.array:
        held.append(held.pop() * one)
        return held[0]

    return 2 * n_bytes / fastest(run, 0.5, at_least=10)


def matmul_rate(size: int = 1024) -> float:
    """Operations per second of a large float32 product in whichever orientation is fastest."""
    a, b = (mx.random.normal((size, size)) for _ in range(2))
    mx.eval(a, b)
    forms = (lambda: a @ b, lambda: a @ b.T, lambda: a.T @ b)
    return 2 * size**3 / min(fastest(form, 0.5) for form in forms)


def products(dtype: mx.Dtype) -> Iterator[Row]:
    """Index scores: a few queries against all index keys."""
    keys = normal((KEYS, HEAD_DIM), dtype)
    blocks = keys.reshape(-1, BLOCK, HEAD_DIM)
    columns = mx.contiguous(keys.T)
    tiles = mx.contiguous(blocks.swapaxes(1, 2))
    mx.eval(columns, tiles)
    for rows in (4, 16, 64):
        queries = normal((rows, HEAD_DIM), dtype)
        upright = mx.contiguous(queries.T)
        mx.eval(upright)
        cost = {"flops": 2.0 * rows * keys.size, "moved": keys.nbytes}
        what = f"[{rows}, 128] · 131072 keys"
        yield Row(f"{what}: q @ k.T", lambda q=queries: q @ keys.T, **cost)
        yield Row(f"{what}: k @ q.T", lambda q=queries: keys @ q.T, **cost)
        yield Row(f"{what}: k @ q.T, q.T stored", lambda q=upright: keys @ q, **cost)
        yield Row(f"{what}: q @ k.T by blocks of 128", lambda q=queries: q @ blocks.swapaxes(1, 2), **cost)
        yield Row(f"{what}: k.T stored", lambda q=queries: q @ columns, **cost)
        yield Row(f"{what}: k.T stored by blocks", lambda q=queries: q @ tiles, **cost)


def elementwise(dtype: mx.Dtype) -> Iterator[Row]:
    """What goes around the products: reductions, softmax, and the price of a new array."""
    keys = normal((KEYS, HEAD_DIM), dtype)
    query = normal((HEAD_DIM,), dtype)
    per_item = {"moved": keys.nbytes, "items": keys.size}
    yield Row("sum of 131072 x 128", lambda: keys.sum(), **per_item)
    yield Row("max over the last axis of [131072, 128]", lambda: keys.max(axis=-1), **per_item)
    yield Row(
        "max over the middle axis of [1024, 128, 128]", lambda: keys.reshape(-1, 128, 128).max(1), **per_item
    )
    yield Row("(k * q).sum(-1), one query", lambda: (keys * query).sum(-1), flops=2 * keys.size, **per_item)
    for rows in (64, 4096):
        scores = normal((rows, 2048), dtype)
        yield Row(f"exp of [{rows}, 2048]", lambda x=scores: mx.exp(x), items=scores.size)
        yield Row(f"softmax of [{rows}, 2048]", lambda x=scores: mx.softmax(x, axis=-1), items=scores.size)
        yield Row(
            f"softmax, precise, of [{rows}, 2048]",
            lambda x=scores: mx.softmax(x, -1, precise=True),
            items=scores.size,
        )
    for kib in (256, 4096, 65536):
        source = normal((kib * 1024 // dtype.size,), dtype)
        yield Row(
            f"x + 1 into a new array of {kib} KiB",
            lambda x=source: x + 1,
            moved=2 * source.nbytes,
            items=source.size,
        )


def block_products(dtype: mx.Dtype) -> Iterator[Row]:
    """Attention as a mixture of key blocks: 16 heads of a group against chosen blocks of K or V."""
    blocks = normal((1024, BLOCK, HEAD_DIM), dtype)
    packed = {
        (bits, size): mx.quantize(blocks, group_size=size, bits=bits) for bits in (8, 4) for size in (32, 64)
    }
    mx.eval(packed)
    for pairs in (64, 4096):
        heads = normal((pairs, GROUP_HEADS, HEAD_DIM), dtype)
        ids = mx.sort(mx.random.randint(0, len(blocks), (pairs,)))
        mx.eval(ids)
        flops = 2.0 * heads.size * BLOCK
        what = f"{pairs} pairs [16, 128] · [128, 128]"

        def dense(transposed: bool, heads: mx.array = heads, ids: mx.array = ids) -> mx.array:
            right = blocks.swapaxes(1, 2) if transposed else blocks
            return mx.gather_mm(heads, right, rhs_indices=ids, sorted_indices=True)

        def quantized(
            bits: int, size: int, transpose: bool, heads: mx.array = heads, ids: mx.array = ids
        ) -> mx.array:
            options = {"transpose": transpose, "group_size": size, "bits": bits, "sorted_indices": True}
            return mx.gather_qmm(heads, *packed[bits, size], rhs_indices=ids, **options)

        yield Row(f"{what}: gather_mm, scores (k.T)", lambda f=dense: f(True), flops)
        yield Row(f"{what}: gather_mm, values", lambda f=dense: f(False), flops)
        yield Row(
            f"{what}: matmul of gathered blocks", lambda h=heads, i=ids: h @ blocks[i].swapaxes(1, 2), flops
        )
        for bits, size in packed:
            for transpose, role in ((True, "scores (k.T)"), (False, "values")):
                name = f"{what}: gather_qmm, {bits} bits, groups of {size}, {role}"
                yield Row(name, lambda f=quantized, a=(bits, size, transpose): f(*a), flops)


def gathers(dtype: mx.Dtype) -> Iterator[Row]:
    """Copies of the chosen blocks of one decode step: 4 groups, 16 blocks each."""
    keys = normal((1, 4, KEYS, HEAD_DIM), dtype)
    blocks = keys.reshape(4, -1, BLOCK, HEAD_DIM)
    ids = mx.random.randint(0, KEYS // BLOCK, (4, 16))
    tokens = (ids[..., None] * BLOCK + mx.arange(BLOCK)).reshape(1, 4, -1, 1)
    wide = mx.broadcast_to(tokens, (1, 4, 16 * BLOCK, HEAD_DIM))
    groups = mx.arange(4)[:, None]
    mx.eval(ids, tokens, wide, groups)
    moved = 2 * 4 * 16 * BLOCK * HEAD_DIM * dtype.size
    yield Row(
        "4 x 16 blocks: take_along_axis of tokens",
        lambda: mx.take_along_axis(keys, wide, axis=2),
        moved=moved,
    )
    yield Row("4 x 16 blocks: blocks[group, id]", lambda: blocks[groups, ids], moved=moved)
    flat, flat_ids = blocks.flatten(0, 1), (groups * (KEYS // BLOCK) + ids).flatten()
    yield Row("4 x 16 blocks: take of flat ids", lambda: mx.take(flat, flat_ids, axis=0), moved=moved)


def partitions(dtype: mx.Dtype) -> Iterator[Row]:
    """Choosing 16 of N blocks for 4 groups and L queries; block scores are float32 always."""
    for length, n_blocks in ((1, 1024), (1, 8192), (256, 256), (256, 1024), (2048, 1024)):
        scores = normal((4, length, n_blocks), mx.float32)
        what = f"of [4, {length}, {n_blocks}]"
        yield Row(
            f"argpartition {what}", lambda x=scores: mx.argpartition(x, kth=15, axis=-1), items=scores.size
        )
        yield Row(f"argsort {what}", lambda x=scores: mx.argsort(x, axis=-1), items=scores.size)


def small_operations(dtype: mx.Dtype) -> Iterator[Row]:
    """The price of an operation as such, which bounds a decode step at short context."""
    one = normal((16,), dtype)

    def chain() -> mx.array:
        x = one
        for _ in range(1000):
            x = x + one
        return x

    yield Row("1000 additions of 16 numbers, one after another", chain, items=1000)


def normal(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    array = mx.random.normal(shape).astype(dtype)
    mx.eval(array)
    return array


def medians(runs: list[Callable[[], mx.array]], rounds: int) -> list[float]:
    """Seconds of each run, which take turns, so that what else the machine does falls on all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, measured in zip(runs, times, strict=True):
            begin = time.perf_counter()
            mx.eval(run())
            measured.append(time.perf_counter() - begin)
    return [statistics.median(measured) for measured in times]


def table_row(row: Row, at_most: float) -> str:
    try:
        seconds = fastest(row.run, at_most)
    except RuntimeError as error:
        # Not every primitive takes every dtype on every backend.
        return f"| {row.name} | {str(error).splitlines()[0]} | | | |"
    rates = ((row.flops, 1e9), (row.moved, 1e9), (row.items, 1e6))
    cells = [f"{n / seconds / unit:.3g}" if n else "" for n, unit in rates]
    return "| " + " | ".join([row.name, f"{seconds * 1e3:.3f}", *cells]) + " |"


if __name__ == "__main__":
    main()
