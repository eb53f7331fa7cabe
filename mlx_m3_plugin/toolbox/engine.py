"""``mlx-m3 doctor --engine``: which code computes sparse attention here, is it right, and how fast is it?"""

import warnings
from typing import Any

import mlx.core as mx

from ..model.attention import setup_for
from ..model.config import TextConfig
from ..msa import engine
from ..startup.settings import engine_settings
from .common import Answer

# Bits and group size of K and V; zeros where they are not quantized.
_KEYS_VALUES = ((0, 0), (8, 64), (4, 64))


def engine_answer() -> Answer:
    """Prove and measure the kernels at MiniMax-M3's sizes in bfloat16.  It is yes if none is faulty.

    ``store`` is the file that keeps the measurements; delete it to measure anew.
    """
    settings = engine_settings()
    engine.configure("auto", store=settings["store"])
    has_metal = engine.has_metal()
    examined = [_examine(settings["mode"], *bits) for bits in _KEYS_VALUES] if has_metal else []
    found = {
        "ok": not any(one["is_fault"] for one in examined),
        "mode": settings["mode"],
        "store": settings["store"],
        "has_metal": has_metal,
        "examined": examined,
    }
    return Answer(found, _lines(found), found["ok"])


def _examine(mode: str, kv_bits: int, kv_group_size: int) -> dict[str, Any]:
    """The kernels for one kind of arrays: why they don't serve, and milliseconds of both forms by size."""
    config = TextConfig()
    heads = config.num_attention_heads, config.num_key_value_heads
    setup = setup_for(config, heads, mx.bfloat16, kv_bits, kv_group_size)
    with warnings.catch_warnings():
        # The report says it.
        warnings.simplefilter("ignore", RuntimeWarning)
        verdict = engine.examine(setup)
    measured = []
    for name, (plain, kernels) in verdict.milliseconds.items():
        part, _, size = name.partition(", ")
        queries, context = engine.SIZES[size]
        row = {"part": part, "queries": queries, "context": context, "plain_ms": plain, "kernels_ms": kernels}
        measured.append({**row, "serves": "kernels" if verdict.kernels_serve(name, mode) else "plain"})
    about = {"arrays": str(setup), "failure": verdict.failure, "is_fault": verdict.is_unexpected}
    return {**about, "measured": measured}


def _lines(found: dict[str, Any]) -> list[str]:
    if not found["has_metal"]:
        return ["MLX has no Metal GPU here: sparse attention is computed in plain MLX operations."]
    lines = [f"MLX_M3_PLUGIN_ENGINE is {found['mode']}; measurements are kept in {found['store']}"]
    for one in found["examined"]:
        right = "the kernels are right" if one["failure"] is None else f"no kernels: {one['failure']}"
        lines += ["", f"{one['arrays']}: {right}"]
        for row in one["measured"]:
            what = f"{row['part']}, {row['queries']:,} queries at {row['context']:,}"
            times = f"plain {row['plain_ms']:8.2f} ms   kernels {row['kernels_ms']:8.2f} ms"
            lines.append(f"  {what:<36} {times}   {row['serves']} serve")
    if not found["ok"]:
        lines += ["", "A kernel that is wrong here is a fault of mlx-m3-plugin: please report this output."]
    return lines
