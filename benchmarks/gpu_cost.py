"""What one decoder layer costs on a GPU: launches, bytes and operations of its graph; a forecast for Macs.

    python benchmarks/gpu_cost.py           # the main cases; writes docs/benchmarks/gpu_cost.md
    python benchmarks/gpu_cost.py --all --json cost.json

MiniMax-M3's real sizes, bf16 activations, 4-bit matrices and experts, a float32 router; ours, and the classes
of stock mlx-lm and mlx-vlm. Nothing is computed and the result is always the same, so that
``tests/test_gpu_cost.py`` can hold the main figures.

``graph_cost.py`` counts a graph, ``kernel_costs.py`` knows custom Metal kernels, ``gpu_layers.py`` has the
layers and the lower bound, ``gpu_count.py`` counts the cases, ``gpu_forecast.py`` has the rates of Macs.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path

from gpu_count import KERNELS, LIBRARIES, MLX_LM, MLX_VLM, OURS, Counted, bytes_of, count_library, to_json
from gpu_forecast import LAUNCH, M3_ULTRA, MACHINES, PREFILL, checks, seconds, token_check
from gpu_layers import Case, attention_flops, bound

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "gpu_cost.md"
K = 1024
# The cases that are shown by primitive, too.
IN_DETAIL = [Case(1, 8 * K), Case(1, 128 * K), Case(512, 8 * K), Case(2048, 32 * K)]
MAIN = [
    Case(1, 1 * K),
    *IN_DETAIL[:2],
    Case(1, 1024 * K),
    Case(1, 8 * K, padded=True),
    Case(1, 8 * K, rows=8),
    Case(1, 8 * K, rows=8, padded=True),
    Case(1, 8 * K, kv_bits=8),
    Case(1, 8 * K, layer="dense"),
    IN_DETAIL[2],
    Case(512, 8 * K, rows=4, padded=True),
    Case(512, 8 * K, kv_bits=8),
    Case(512, 8 * K, layer="dense"),
    IN_DETAIL[3],
    Case(2048, 128 * K),
]
Results = dict[str, dict[Case, Counted]]


def all_cases() -> list[Case]:
    works = [
        *product([1], [1 * K, 8 * K, 32 * K, 128 * K, 1024 * K], [1, 4, 8]),
        *product([512, 2048, 4096], [8 * K, 32 * K, 128 * K], [1]),
    ]
    kinds = [(False, 16), (True, 16), (False, 8)]
    return [Case(*work, *kind, layer) for layer, work, kind in product(["sparse", "dense"], works, kinds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="all lengths, rows, paddings and kinds of K and V")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all counts, by operation")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE", help="the Markdown page")
    arguments = parser.parse_args()
    cases = all_cases() if arguments.all else MAIN
    results = {library: count_library(library, cases) for library in LIBRARIES}
    text = "\n".join(page(cases, results)) + "\n"
    print(text)
    arguments.output.write_text(text, encoding="utf-8")
    if arguments.json:
        counts = {library: [to_json(c) for c in counted.values()] for library, counted in results.items()}
        arguments.json.write_text(json.dumps(counts) + "\n", encoding="utf-8")


# --- the page ---


def page(cases: Sequence[Case], results: Results) -> Iterator[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx-m3-plugin", "mlx-lm", "mlx-vlm", "mlx"))
    yield INTRODUCTION.format(versions=versions)
    yield "\n## Launches and bytes\n"
    head = ["case", "launches", *OTHERS, "MB", *OTHERS, "bound", "experts' MB", "bound"]
    yield from table(head, counts(cases, results))
    yield AFTER_COUNTS
    yield "\n## Attention and selection\n"
    head = ["case", "attention GFLOP", *OTHERS, "bound", "selection MB", "attention MB", "both, launches"]
    yield from table(head, arithmetic(cases, results))
    yield "\nThe last three columns are ours: `msa.select_blocks` and `msa.attend` as graphs of their own."
    yield "\n## Forecast, milliseconds a layer\n"
    yield FORECAST.format(launch=1e6 * LAUNCH)
    head = ["case", *(f"{machine.name}: {' / '.join(LIBRARIES)}" for machine in MACHINES)]
    yield from table(head, forecasts(cases, results))
    yield ""
    yield from table(["machine", "GB/s", *(f"{rate}, TFLOP/s" for rate in M3_ULTRA.rates), "source"], rates())
    yield "\n## The forecast against published times\n"
    yield CHECKS
    head = ["work", "published ms", "forecast ms", "forecast / published", ""]
    yield from table(head, check_rows(results))
    yield "\nForms of attention on an M3 Ultra:\n"
    yield from table(["form", "MB", "GFLOP", "ms"], form_rows(cases, results))
    for case in IN_DETAIL:
        if case in cases:
            yield f"\n## {case}, by primitive\n"
            head = ["primitive", *(f"{library}: launches, MB, GFLOP" for library in LIBRARIES)]
            yield from table(head, primitives(case, results))


OTHERS = [KERNELS, MLX_LM, MLX_VLM]
INTRODUCTION = """# What a layer costs on a GPU

Regenerate with `python benchmarks/gpu_cost.py`. Counted from graphs; **no time here was measured by us**.

{versions}. One decoder layer at MiniMax-M3's real sizes, bf16 activations, matrices and experts in 4 bits
(groups of 64), float32 router. "1 at 8K" is one new token after 8,192 in the cache. Padded rows are in a
batch cache, as a server's are. A view takes nothing, a reshape that must copy is a launch; fused operations
and compiled elementwise functions are one launch each. Routed experts are apart: their bytes follow from the
number of tokens (the different experts expected, drawn evenly)."""
AFTER_COUNTS = """
MB without routed experts; stock mlx-vlm packs the shared expert (32 MB) with them. The bound: weights, index
keys, chosen K and V, and the layer's input and output once. An empty cell: the library has no such cache."""
FORECAST = """A forecast from published rates, not a measurement: each operation takes the longer of moving
its bytes and multiplying, and each launch {launch:g} us on top. `benchmarks/on_a_mac.py --only engine`
measures these cases on a Mac.
"""
CHECKS = """Published times on an M3 Ultra (parts of a layer of ThunderMLX, a token of oMLX), and what this
rule forecasts for their work. Rates that were derived from a line are marked: no proof there.
"""


def table(head: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|:--" + "|--:" * (len(head) - 1) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def of_libraries(case: Case, results: Results, what: str, unit: float = 1) -> list[str]:
    counted = [results[library][case] for library in (OURS, *OTHERS)]
    return ["" if c.missing else number(getattr(c, what) / unit) for c in counted]


def counts(cases: Sequence[Case], results: Results) -> Iterator[list[str]]:
    for case in cases:
        if results[OURS][case].missing:
            continue
        moved, _ = bound(case)
        experts = moved.pop("experts")
        launches = of_libraries(case, results, "launches")
        megabytes = of_libraries(case, results, "other_bytes", 1e6)
        ours = results[OURS][case].expert_bytes
        yield [
            str(case),
            *launches,
            *megabytes,
            number(sum(moved.values()) / 1e6),
            number(ours / 1e6),
            number(experts / 1e6),
        ]


def arithmetic(cases: Sequence[Case], results: Results) -> Iterator[list[str]]:
    for case in cases:
        counted = results[OURS][case]
        if not counted.parts:
            continue
        flops = of_libraries(case, results, "attention_flops", 1e9)
        parts = [number(bytes_of(counted.parts[name]) / 1e6) for name in ("selection", "attention")]
        launches = sum(n * work.launches for part in counted.parts.values() for work, n in part.items())
        yield [str(case), *flops, number(attention_flops(case) / 1e9), *parts, number(launches)]


def forecasts(cases: Sequence[Case], results: Results) -> Iterator[list[str]]:
    for case in cases:
        counted = [results[library][case] for library in (OURS, *OTHERS)]
        if not counted[0].missing:
            yield [
                str(case),
                *(
                    " / ".join("-" if c.missing else number(1e3 * seconds(c.total, machine)) for c in counted)
                    for machine in MACHINES
                ),
            ]


def rates() -> Iterator[list[str]]:
    for machine in MACHINES:
        yield [
            machine.name,
            f"{machine.bandwidth:g}",
            *(f"{rate:g}" for rate in machine.rates.values()),
            machine.source,
        ]


def check_rows(results: Results) -> Iterator[list[str]]:
    sparse, dense = (results[MLX_LM].get(Case(1, 8 * K, layer=layer)) for layer in ("sparse", "dense"))
    whole_token = token_check(sparse.total, dense.total) if sparse and dense else []
    for check in [*checks(), *whole_token]:
        fitted = "derived from it" if check.fitted else ""
        yield [check.part, number(check.published), number(check.forecast), f"{check.off:.2f}", fitted]


def form_rows(cases: Sequence[Case], results: Results) -> Iterator[list[str]]:
    """Ours and stock's dense attention for chunks, forecast; ThunderMLX's as published."""
    published = {(queries, context): parts["sparse attention"] for queries, context, parts in PREFILL}
    for case in IN_DETAIL:
        if case not in cases or case.queries == 1:
            continue
        ours, stock = results[OURS][case], results[MLX_LM][case]
        works = {"ours": ours.parts["attention"]}
        works |= {f"ours, {form}": work for form, work in ours.forms.items()}
        works |= {"mlx-lm, dense with a mask": stock.fused_attention}
        for form, work in works.items():
            flops = sum(n * operation.flops for operation, n in work.items())
            cells = bytes_of(work) / 1e6, flops / 1e9, 1e3 * seconds(work, M3_ULTRA)
            yield [f"{case}: {form}", *map(number, cells)]
        if (case.queries, case.context) in published:
            milliseconds = published[case.queries, case.context]
            yield [f"{case}: ThunderMLX, sorted by block (published)", "", "", number(milliseconds)]


def primitives(case: Case, results: Results) -> Iterator[list[str]]:
    by_library = {
        library: {row[0]: row for row in results[library][case].by_primitive()} for library in results
    }
    names = sorted(
        {name for rows in by_library.values() for name in rows},
        key=lambda name: (-max(rows[name][2] if name in rows else 0 for rows in by_library.values()), name),
    )
    for name in names:
        cells = []
        for rows in by_library.values():
            _, launches, moved, flops = rows.get(name, (name, 0, 0, 0))
            cells.append(f"{launches}, {number(moved / 1e6)}, {number(flops / 1e9)}" if launches else "")
        yield [name, *cells]


if __name__ == "__main__":
    main()
