"""One sparse attention layer at real head sizes: ours against upstream's, in the same run.

    python benchmarks/msa.py      # writes docs/benchmarks/msa.md and msa.png; a quarter of an hour
    python benchmarks/msa.py --quick --output build/msa

At every point each layer runs once and the outputs are compared; then the layers take turns,
so that what else the machine does falls on all of them alike.  Timed is the call of the layer
with the evaluation of its output and its cache; the new tokens are trimmed off again outside
of that.  Needs mlx-lm, mlx-vlm and matplotlib.
"""

import argparse
import json
import os
import platform
import random
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from kernels import copy_bandwidth, matmul_rate
from msa_layers import (
    HIDDEN,
    MLX_LM,
    MLX_VLM,
    OURS,
    Case,
    Layer,
    Run,
    build_layers,
    needed_bytes,
    needed_flops,
    random_contents,
    take_turns,
    upstream_bytes,
    weight_count,
)

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
DECODE = "1K 2K 4K 8K 16K 32K 65K 131K 262K 524K 1M"
PREFILL = "256@8K 256@32K 2048@32K 2048@131K"
LAYERS = (OURS, MLX_LM, MLX_VLM)
UPSTREAM_DECODE = 131072
UPSTREAM_PREFILL = 256 * 32768
# Where, against whom, in what, and how many times ours.
GOALS = [
    ("1 at 1K", MLX_LM, "min", 0.97),
    ("1 at 2K", MLX_LM, "min", 0.97),
    ("1 at 8K", MLX_LM, "min", 1),
    ("1 at 8K", MLX_VLM, "min", 1),
    ("1 at 131K", MLX_LM, "min", 25),
    ("1 at 131K", MLX_VLM, "min", 8),
    ("256 at 32K", MLX_LM, "min", 11),
    ("256 at 32K", MLX_LM, "transient_bytes", 40),
]
TOLERANCE = 1e-4
MIB = 1 << 20
Results = dict[str, Any]
Table = Iterator[list[str]]


def main() -> None:
    args = parse_arguments()
    pyplot = None if args.no_plot else import_pyplot()
    random.seed(args.seed)
    mx.random.seed(args.seed)
    results = measure(args)
    args.output.mkdir(parents=True, exist_ok=True)
    text = as_markdown(results)
    print(text)
    (args.output / "msa.md").write_text(text + "\n")
    if pyplot:
        plot(pyplot, results, args.output / "msa.png")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=vars) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decode", nargs="*", type=Case.parse, metavar="CONTEXT", help="8K 131K 100000")
    parser.add_argument("--prefill", nargs="*", type=Case.parse, metavar="QUERIES@CONTEXT")
    parser.add_argument("--all", action="store_true", help="upstream at every point that fits in memory")
    parser.add_argument("--quick", action="store_true", help="a few short lengths, under two minutes")
    parser.add_argument("--seconds", type=float, help="to repeat each layer at each point (default: 5)")
    parser.add_argument("--memory-gb", type=float, default=0.6 * physical_memory() / 1e9, help="for upstream")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of msa.md and msa.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers, with every repetition")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args()
    decode, prefill = ("1K 2K 8K 32K", "256@4K") if args.quick else (DECODE, PREFILL)
    args.decode = [Case.parse(word) for word in decode.split()] if args.decode is None else args.decode
    args.prefill = [Case.parse(word) for word in prefill.split()] if args.prefill is None else args.prefill
    args.seconds = args.seconds or (1 if args.quick else 5)
    return args


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def import_pyplot() -> Any:
    """Before the measurement, so that a missing library does not cost a finished run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def measure(args: argparse.Namespace) -> Results:
    layers = build_layers()
    rates = [machine_rates()]
    measured = []
    for case in args.decode + args.prefill:
        print(f"{case} ...", file=sys.stderr, flush=True)
        measured.append(measure_case(case, layers, args))
    rates.append(machine_rates())
    return {
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {mx.default_device()}",
        "versions": {name: version(name) for name in (*layers, "mlx")},
        "load_average": os.getloadavg()[1],
        "rates": {what: max(rate[what] for rate in rates) for what in rates[0]},
        "cases": measured,
    }


def machine_rates() -> dict[str, float]:
    return {"copy_bytes_per_second": copy_bandwidth(), "matmul_flops": matmul_rate()}


def measure_case(case: Case, layers: dict[str, Layer], args: argparse.Namespace) -> Results:
    running = {name: layer for name, layer in layers.items() if name == OURS or is_run(name, case, args)}
    contents = random_contents(case.context)
    x = mx.random.normal((1, case.queries, HIDDEN))
    mx.eval(x)
    caches = {name: layer.filled_cache(contents, case.queries) for name, layer in running.items()}
    del contents
    first = {name: layer.run(x, caches[name]) for name, layer in running.items()}
    output = compare({name: run.output for name, run in first.items()}, case)
    runs = take_turns(running, caches, x, first, args.seconds)
    n_weights = weight_count(layers[OURS].attention)
    return {
        "case": case,
        "needed_bytes": needed_bytes(case, n_weights),
        "needed_flops": needed_flops(case, n_weights),
        "output": output,
        "layers": {
            name: {**summary(runs[name]), "operations": layer.count_operations(x, caches[name])}
            for name, layer in running.items()
        },
        "not_run": {name: upstream_bytes(name, case) for name in layers if name not in running},
    }


def is_run(name: str, case: Case, args: argparse.Namespace) -> bool:
    """Whether an upstream layer fits in memory at this point, and in anybody's patience."""
    limit = UPSTREAM_DECODE if case.queries == 1 else UPSTREAM_PREFILL
    fits = sum(upstream_bytes(name, case).values()) <= args.memory_gb * 1e9
    return fits and (args.all or case.queries * case.context <= limit)


def compare(outputs: dict[str, mx.array], case: Case) -> Results:
    """Differences from ours, next to the root mean square of ours.

    Raises:
        SystemExit: ours and mlx-lm's differ, who both choose blocks per group as the paper does.
    """
    ours = outputs.pop(OURS)
    result = {"rms": rms(ours)}
    for name, output in outputs.items():
        by_query = mx.abs(ours - output).max(axis=(0, 2))
        largest, wrong = by_query.max().item(), (by_query > TOLERANCE).sum().item()
        result[name] = {"largest": largest, "rms": rms(ours - output)}
        if name == MLX_LM and not largest <= TOLERANCE:
            raise SystemExit(
                f"{case}: ours and mlx-lm's outputs differ by up to {largest:.2g}, in {wrong} of "
                f"{len(by_query)} queries. A single one may be a tie within rounding: try another --seed."
            )
    return result


def rms(x: mx.array) -> float:
    return x.square().mean().sqrt().item()


def summary(runs: list[Run]) -> Results:
    seconds = [run.seconds for run in runs]
    transient = max(run.transient_bytes for run in runs)
    return {"min": min(seconds), "median": median(seconds), "transient_bytes": transient, "seconds": seconds}


def as_markdown(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    copy = results["rates"]["copy_bytes_per_second"] / 1e9
    matmul = results["rates"]["matmul_flops"] / 1e9
    return "\n".join(
        [
            "# One sparse attention layer",
            "",
            "Regenerate with `python benchmarks/msa.py`; needs mlx-lm, mlx-vlm and matplotlib.",
            "",
            f"{versions}; {results['system']}; load average at the end {results['load_average']:.1f}.",
            "float32, batch 1, 64 query and 4 KV heads of 128, 4 index heads of 128, the best 16 blocks of "
            f"128, hidden size {HIDDEN}; random weights and caches. The context includes the new tokens.",
            "Times are minima of interleaved repetitions, medians in parentheses. Transient memory is the "
            "peak above inputs and caches.",
            f"MLX copies {copy:.1f} GB/s here (read and written) and multiplies matrices at {matmul:.1f} "
            "GFLOP/s; the fractions below are of these.",
            *section("Goals", goals(results)),
            *section("Decode: one token", decode_rows(results)),
            "",
            "mlx-vlm gathers its blocks for one token from 131,072 tokens on; below that it masks all keys.",
            *section("Decode: ours against what MSA must read and compute", bound_rows(results)),
            "",
            "![Time by context, growth, and memory of prefill](msa.png)",
            *section("Prefill", prefill_rows(results)),
            "",
            "\\* Not run. Computed from its shapes: index scores and masks; in parentheses with the "
            "attention scores, which are written out where no fused kernel takes such a mask, as on the CPU.",
            *section("Outputs: RMS of ours, and differences from it", output_rows(results)),
            "",
            "The run stops where mlx-lm's output is not ours. mlx-vlm makes one choice of blocks for all "
            "groups, which is another function as soon as there are more blocks than may be chosen.",
        ]
    )


def section(title: str, table: Table) -> list[str]:
    """A heading and a table whose first row is its head; nothing if there is no other row."""
    head, *body = table
    if not body:
        return []
    rule = [":--", *["--:"] * (len(head) - 1)]
    return ["", f"## {title}", "", *("| " + " | ".join(row) + " |" for row in (head, rule, *body))]


def goals(results: Results) -> Table:
    """The numbers that this engine was built to reach, where this run has measured them."""
    yield ["goal", "bound", "reached", ""]
    at = {str(case["case"]): case for case in results["cases"]}
    for where, name, quantity, bound in GOALS:
        value = times_ours(at[where], name, quantity) if where in at else None
        if value is not None:
            what = "time" if quantity == "min" else "transient memory"
            verdict = "met" if value >= bound else "**missed**"
            yield [f"{where}: {what} of {name} / ours", f">= {bound:g}", f"{value:.4g}", verdict]
    ours = {where: case["layers"][OURS] for where, case in at.items()}
    if "1 at 131K" in ours and "1 at 1M" in ours:
        growth = ours["1 at 1M"]["min"] / ours["1 at 131K"]["min"]
        yield ["1 at 1M: time / at 131K", "<= 8", f"{growth:.3g}", "met" if growth <= 8 else "**missed**"]
    if "2048 at 131K" in ours:
        mib = ours["2048 at 131K"]["transient_bytes"] / MIB
        yield ["2048 at 131K: transient MiB", "<= 512", f"{mib:.0f}", "met" if mib <= 512 else "**missed**"]


def decode_rows(results: Results) -> Table:
    head = ["context", *(f"{name} ms" for name in LAYERS), "mlx-lm / ours", "mlx-vlm / ours"]
    yield head + [f"{name} {what}" for what in ("MiB", "operations") for name in ("ours", MLX_LM, MLX_VLM)]
    for case in of_kind(results, decode=True):
        runs = [case["layers"].get(name) for name in LAYERS]
        yield [
            case["case"].length_name,
            *(f"{run['min'] * 1e3:.2f} ({run['median'] * 1e3:.2f})" if run else "" for run in runs),
            *(as_factor(case, name, "min") for name in LAYERS[1:]),
            *(f"{run['transient_bytes'] / MIB:.1f}" if run else "" for run in runs),
            *(str(run["operations"]) if run else "" for run in runs),
        ]


def bound_rows(results: Results) -> Table:
    head = ["context", "reads MiB", "ms at copy rate", "MFLOP", "ms at matmul rate", "ours ms"]
    yield [*head, "of copy rate", "of matmul rate", "time / at 131K", "context / 131K"]
    cases = of_kind(results, decode=True)
    # Growth counts from where the scan of the index keys outweighs the rest.
    start = next((case for case in cases if case["case"].context == UPSTREAM_DECODE), None)
    for case in cases:
        reading, computing = bounds(case, results)
        seconds, context = case["layers"][OURS]["min"], case["case"].context
        grows = start is not None and context >= UPSTREAM_DECODE
        yield [
            case["case"].length_name,
            f"{case['needed_bytes'] / MIB:.1f}",
            f"{reading * 1e3:.2f}",
            f"{case['needed_flops'] / 1e6:.0f}",
            f"{computing * 1e3:.2f}",
            f"{seconds * 1e3:.2f}",
            f"{reading / seconds:.1%}",
            f"{computing / seconds:.0%}",
            f"{seconds / start['layers'][OURS]['min']:.2f}" if grows else "",
            f"{context / UPSTREAM_DECODE:.2f}" if grows else "",
        ]


def prefill_rows(results: Results) -> Table:
    yield ["queries", "layer", "s", "/ ours", "transient MiB", "/ ours", "needs GFLOP", "of matmul rate"]
    for case in of_kind(results, decode=False):
        for name, run in case["layers"].items():
            yield [
                str(case["case"]),
                name,
                f"{run['min']:.2f} ({run['median']:.2f})",
                as_factor(case, name, "min"),
                f"{run['transient_bytes'] / MIB:.0f}",
                as_factor(case, name, "transient_bytes"),
                f"{case['needed_flops'] / 1e9:.1f}",
                f"{bounds(case, results)[1] / run['min']:.0%}",
            ]
        for name, parts in case["not_run"].items():
            least, whole = parts["selection"] / MIB, sum(parts.values()) / MIB
            yield [str(case["case"]), f"{name} \\*", "", "", f"{least:.0f} ({whole:.0f})", "", "", ""]


def output_rows(results: Results) -> Table:
    yield ["queries", "RMS", *(f"{name} {what}" for name in LAYERS[1:] for what in ("largest", "RMS"))]
    for case in results["cases"]:
        output = case["output"]
        found = [output.get(name, {}) for name in LAYERS[1:]]
        if any(found):
            numbers = [difference.get(what) for difference in found for what in ("largest", "rms")]
            cells = ["" if number is None else f"{number:.1e}" for number in numbers]
            yield [str(case["case"]), f"{output['rms']:.1e}", *cells]


def of_kind(results: Results, decode: bool) -> list[Results]:
    return [case for case in results["cases"] if (case["case"].queries == 1) == decode]


def bounds(case: Results, results: Results) -> tuple[float, float]:
    """Seconds that the reading and the arithmetic of MSA take at this machine's rates."""
    rates = results["rates"]
    return case["needed_bytes"] / rates["copy_bytes_per_second"], case["needed_flops"] / rates["matmul_flops"]


def times_ours(case: Results, name: str, quantity: str) -> float | None:
    run = case["layers"].get(name)
    return run and run[quantity] / case["layers"][OURS][quantity]


def as_factor(case: Results, name: str, quantity: str) -> str:
    value = times_ours(case, name, quantity)
    return f"{value:.3g}" if value and name != OURS else ""


def plot(pyplot: Any, results: Results, path: Path) -> None:
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    if cases := of_kind(results, decode=True):
        plot_decode(axes[0], cases, results)
        plot_growth(axes[1], cases)
    if cases := of_kind(results, decode=False):
        plot_memory(axes[2], cases)
    figure.savefig(path, dpi=120)


def plot_decode(axes: Any, cases: list[Results], results: Results) -> None:
    for name, style in zip(LAYERS, ("o-", "o-", "s--"), strict=True):
        points = [(c["case"].context, c["layers"][name]["min"] * 1e3) for c in cases if name in c["layers"]]
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=name)
    contexts = [case["case"].context for case in cases]
    bound = [max(bounds(case, results)) * 1e3 for case in cases]
    axes.plot(contexts, bound, "k:", label="reading or arithmetic of MSA at this machine's rates")
    axes.set(title="Decode, one token", xlabel="context, tokens", ylabel="ms", xscale="log", yscale="log")
    axes.set_xticks(contexts, [case["case"].length_name for case in cases], rotation=60)
    axes.minorticks_off()
    axes.legend(fontsize="small", loc="upper left")


def plot_growth(axes: Any, cases: list[Results]) -> None:
    """Linear axes: a straight line is growth as fast as the index keys."""
    contexts = [case["case"].context for case in cases]
    for value, style in (("min", "o-"), ("median", "o:")):
        times = [case["layers"][OURS][value] * 1e3 for case in cases]
        axes.plot(contexts, times, style, color="C0", label=f"{OURS}, {value}")
    axes.set(title="Growth of ours", xlabel="context, tokens", ylabel="ms", ylim=(0, None))
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:.0f}K")
    axes.legend(fontsize="small")


def plot_memory(axes: Any, cases: list[Results]) -> None:
    for number, name in enumerate(LAYERS):
        at = [position + 0.27 * (number - 1) for position in range(len(cases))]
        measured = [case["layers"].get(name, {}).get("transient_bytes", 0) / MIB for case in cases]
        computed = [sum(case["not_run"].get(name, {}).values()) / MIB for case in cases]
        axes.bar(at, measured, 0.25, color=f"C{number}", label=name)
        axes.bar(at, computed, 0.25, edgecolor=f"C{number}", fill=False, hatch="//")
    axes.bar([0], [0], edgecolor="grey", fill=False, hatch="//", label="not run: from its shapes")
    axes.set_xticks(range(len(cases)), [str(case["case"]) for case in cases])
    axes.margins(y=0.4)
    axes.set(title="Prefill, transient memory", xlabel="queries at context", ylabel="MiB", yscale="log")
    axes.legend(fontsize="small")


if __name__ == "__main__":
    main()
