"""``mlx-m3 doctor --engine``: which code computes sparse attention here, is it right, and how fast is it?"""

import warnings
from dataclasses import asdict, dataclass, field

import mlx.core as mx

from ..model.attention import setup_for
from ..model.config import TextConfig
from ..msa import engine
from ..startup.settings import engine_settings
from .common import Answer

# Bits and group size of K and V; zeros where they are not quantized.
_KEYS_VALUES = ((0, 0), (8, 64), (4, 64))


@dataclass
class Measured:
    """One part of MSA at one size: milliseconds of both forms, and the one that serves."""

    part: str
    queries: int
    context: int
    plain_ms: float
    kernels_ms: float
    serves: str


@dataclass
class Examined:
    """The kernels for one kind of arrays; ``failure`` is why they don't serve."""

    arrays: str
    failure: str | None
    is_fault: bool
    measured: list[Measured] = field(default_factory=list)


@dataclass
class EngineReport:
    """The result of ``mlx-m3 doctor --engine``.

    Attributes:
        ok: no kernel is faulty.
        mode: ``MLX_M3_PLUGIN_ENGINE``.
        store: the file that keeps the measurements; delete it to measure anew.
    """

    ok: bool
    mode: str
    store: str
    has_metal: bool
    examined: list[Examined]


def engine_answer() -> Answer:
    found = examine_engine()
    return Answer(asdict(found), engine_lines(found), found.ok)


def examine_engine() -> EngineReport:
    """Prove and measure the kernels at MiniMax-M3's sizes in bfloat16."""
    settings = engine_settings()
    engine.configure("auto", store=settings["store"])
    has_metal = engine.has_metal()
    examined = [_examine(settings["mode"], *bits) for bits in _KEYS_VALUES] if has_metal else []
    ok = not any(one.is_fault for one in examined)
    return EngineReport(ok, settings["mode"], settings["store"], has_metal, examined)


def _examine(mode: str, kv_bits: int, kv_group_size: int) -> Examined:
    setup = setup_for(TextConfig(), mx.bfloat16, kv_bits, kv_group_size)
    with warnings.catch_warnings():
        # The report says it.
        warnings.simplefilter("ignore", RuntimeWarning)
        verdict = engine.examine(setup)
    measured = []
    for name, (plain, kernels) in verdict.milliseconds.items():
        part, _, size = name.partition(", ")
        serves = "kernels" if verdict.kernels_serve(name, mode) else "plain"
        measured.append(Measured(part, *engine.SIZES[size], plain, kernels, serves))
    return Examined(str(setup), verdict.failure, verdict.is_unexpected, measured)


def engine_lines(found: EngineReport) -> list[str]:
    if not found.has_metal:
        return ["MLX has no Metal GPU here: sparse attention is computed in plain MLX operations."]
    lines = [f"MLX_M3_PLUGIN_ENGINE is {found.mode}; measurements are kept in {found.store}"]
    for one in found.examined:
        right = "the kernels are right" if one.failure is None else f"no kernels: {one.failure}"
        lines += ["", f"{one.arrays}: {right}"]
        for row in one.measured:
            what = f"{row.part}, {row.queries:,} queries at {row.context:,}"
            times = f"plain {row.plain_ms:8.2f} ms   kernels {row.kernels_ms:8.2f} ms"
            lines.append(f"  {what:<36} {times}   {row.serves} serve")
    if not found.ok:
        lines += ["", "A kernel that is wrong here is a fault of mlx-m3-plugin: please report this output."]
    return lines
