"""The cases of the forecast, measured on this machine: one layer in bf16, ours and stock mlx-lm in one run.

    python benchmarks/engine.py               # on a Mac; a quarter of an hour, 16 GB
    python benchmarks/engine.py --tiny        # does it run? a few seconds on any machine

Every line has what ``gpu_cost.py`` forecasts and what was measured. A decoding line is the mean of steps in a
row through one layer, as in a model of that many layers. The libraries take turns, and the best turn counts.
A chunk finds room in the cache, after the first turn; the forecast includes its growth.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from gpu_cost import MAIN, number, table
from gpu_count import MLX_LM, OURS, count_library
from gpu_forecast import M3_ULTRA, MACHINES, Machine, seconds
from gpu_layers import M3, Case, Layer, Sizes, filled_entry, holders, make_layers
from msa import physical_memory
from msa_layers import upstream_module

TINY = Sizes(hidden=256, heads=8, experts=8, expert=64, dense=128)
TINY_CASES = [
    Case(1, 256),
    Case(1, 2304),
    Case(1, 2304, rows=2, padded=True),
    Case(1, 2304, kv_bits=8),
    Case(32, 2304),
    Case(1, 256, layer="dense"),
]
DECODE_STEPS = 8
TURNS = 5
# Of the machine's memory that the caches of a case may take.
MEMORY_SHARE = 0.3
Measured = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tiny", action="store_true", help="small layers and contexts: a test of this script"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table there, too")
    arguments = parser.parse_args()
    cases, sizes = (TINY_CASES, TINY) if arguments.tiny else (MAIN, M3)
    counted = {library: count_library(library, cases) for library in (OURS, MLX_LM)}
    machine = this_machine()
    forecast = {
        case: {lib: 1e3 * seconds(c[case].total, machine) for lib, c in counted.items() if c[case].total}
        for case in cases
    }
    measured = measure(cases, sizes)
    text = "\n".join(report(forecast, measured, machine, arguments.tiny)) + "\n"
    print(text)
    if arguments.report:
        arguments.report.write_text(text, encoding="utf-8")


def this_machine() -> Machine:
    """The one that the forecast knows by this chip's name, or M3 Ultra."""
    return next((machine for machine in MACHINES if machine.name in chip()), M3_ULTRA)


def chip() -> str:
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def measure(cases: Sequence[Case], sizes: Sizes) -> dict[Case, Measured]:
    """Milliseconds of a layer by case and library."""
    results = {}
    for kind in ("sparse", "dense"):
        # One kind's weights at a time are in memory.
        modules = {OURS: None, MLX_LM: upstream_module("mlx_lm.models", "minimax_m3_vl.py")}
        layers = {name: make_layers("mlx_lm", kind, 1, sizes, module)[0] for name, module in modules.items()}
        if "mlx_m3_plugin.model" not in sys.modules:
            raise SystemExit("mlx-m3-plugin does not serve here: see mlx-m3 doctor")
        for layer in layers.values():
            fill_with_random_weights(layer)
        for case in cases:
            if case.layer == kind and fits(case, sizes):
                print(f"{case} ...", flush=True)
                results[case] = measure_case(case, layers, sizes)
    return results


def fits(case: Case, sizes: Sizes) -> bool:
    """Whether both libraries' caches of a case are small beside this machine's memory."""
    per_token = 2 * 128 * (2 * sizes.groups + 1)
    return 2 * case.rows * (case.context + case.queries) * per_token < MEMORY_SHARE * physical_memory()


def fill_with_random_weights(layer: Layer) -> None:
    for module in layer.module.modules():
        for name, value in list(module.items()):
            if isinstance(value, mx.array):
                module[name] = random_weight(name, value)
                mx.eval(module[name])


def random_weight(name: str, like: mx.array) -> mx.array:
    """Codes of 4 bits from 0 to 15, with scales and biases that make them small numbers around zero."""
    if like.dtype == mx.uint32:
        return mx.random.randint(-(1 << 31), (1 << 31) - 1, like.shape).view(mx.uint32)
    if name in ("scales", "biases"):
        return mx.full(like.shape, 0.004 if name == "scales" else -0.03, like.dtype)
    return 0.02 * mx.random.normal(like.shape, like.dtype)


def measure_case(case: Case, layers: dict[str, Layer], sizes: Sizes) -> Measured:
    x = mx.random.normal((case.rows, case.queries, sizes.hidden), mx.bfloat16)
    entries = {}
    for name, layer in layers.items():
        try:
            entries[name] = filled_entry(
                layer, case, lambda shape, dtype: mx.random.normal(shape, dtype), sizes
            )
        except NotImplementedError:
            continue
        mx.eval(x, arrays_of(entries[name]))
    best: Measured = {}
    # The first turn compiles and fills caches.
    for turn in range(TURNS + 1):
        for name, entry in entries.items():
            milliseconds = one_turn(layers[name], entry, x, case)
            if turn:
                best[name] = min(milliseconds, best.get(name, milliseconds))
    return best


def one_turn(layer: Layer, entry: Any, x: mx.array, case: Case) -> float:
    steps = DECODE_STEPS if case.queries == 1 else 1
    begun = time.perf_counter()
    for _ in range(steps):
        x = layer.module(x, layer.make_mask(x, entry), entry)
    mx.eval(x, arrays_of(entry))
    milliseconds = 1e3 * (time.perf_counter() - begun) / steps
    entry.trim(steps * case.queries)
    return milliseconds


def arrays_of(entry: Any) -> list[Any]:
    names = ("keys", "values", "index_keys")
    return [value for h in holders(entry) for name in names if (value := getattr(h, name, None)) is not None]


def report(
    forecast: dict[Case, Measured], measured: dict[Case, Measured], machine: Machine, tiny: bool
) -> Iterator[str]:
    yield f"# One layer, forecast and measured\n\n{chip() or 'unknown chip'}, {mx.default_device()}, bf16."
    if machine.name not in chip():
        yield f"The forecast is for {machine.name}: there is none for this machine."
    if tiny:
        yield "A test of the script: the forecast is of M3's sizes, the measurement of small ones."
    yield ""
    head = ["case"]
    for library in (OURS, MLX_LM):
        head += [f"{library}, forecast ms", "measured", "measured / forecast"]
    yield from table([*head, "mlx-lm / ours, forecast", "measured"], lines(forecast, measured))


def lines(forecast: dict[Case, Measured], measured: dict[Case, Measured]) -> Iterator[list[str]]:
    for case, expected in forecast.items():
        seen = measured.get(case)
        if seen is None:
            yield [f"{case} (not run: too large for this machine)", *[""] * 8]
            continue
        cells = [str(case)]
        for library in (OURS, MLX_LM):
            both = library in expected and library in seen
            ratio = f"{seen[library] / expected[library]:.2f}" if both else ""
            cells += [shown(expected, library), shown(seen, library), ratio]
        for times in (expected, seen):
            both = OURS in times and MLX_LM in times
            cells.append(f"{times[MLX_LM] / times[OURS]:.2f}" if both else "")
        yield cells


def shown(times: Measured, library: str) -> str:
    return number(times[library]) if library in times else ""


if __name__ == "__main__":
    main()
