"""``mlx_lm.lora`` and ``mlx_lm.fuse`` with their options, past the block budget, in this process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import yaml
from mlx_lm import convert, fuse, load, lora
from mlx_lm.utils import load_model

from mlx_m3_plugin.model.decoder import DecoderLayer
from tests.checkpoints.random_model import write_random_model
from tests.hosts.native_mlx_lm import NATIVE

CALLS = [{"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"a": [1, {"b": 2}]}'}}]
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Count. " * 8},
            {"role": "assistant", "content": f"{n}. " * 12},
        ]
    }
    for n in range(1)
] + [
    {
        "messages": [
            {"role": "user", "content": "Call f."},
            {"role": "assistant", "content": "", "reasoning": "Why not?", "tool_calls": CALLS},
            {"role": "tool", "content": "one", "tool_call_id": "1"},
            {"role": "assistant", "content": "Done."},
        ],
    }
]
# Experts have no DoRA.
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
WAYS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "lora": (["--mask-prompt", "--grad-checkpoint"], {}),
    "dora": (["--fine-tune-type", "dora"], {"keys": ATTENTION}),
    "full": (["--fine-tune-type", "full"], {}),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return tmp_path


@pytest.fixture
def not_compiled() -> Iterator[None]:
    """On a CPU, compiling a step takes longer than all of them."""
    mx.disable_compile()
    yield
    mx.enable_compile()


# mlx-lm trains no quantized weights, only adapters beside them.
CASES = [(way, bits) for way in WAYS for bits in (None, 4) if (way, bits) != ("full", 4)]


@pytest.mark.some(1)
@pytest.mark.parametrize(("way", "bits"), CASES)
def test_train_go_on_test_and_fuse(
    way: str, bits: int | None, data: Path, monkeypatch: pytest.MonkeyPatch, not_compiled: None
) -> None:
    # --grad-checkpoint replaces it for good.
    monkeypatch.setattr(DecoderLayer, "__call__", DecoderLayer.__call__)
    model = data / "model"
    write_random_model(model if bits is None else data / "float")
    if bits is not None:
        convert(str(data / "float"), str(model), quantize=True, q_bits=bits, q_group_size=64)
    options, parameters = WAYS[way]
    config = data / "config.yaml"
    config.write_text(
        yaml.dump({"lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0, **parameters}})
    )
    adapter = data / "adapters"

    def run(main: Any, *arguments: Any) -> None:
        monkeypatch.setattr("sys.argv", ["command", "--model", str(model), *map(str, arguments)])
        main()

    steps = ("--iters", 1, "--batch-size", 2, "--num-layers", 2, "--val-batches", 1, "--learning-rate", 0.01)
    train = ("--train", "--data", data, "-c", config, "--adapter-path", adapter, *steps, *options)
    run(lora.main, *train)
    begun = mx.load(str(adapter / "adapters.safetensors"))
    # Before the file is written anew.
    mx.eval(begun)
    run(
        lora.main,
        *train,
        "--resume-adapter-file",
        adapter / "adapters.safetensors",
        "--test",
        "--test-batches",
        1,
    )
    trained = mx.load(str(adapter / "adapters.safetensors"))
    assert begun.keys() == trained.keys()
    assert {name.split(".layers.")[1][0] for name in trained} == {"4", "5"}
    learned = [name for name in trained if "q_proj" in name and ".index_" not in name]
    assert any((begun[name] != trained[name]).any().item() for name in learned)

    with_adapter = load(str(model), adapter_path=str(adapter))[0]
    prompt = mx.arange(100, 150)[None]
    expected = with_adapter(prompt)
    assert mx.abs(expected - load(str(model))[0](prompt)).max().item() > 1e-2
    for dequantize in [False] if bits is None else [False, True]:
        fused = data / f"fused-{dequantize}"
        run(fuse.main, "--adapter-path", adapter, "--save-path", fused, *["--dequantize"] * dequantize)
        found = load(str(fused))[0]
        if bits is None or dequantize:
            assert (
                mx.abs(found(prompt) - expected).max().item() <= 1e-5 * mx.abs(expected).max().item() + 1e-5
            )
        else:
            assert within_rounding(found, with_adapter) > 5
        if NATIVE is not None:
            stock = load_model(fused, get_model_classes=lambda config: (NATIVE.Model, NATIVE.ModelArgs))[0]
            assert mx.abs(stock(prompt) - found(prompt)).max().item() <= 1e-4


def within_rounding(fused: Any, with_adapter: Any) -> int:
    """How many adapted matrices there are; each differs by a step of its quantization at most."""
    matrices = dict(fused.named_modules())
    count = 0
    for name, module in with_adapter.named_modules():
        if not hasattr(module, "fuse") or not isinstance(matrices[name], nn.QuantizedLinear):
            continue
        found, exact = matrices[name], module.fuse(dequantize=True)
        values = mx.dequantize(found.weight, found.scales, found.biases, found.group_size, found.bits)
        step = mx.repeat(mx.abs(found.scales), found.group_size, axis=-1)
        assert (mx.abs(values - exact.weight) <= step).all().item(), name
        count += 1
    return count
