"""``mlx-m3 doctor --engine``."""

import json
from collections.abc import Iterator

import pytest

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.msa import engine
from mlx_m3_plugin.msa.engine import Setup, Verdict

TIMES = {"selection, few": (2.0, 1.0), "attention, many": (3.0, 4.0)}


@pytest.fixture(autouse=True)
def default_engine() -> Iterator[None]:
    yield
    engine.configure()


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    code = main(["doctor", "--engine", "--json"])
    return code, json.loads(capsys.readouterr().out)


def examine_like_a_mac(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> list[Setup]:
    asked: list[Setup] = []
    monkeypatch.setattr(engine, "has_metal", lambda: True)
    monkeypatch.setattr(engine, "examine", lambda setup: asked.append(setup) or verdict)
    return asked


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys)[0] == 0
    assert main(["doctor", "--engine"]) == 0
    assert "no Metal GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "serve"),
    [("auto", ["kernels", "plain"]), ("plain", ["plain"] * 2), ("kernels", ["kernels"] * 2)],
)
def test_what_serves(
    mode: str, serve: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_M3_PLUGIN_ENGINE", mode)
    asked = examine_like_a_mac(monkeypatch, Verdict(milliseconds=TIMES))
    code, found = report(capsys)
    assert code == 0
    assert found["mode"] == mode
    for one in found["examined"]:
        assert [row["serves"] for row in one["measured"]] == serve
    # The sizes of the published model.
    assert {(s.heads, s.groups, s.channels, s.block_size, s.k) for s in asked} == {(64, 4, 128, 128, 16)}
    assert [s.kv_bits for s in asked] == [0, 8, 4]
    main(["doctor", "--engine"])
    assert "512 queries at 8,192" in capsys.readouterr().out


def test_a_faulty_kernel_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examine_like_a_mac(monkeypatch, Verdict("attention differs by 0.5", is_unexpected=True))
    code, found = report(capsys)
    assert code == 1
    assert not found["ok"]
    main(["doctor", "--engine"])
    assert "differs by 0.5" in capsys.readouterr().out
