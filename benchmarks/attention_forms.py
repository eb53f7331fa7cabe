"""The engine's two forms of attention over chosen blocks, against each other.

    python benchmarks/attention_forms.py [--context 32768]

``msa/attend.py`` takes sorted (query, block) pairs from PAIRS_FROM queries on, and gathers per query below
that and for keys in 16 bits.  Here both run at every length, in float32 and bfloat16, with M3's head sizes.
A ratio above 1 says that gathering is the faster one.
"""

import argparse
from collections.abc import Callable

import mlx.core as mx
from kernels import medians
from msa_layers import BLOCK, GROUPS, HEAD_DIM, HEADS, TOPK

from mlx_m3_plugin.msa.attend import PAIRS_FROM, _attend_by_pairs, _attend_by_query

QUERIES = (1, 4, 8, 16, 32, 64, 256, 2048)
BUDGET_BYTES = 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--queries", type=int, nargs="+", default=QUERIES)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{mx.default_device()}, {arguments.context:,} keys; the engine takes pairs from {PAIRS_FROM} on")
    print("| dtype | queries | gathering, ms | pairs, ms | pairs / gathering | largest difference |")
    print("|---|--:|--:|--:|--:|--:|")
    for dtype in (mx.float32, mx.bfloat16):
        for queries in arguments.queries:
            print(row(dtype, queries, arguments.context, arguments.rounds), flush=True)


def row(dtype: mx.Dtype, queries: int, context: int, rounds: int) -> str:
    forms = both_forms(dtype, queries, context)
    name = str(dtype).rpartition(".")[2]
    try:
        outputs = [form() for form in forms]
        mx.eval(outputs)
    except (RuntimeError, ValueError) as error:
        return f"| {name} | {queries} | | | not on this backend: {str(error).splitlines()[0]} | |"
    difference = mx.abs(outputs[0].astype(mx.float32) - outputs[1].astype(mx.float32)).max().item()
    gathering, pairs = (1000 * seconds for seconds in medians(forms, rounds))
    cells = [
        name,
        queries,
        f"{gathering:.2f}",
        f"{pairs:.2f}",
        f"**{pairs / gathering:.2f}**",
        f"{difference:.1e}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def both_forms(dtype: mx.Dtype, queries: int, context: int) -> list[Callable[[], mx.array]]:
    """Gathering and pairs, on the last ``queries`` of ``context`` positions with random blocks."""
    offset = context - queries
    keys, values = (mx.random.normal((1, GROUPS, context, HEAD_DIM)).astype(dtype) for _ in "kv")
    q = mx.random.normal((1, HEADS, queries, HEAD_DIM)).astype(dtype)
    scores = mx.random.uniform(shape=(1, GROUPS, queries, offset // BLOCK))
    blocks = mx.argsort(scores, axis=-1)[..., :TOPK].astype(mx.int32)
    mx.eval(keys, values, q, blocks)
    given = (BLOCK, HEAD_DIM**-0.5, BUDGET_BYTES)
    return [
        lambda: _attend_by_query(q, keys, values, blocks, offset, None, *given),
        lambda: _attend_by_pairs(q, keys, values, blocks, offset, *given),
    ]


if __name__ == "__main__":
    main()
