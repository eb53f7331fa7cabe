"""The forecast beside what a machine has measured."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import engine
from gpu_count import MLX_LM, OURS
from gpu_forecast import M3_ULTRA
from gpu_layers import Case

SMALL, QUANTIZED, LARGE = Case(1, 1024), Case(1, 1024, kv_bits=8), Case(1, 1 << 20, rows=8)


def test_each_forecast_stands_beside_its_measurement() -> None:
    forecast = {SMALL: {OURS: 2.0, MLX_LM: 3.0}, QUANTIZED: {OURS: 4.0}, LARGE: {OURS: 9.0}}
    measured = {SMALL: {OURS: 3.0, MLX_LM: 6.0}, QUANTIZED: {OURS: 2.0}}
    text = list(engine.report(forecast, measured, M3_ULTRA, tiny=False))
    assert "| 1 at 1K | 2 | 3 | 1.50 | 3 | 6 | 2.00 | 1.50 | 2.00 |" in text
    assert "| 1 at 1K, 8-bit K/V | 4 | 2 | 0.50 |  |  |  |  |  |" in text
    assert any(line.startswith("| 1 at 1M, 8 rows (not run: too large for this machine) |") for line in text)


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "physical_memory", lambda: 32 << 30)
    assert engine.fits(SMALL, engine.M3)
    assert not engine.fits(LARGE, engine.M3)
