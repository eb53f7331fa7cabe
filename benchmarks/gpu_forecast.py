"""Milliseconds on Macs, forecast from counts and published rates; nothing here was measured by us.

Each operation takes the longer of moving its bytes and multiplying, and each launch a fixed time on top.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from gpu_layers import BUDGET, EXPERT, EXPERTS, FOUR_BITS, GROUPS, HEAD_DIM, HEADS, HIDDEN
from graph_cost import Work, distinct

# Between two kernels that wait for each other. ThunderMLX's selection takes 35 us a layer at 25K, of which
# reading is 8; we assume eight launches there.
LAUNCH = 4e-6


@dataclass(frozen=True)
class Machine:
    """GB/s, and TFLOP/s of products: 16-bit, 4-bit, grouped by expert, float32, hand-written kernels."""

    name: str
    bandwidth: float
    rates: dict[str, float]
    source: str


def _rates(products: float, experts: float, float32: float, kernel: float) -> dict[str, float]:
    return {"16 bits": products, "4 bits": products, "experts": experts, "float32": float32, "kernel": kernel}


# Memory bandwidth: Apple. "ThunderMLX": its published rates and times on an M3 Ultra of 80 cores, from which
# follow the rates of expert products (928 GFLOP in 101 ms) and of sparse attention (137 GFLOP in 14.1 ms).
MACHINES = [
    Machine("M2 Ultra", 800, _rates(16.2, 8.7, 9.5, 9.3), "M3 Ultra's rates by GPU cores, 76 of 80"),
    Machine("M3 Ultra", 819, _rates(17.0, 9.2, 10.0, 9.8), "ThunderMLX: 16.5 to 17.6, 9 to 10.7 in float32"),
    Machine("M4 Max", 546, _rates(8.5, 4.6, 5.0, 4.9), "M3 Ultra's rates by GPU cores, 40 of 80"),
    Machine(
        "M5 Max",
        614,
        _rates(58.0, 31.0, 5.0, 5.8),
        "ThunderMLX: 55 to 61 through MLX's products, 5.8 by hand; experts as on M3 Ultra, float32 by cores",
    ),
]
M3_ULTRA = MACHINES[1]


def seconds(work: Counter[Work], machine: Machine) -> float:
    return sum(n * seconds_of(operation, machine) for operation, n in work.items())


def seconds_of(work: Work, machine: Machine) -> float:
    multiplying = work.flops / (machine.rates[work.rate] * 1e12) if work.flops else 0
    return max(work.bytes / (machine.bandwidth * 1e9), multiplying) + work.launches * LAUNCH


# --- ThunderMLX's published times (M3 Ultra, one MoE layer in 4 bits) ---

# Queries, context, and milliseconds of each part.
PREFILL = [
    (2048, 16384, {"expert products": 102, "projections": 28, "index scores": 4.6, "sparse attention": 13.7}),
    (
        2048,
        32768,
        {"expert products": 101, "projections": 28, "index scores": 16.9, "sparse attention": 14.1},
    ),
    (
        4096,
        32768,
        {"expert products": 184, "projections": 55, "index scores": 29.8, "sparse attention": 26.3},
    ),
]
# One token's selection in 57 layers: context, milliseconds with keys read for each head, and for all at once.
SELECTION = [(25_000, 3.5, 2.0), (50_000, 5.6, 2.4), (100_000, 9.9, 2.8), (200_000, 18.7, 4.0)]
LAYERS, DENSE_LAYERS, VOCABULARY = 57, 3, 200_064
LAUNCHES_OF_SELECTION = 8


@dataclass(frozen=True)
class Check:
    """A part with its published and forecast milliseconds; ``fitted`` if a rate was derived from it."""

    part: str
    published: float
    forecast: float
    fitted: bool = False

    @property
    def off(self) -> float:
        return self.forecast / self.published


def checks() -> Iterator[Check]:
    for queries, context, published in PREFILL:
        for part, milliseconds in published.items():
            forecast = 1e3 * seconds_of(thunder_part(part, queries, context), M3_ULTRA)
            fitted = part in ("expert products", "sparse attention") and queries == 2048
            yield Check(f"{part}, {queries:,} queries at {context:,}", milliseconds, forecast, fitted)
    for context, *published in SELECTION:
        for heads, milliseconds in zip((GROUPS, 1), published, strict=True):
            work = Work("scan", heads * context * HEAD_DIM * 2, launches=LAUNCHES_OF_SELECTION)
            read = "for each head" if heads > 1 else "for all at once"
            forecast = 1e3 * LAYERS * seconds_of(work, M3_ULTRA)
            what = f"selection of one token at {context:,}, 57 layers, keys read {read}"
            fitted = heads == 1 and context == SELECTION[0][0]
            yield Check(what, milliseconds, forecast, fitted)


def token_check(sparse: Counter[Work], dense: Counter[Work]) -> list[Check]:
    """A whole token of oMLX (21.7 tok/s; context not published) against these layers."""
    head = Work("head", round(VOCABULARY * HIDDEN * FOUR_BITS))
    layers = LAYERS * seconds(sparse, M3_ULTRA) + DENSE_LAYERS * seconds(dense, M3_ULTRA)
    forecast = 1e3 * (layers + seconds_of(head, M3_ULTRA))
    return [Check("a token of oMLX, whole model, against stock mlx-lm's layers at 8K", 1e3 / 21.7, forecast)]


def thunder_part(part: str, queries: int, context: int) -> Work:
    """The work of one part of ThunderMLX's layer, by shapes."""
    if part == "expert products":
        pairs, expert = 4 * queries, 3 * HIDDEN * EXPERT
        moved = distinct(EXPERTS, pairs) * expert * FOUR_BITS + 2 * pairs * 2 * (2 * HIDDEN + 3 * EXPERT)
        return Work(part, round(moved), 2 * pairs * expert, "experts", launches=3)
    if part == "projections":
        elements = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * GROUPS + GROUPS + 1)
        return Work(part, round(elements * FOUR_BITS), 2 * queries * elements, "4 bits", launches=6)
    if part == "index scores":
        pairs = GROUPS * queries * context
        return Work(part, 4 * pairs + 2 * context * HEAD_DIM, 2 * pairs * HEAD_DIM, "float32")
    return Work(
        part,
        2 * 2 * queries * HEADS * HEAD_DIM,
        4 * queries * HEADS * BUDGET * HEAD_DIM,
        "kernel",
        launches=2,
    )
