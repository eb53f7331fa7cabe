"""Commands that exist as they are printed, and the context that fits."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_m3_plugin.model import memory as memory_module
from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.model.memory import machine_memory, memory_for
from mlx_m3_plugin.toolbox import inspect as text
from mlx_m3_plugin.toolbox.inspect import memory_lines
from mlx_m3_plugin.toolbox.stock import stock_commands

GIB = 1 << 30
REAL = TextConfig(layer_types=["full_attention"] * 3 + ["minimax_m3_sparse"] * 57)


def test_the_context_that_fits():
    weights = 225 * GIB
    memory = memory_for(REAL, weights, 57, 256 * GIB)
    # K and V of 60 layers, and index keys of 57; in 8 bits with a scale and a bias for 64 values.
    assert memory.per_token == 60 * 2 * 4 * 128 * 2 + 57 * 128 * 2
    assert memory.per_token_kv_8 == 60 * 2 * 4 * 128 * 8.5 / 8 + 57 * 128 * 2
    assert memory.reserve == 16 * GIB
    # A chunk of a prompt takes memory as well: 2,048 tokens of 64 heads, for each of 16 blocks a partial
    # output in float32, and an output in 16 bits.  That is more than its experts take.
    chunk = 2048 * 64 * (16 * 4 * 129 + 2 * 128)
    assert chunk > 2048 * 4 * (2 * (3 * 6144 + 3 * 3072) + 4 * 6144)
    free = 15 * GIB - chunk
    assert memory.context == free // 137_472
    assert memory.context_kv_8 == free // 79_872
    assert f"{free // 137_472:,} tokens fit" in memory_lines(memory)[-1]
    # As much as the model knows, and no more.
    assert memory_for(REAL, weights, 57, 512 * GIB).context == 1048576


@pytest.mark.parametrize("machine", [128 * GIB, 239 * GIB])
def test_what_does_not_fit_is_said(machine):
    memory = memory_for(REAL, 225 * GIB, 57, machine)
    assert (memory.context, memory.context_kv_8) == (0, 0)
    assert "does not fit this machine: 225.0 GiB of weights" in memory_lines(memory)[-1]


def test_an_unknown_machine_is_not_judged(monkeypatch):
    def unknown(_: str) -> int:
        raise ValueError

    monkeypatch.setattr(memory_module, "os", SimpleNamespace(sysconf=unknown))
    assert machine_memory() is None
    assert len(memory_lines(memory_for(REAL, 225 * GIB, 57, None))) == 1


def test_macos_is_told_of_its_limit(monkeypatch):
    memory = memory_for(REAL, 200 * GIB, 57, 256 * GIB)
    monkeypatch.setattr(text, "is_mac", lambda: False)
    assert not any("iogpu" in line for line in memory_lines(memory))
    monkeypatch.setattr(text, "is_mac", lambda: True)
    assert f"iogpu.wired_limit_mb={240 * 1024}" in memory_lines(memory)[-1]
    # With a million tokens 155 GiB.
    small = memory_for(REAL, 20 * GIB, 57, 256 * GIB)
    assert not any("iogpu" in line for line in memory_lines(small))


@pytest.mark.parametrize("library", ["mlx_lm", "mlx_vlm"])
def test_every_flag_exists(library):
    spec = importlib.util.find_spec(library)
    if spec is None:
        pytest.skip(f"{library} is not installed")
    (place,) = spec.submodule_search_locations
    lines = [c for c in stock_commands("m3", mlx_lm=True, mlx_vlm=True) if c.startswith(f"{library}.")]
    assert len(lines) == {"mlx_lm": 3, "mlx_vlm": 1}[library]
    for line in lines:
        tool = line.split()[0].partition(".")[2]
        files = [*Path(place).glob(f"{tool}.py"), *Path(place).glob(f"{tool}/*.py")]
        known = {flag for file in files for flag in re.findall(r'"(--[\w-]+)"', file.read_text())}
        assert set(re.findall(r" (--[\w-]+)", line)) - known == set(), line
