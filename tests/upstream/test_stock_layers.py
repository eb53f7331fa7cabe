"""Stock layers are counted and measured beside ours; releases before mlx-lm 0.32 have none."""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import engine
from gpu_count import MLX_LM, MLX_VLM, OURS, count_library
from gpu_layers import Case, bound


@pytest.mark.parametrize("library", [MLX_LM, MLX_VLM])
def test_stock_layers_are_counted(library: str) -> None:
    """At 131K mlx-vlm calls a Metal kernel of its own."""
    cases = [Case(1, 8192), Case(1, 131072), Case(1, 8192, rows=2, padded=True), Case(512, 16384)]
    quantized = Case(1, 8192, kv_bits=8)
    counted = count_library(library, [*cases, quantized])
    for case in cases:
        assert counted[case].launches > 20
        assert counted[case].other_bytes + counted[case].expert_bytes >= sum(bound(case)[0].values())
        assert counted[case].attention_flops > 0
    assert counted[quantized].missing


@pytest.mark.parametrize("case", [Case(1, 2304, rows=2, padded=True), Case(3, 64, layer="dense")], ids=str)
def test_small_layers_of_both_libraries_are_measured(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn leaves the caches as it has found them."""
    turn = engine.one_turn

    def watched_turn(layer: Any, entry: Any, x: mx.array, case: Case) -> float:
        before = mx.array(entry[0].offset).tolist()
        milliseconds = turn(layer, entry, x, case)
        assert mx.array(entry[0].offset).tolist() == before
        return milliseconds

    monkeypatch.setattr(engine, "one_turn", watched_turn)
    monkeypatch.setattr(engine, "TURNS", 2)
    (times,) = engine.measure([case], engine.TINY).values()
    assert set(times) == {OURS, MLX_LM}
    assert min(times.values()) > 0
