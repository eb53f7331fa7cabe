"""The stock commands that train, on texts many times as long as the block budget of 32 tokens."""

import json
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import pytest

from tests.checkpoints.random_model import write_random_model
from tests.end_to_end.environments import Environment

HAS_NATIVE_CLASS = tuple(int(n) for n in version("mlx-lm").split(".")[:3]) >= (0, 32, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for split in ("train", "valid"):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"Count to {n}. " * 4},
                    {"role": "assistant", "content": f"It is {n}, and so on. " * (3 + n)},
                ]
            }
            for n in range(4)
        ]
        (directory / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return directory


def adapters(directory: Path) -> dict[str, mx.array]:
    return mx.load(str(directory / "adapters.safetensors"))  # type: ignore[return-value]


def moved(file: dict[str, mx.array], part: str) -> bool:
    """LoRA's second matrices begin as zeros."""
    found = [mx.abs(array).max().item() for name, array in file.items() if part in name]
    assert found
    return all(0 < largest < float("inf") for largest in found)


def test_mlx_lm_lora(guest: Environment, stock: Environment, data: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    write_random_model(demo)
    options = ("--data", data, "--batch-size", "2", "--num-layers", "-1", "--val-batches", "1")
    steps = ("--iters", "2", "--max-seq-length", "160", "--optimizer", "sgd", "--learning-rate", "0.1")

    def train(environment: Environment, name: str) -> dict[str, mx.array]:
        run = ("--model", demo, "--train", "--adapter-path", tmp_path / name, *options, *steps)
        environment.run_script("mlx_lm.lora", *run)
        return adapters(tmp_path / name)

    ours = train(guest, "ours")
    assert moved(ours, "self_attn.v_proj.lora_b")
    assert moved(ours, "self_attn.q_proj.lora_b")
    if HAS_NATIVE_CLASS:
        theirs = train(stock, "theirs")
        assert ours.keys() == theirs.keys()
        assert max(mx.abs(array - theirs[name]).max().item() for name, array in ours.items()) <= 1e-5


@pytest.mark.skipif(
    find_spec("mlx_vlm") is None or find_spec("mlx_vlm.train") is None,
    reason="mlx-vlm trains from local files from 0.7 on",
)
def test_mlx_vlm_train(guest: Environment, data: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    write_random_model(demo, vision=True)
    options = ("--data", data, "--batch-size", "2", "--iters", "2", "--steps-per-report", "1")
    outputs = ("--max-seq-length", "160", "--output-path", tmp_path / "adapters", "--optimizer", "sgd")
    run = guest.run("-m", "mlx_vlm.train", "--model", demo, *options, *outputs, "--learning-rate", "0.1")
    assert re.search(r"loss=[\d.]+", run.stdout + run.stderr)
    assert moved(adapters(tmp_path / "adapters"), "self_attn.v_proj.")
