"""The forms of attention over chosen blocks, against each other: by query, by pairs, densely.

    python benchmarks/attention_forms.py [--context 32768]

``msa/attend.py`` chooses one of them by bytes and arithmetic, at the rates in its tables.  Here all run at
every length, in float32 and bfloat16, with M3's head sizes.  The form that it would choose is in bold.
"""

import argparse
from collections.abc import Callable
from functools import partial

import mlx.core as mx
from kernels import medians
from msa_layers import BLOCK, GROUPS, HEAD_DIM, HEADS, TOPK

from mlx_m3_plugin.msa import attend
from mlx_m3_plugin.msa.attend import CPU, FORMS, Work, choose_form, rates_here
from mlx_m3_plugin.msa.common import Chosen, default_tile_bytes, on_gpu

QUERIES = (1, 4, 8, 16, 32, 64, 256, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--queries", type=int, nargs="+", default=QUERIES)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{mx.default_device()}, {arguments.context:,} keys; milliseconds, the chosen form in bold")
    print(f"| dtype | queries | {' | '.join(FORMS)} | largest difference |")
    print("|---|--:" + "|--:" * (len(FORMS) + 1) + "|")
    for dtype in (mx.float32, mx.bfloat16):
        for queries in arguments.queries:
            print(row(dtype, queries, arguments.context, arguments.rounds), flush=True)


def row(dtype: mx.Dtype, queries: int, context: int, rounds: int) -> str:
    forms, chosen = all_forms(dtype, queries, context)
    name = str(dtype).rpartition(".")[2]
    try:
        outputs = [form().astype(mx.float32) for form in forms]
        mx.eval(outputs)
    except (RuntimeError, ValueError) as error:
        return f"| {name} | {queries} | not on this backend: {str(error).splitlines()[0]} | | | |"
    difference = max(mx.abs(output - outputs[0]).max().item() for output in outputs)
    times = [f"{1000 * seconds:.2f}" for seconds in medians(forms, rounds)]
    cells = [f"**{time}**" if form == chosen else time for form, time in zip(FORMS, times, strict=True)]
    return "| " + " | ".join([name, str(queries), *cells, f"{difference:.1e}"]) + " |"


def all_forms(dtype: mx.Dtype, queries: int, context: int) -> tuple[list[Callable[[], mx.array]], str]:
    """Each form, on the last ``queries`` of ``context`` positions with random blocks; the one chosen."""
    offset = context - queries
    keys, values = (mx.random.normal((1, GROUPS, context, HEAD_DIM)).astype(dtype) for _ in "kv")
    q = mx.random.normal((1, HEADS, queries, HEAD_DIM)).astype(dtype)
    scores = mx.random.uniform(shape=(1, GROUPS, queries, offset // BLOCK))
    blocks = mx.argsort(scores, axis=-1)[..., :TOPK].astype(mx.int32)
    mx.eval(keys, values, q, blocks)
    options = {"block_size": BLOCK, "scale": HEAD_DIM**-0.5}
    forms = [partial(attend, q, keys, values, blocks, offset, form=form, **options) for form in FORMS]
    work = Work.of(q, Chosen(keys, values, blocks, offset, None, BLOCK, HEAD_DIM**-0.5))
    return forms, choose_form(work, default_tile_bytes(), rates_here() if on_gpu() else CPU)


if __name__ == "__main__":
    main()
