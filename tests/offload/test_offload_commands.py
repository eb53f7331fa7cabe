"""Experts on disk through stock commands, and how much memory they take."""

import gc
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.model.memory import bytes_per_token
from tests.checkpoints.random_model import write_random_model
from tests.end_to_end.environments import here
from tests.offload.disk_models import VARIABLE, experts_of, load_on_disk, load_with, logits, memory_for

COMMANDS = {
    "mlx_lm": ["mlx_lm", "generate", "--temp", "0", "--max-tokens", "8", "--prompt", "Who are you?"],
    "mlx_vlm": ["mlx_vlm", "generate", "--temperature", "0", "--max-tokens", "8", "--prompt", "Who are you?"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_random_model(directory)
    return directory


detokenizes = pytest.mark.skipif(
    version("mlx-vlm") < "0.7", reason="mlx-vlm before 0.7 stops at a token that begins inside a character"
)


@pytest.mark.some(1)
@pytest.mark.parametrize("host", ["mlx_lm", pytest.param("mlx_vlm", marks=detokenizes)])
def test_stock_commands(host: str, checkpoint: Path) -> None:
    """The same text, and a line that says what is on."""

    def generate(memory: str) -> tuple[str, str]:
        done = here().run("-m", *COMMANDS[host], "--model", checkpoint, env={VARIABLE: memory})
        # Between two lines, where there are any; how fast it was stands after the second.
        between = done.stdout.split("==========")[:2]
        return between[-1], done.stderr

    text, _ = generate("off")
    assert text
    on_disk, said = generate("1MB")
    assert on_disk == text
    assert "mlx-m3-plugin: 2 of 16 experts of each layer are in memory" in said


def test_inspect_says_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(checkpoint)])
    assert "stay on disk" not in capsys.readouterr().out
    monkeypatch.setenv(VARIABLE, "3GB")
    main(["inspect", str(checkpoint)])
    assert f"{VARIABLE} is set (3.0 GiB): routed experts that do not fit stay on disk" in " ".join(
        capsys.readouterr().out.split()
    )


def test_memory_is_bounded(checkpoint: Path, count: Callable[[int, int], int]) -> None:
    """What MLX holds after many tokens is what it held after few."""
    resident = load_with("mlx_lm", checkpoint)
    memory = memory_for(resident, 5)
    del resident
    # What other tests have left behind.
    gc.collect()
    before = mx.get_active_memory()
    on_disk = load_on_disk("mlx_lm", checkpoint, memory)
    loaded = mx.get_active_memory() - before
    parameters = sum(a.nbytes for a in leaves(on_disk))
    assert parameters <= loaded <= parameters + memory + 100_000

    tokens = np.random.default_rng(0).integers(0, 600, (1, 64 + count(150, 2000)))
    cache = on_disk.make_cache()
    mx.eval(logits(on_disk, tokens[:, :64], cache))
    held = []
    for number in range(64, tokens.shape[1]):
        mx.eval(logits(on_disk, tokens[:, number : number + 1], cache))
        held.append(mx.get_active_memory())
    # Of a context in 32 bits, which grows by steps of 256 tokens.
    context = 2 * bytes_per_token(on_disk.language_model.model.config, 4) * (tokens.shape[1] + 256)
    assert max(held) <= held[0] + context
    assert sum(layer.slots.misses for layer in experts_of(on_disk)) > 100


def leaves(model: Any) -> list[mx.array]:
    from mlx.utils import tree_flatten

    return [array for _, array in tree_flatten(model.parameters())]
