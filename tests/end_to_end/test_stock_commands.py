"""Every stock mlx-lm command on the demo checkpoint, in child processes that import nothing of ours.

The answers are held against mlx-lm's own M3 class (0.32 and newer has one), which is exact
for one unpadded prompt, in an environment that has never seen the plugin.
"""

import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.random_model import write_random_model
from tests.end_to_end.environments import CHECKOUT, SERVED_BY, Environment, clean_variables, warm
from tests.end_to_end.server_process import server_process

HAS_NATIVE_CLASS = tuple(int(n) for n in version("mlx-lm").split(".")[:2]) >= (0, 32)
# More than eight times the demo's block budget of 32 tokens, without the template's text.
PROMPT = " ".join(f"You may call tool {n}, then respond step by step." for n in range(17))

LOSS = """
import sys, mlx.core as mx
from mlx_lm import load
model, tokenizer, *_ = load(sys.argv[1])
tokens = mx.array(tokenizer.encode(sys.argv[2]))[None]
logits = model(tokens[:, :-1]).astype(mx.float32)
losses = mx.logsumexp(logits, -1) - mx.take_along_axis(logits, tokens[:, 1:, None], -1).squeeze(-1)
print(type(model).__module__, tokens.size, losses.mean().item())
"""


@pytest.fixture(scope="module")
def native(stock: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """The newest mlx-lm without the plugin, whichever mlx-lm these tests run on."""
    if HAS_NATIVE_CLASS:
        yield stock
        return
    newest = os.environ.get("M3_NEWEST_PYTHON")
    assert newest, "M3_NEWEST_PYTHON must name a Python that has the newest mlx-lm"
    environment = Environment(tmp_path_factory.mktemp("newest"))
    make = (
        "import sys, pathlib; from tests.end_to_end.environments import make_environment; "
        "make_environment(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run(
        [newest, "-c", make, str(environment.path)],
        check=True,
        env={**clean_variables(), "PYTHONPATH": str(CHECKOUT)},
    )
    with warm(environment) as running:
        yield running


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "checkpoint"
    write_random_model(directory)
    return directory


@pytest.fixture(scope="module")
def converted(guest: Environment, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "quantized"
    guest.run_script("mlx_lm.convert", "--hf-path", demo, "--mlx-path", directory, "-q")
    return directory


def generate(environment: Environment, model: Path, *options: str | Path, **run: Any) -> str:
    """The text that ``mlx_lm.generate`` prints, greedily."""
    options = ("--prompt", PROMPT, "--max-tokens", "40", "--temp", "0", "--verbose", "False", *options)
    return environment.run_script("mlx_lm.generate", "--model", model, *options, **run).stdout


# The answer of one and the same command is asked for once.
said = cache(generate)


@cache
def loss(environment: Environment, model: Path) -> tuple[str, float]:
    served_by, n_tokens, mean = environment.run("-c", LOSS, model, PROMPT).stdout.split()
    assert int(n_tokens) > 8 * 32
    return served_by, float(mean)


def test_generate_past_the_block_budget(guest: Environment, native: Environment, demo: Path) -> None:
    text = said(guest, demo)
    assert text.strip()
    assert text == said(native, demo)


def test_generate_was_served_by_our_file(guest: Environment, demo: Path) -> None:
    options = ("--model", demo, "--prompt", "Hello", "--max-tokens", "2")
    run = guest.run("-c", SERVED_BY, "mlx_lm.models.minimax_m3_vl", guest.script("mlx_lm.generate"), *options)
    assert run.stdout.splitlines()[-1] == str(guest.plugin / "hosts/mlx_lm/minimax_m3_vl.py")


def test_switched_off_it_is_stock_byte_for_byte(guest: Environment, stock: Environment, demo: Path) -> None:
    off = generate(guest, demo, env={"MLX_M3_PLUGIN": "off"}, check=False) if HAS_NATIVE_CLASS else None
    if HAS_NATIVE_CLASS:
        assert off == said(stock, demo)
        return
    runs = [
        environment.run_script("mlx_lm.generate", "--model", demo, "--prompt", "x", env=env, check=False)
        for environment, env in ((guest, {"MLX_M3_PLUGIN": "off"}), (stock, {}))
    ]
    assert runs[0].stdout == runs[1].stdout
    for run in runs:
        assert run.returncode != 0
        assert "Model type minimax_m3_vl not supported" in run.stderr


def test_chat_answers_one_turn(guest: Environment, demo: Path) -> None:
    run = guest.run_script("mlx_lm.chat", "--model", demo, "--max-tokens", "20", input=f"{PROMPT}\nq\n")
    assert generate(guest, demo, "--max-tokens", "20").strip() in run.stdout


def test_what_convert_writes_opens_without_us(
    guest: Environment, native: Environment, demo: Path, converted: Path
) -> None:
    ours, native_loss = loss(guest, converted), loss(native, converted)
    assert ours[0] == native_loss[0] == "mlx_lm.models.minimax_m3_vl"
    # Both classes hold the same quantized weights; the rest is rounding.
    assert ours[1] == pytest.approx(native_loss[1], abs=1e-4)
    # Quantization costs something, so the two checkpoints were not mixed up.
    assert abs(ours[1] - loss(guest, demo)[1]) > 1e-4


def test_convert_writes_nothing_that_names_us(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    tokenizer = json.loads((converted / "tokenizer_config.json").read_text())
    assert config["model_type"] == "minimax_m3_vl"
    assert config["quantization"]["bits"] == 4
    assert config["quantization"]["language_model.model.layers.2.block_sparse_moe.gate"]["bits"] == 8
    assert tokenizer.get("tool_parser_type") is None
    for name in ("config.json", "tokenizer_config.json"):
        assert "plugin" not in (converted / name).read_text()


def test_convert_without_quantization_keeps_every_value(
    guest: Environment, demo: Path, tmp_path: Path
) -> None:
    guest.run_script("mlx_lm.convert", "--hf-path", demo, "--mlx-path", tmp_path / "plain")
    assert loss(guest, tmp_path / "plain")[1] == loss(guest, demo)[1]


def test_cache_prompt_then_generate(
    guest: Environment, native: Environment, demo: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.safetensors"
    guest.run_script("mlx_lm.cache_prompt", "--model", demo, "--prompt", PROMPT, "--prompt-cache-file", file)
    text = generate(guest, demo, "--prompt-cache-file", file)
    assert text.strip()
    # The cache was written by our class; upstream's class reads it and goes on alike.
    if HAS_NATIVE_CLASS:
        assert text == generate(native, demo, "--prompt-cache-file", file)


# What ``mlx_lm.generate --kv-bits`` calls, with a look at the cache afterwards.
GENERATE_QUANTIZED = """
import sys
from mlx_lm import load, stream_generate
from mlx_lm.models.cache import make_prompt_cache
model, tokenizer, *_ = load(sys.argv[1])
cache = make_prompt_cache(model)
options = dict(kv_bits=8, kv_group_size=32, quantized_kv_start=100)
kinds = []
for response in stream_generate(model, tokenizer, sys.argv[2], max_tokens=5, prompt_cache=cache, **options):
    kinds.append({type(entry[0]).__name__ for entry in cache})
print(kinds[-1], {type(entry[1]).__name__ for entry in cache if len(entry.caches) > 1})
"""


def test_kv_bits_quantizes(guest: Environment, demo: Path, tmp_path: Path) -> None:
    output = guest.run("-c", GENERATE_QUANTIZED, demo, PROMPT).stdout
    assert output.splitlines()[-1] == "{'QuantizedKVCache'} {'KVCache'}"
    options = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")
    assert generate(guest, demo, *options).strip()
    # And into the file of a saved prompt cache, which is then gone on with.
    file = tmp_path / "prompt.safetensors"
    guest.run_script(
        "mlx_lm.cache_prompt", "--model", demo, "--prompt", PROMPT, "--prompt-cache-file", file, *options
    )
    assert b'"dtype":"U32"' in file.read_bytes()[:100_000]  # packed, as nothing else in it is
    assert generate(guest, demo, "--prompt-cache-file", file, *options).strip()


def test_kv_bits_that_do_not_fit_are_refused(guest: Environment, demo: Path) -> None:
    options = ("--prompt", PROMPT, "--kv-bits", "8", "--kv-group-size", "64", "--quantized-kv-start", "0")
    run = guest.run_script("mlx_lm.generate", "--model", demo, *options, check=False)
    assert run.returncode != 0
    assert "a KV group size of 64 does not divide this model's head size of 32" in run.stderr


def test_perplexity(guest: Environment, native: Environment, demo: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{n}. {PROMPT}"}) for n in range(4)]
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(rows) + "\n")
    options = ("--model", demo, "--data-path", data, "--sequence-length", "200", "--num-samples", "2")

    def perplexity(environment: Environment) -> float:
        output = environment.run_script("mlx_lm.perplexity", *options).stdout
        return float(re.search(r"Perplexity: ([\d.]+)", output)[1])  # type: ignore[index]

    # Logits that differ by at most 1e-4 move a log probability by at most 2e-4.
    assert perplexity(guest) == pytest.approx(perplexity(native), rel=2e-4)


def test_benchmark(guest: Environment, demo: Path) -> None:
    run = guest.run_script("mlx_lm.benchmark", "--model", demo, "-p", "200", "-g", "8", "-n", "1")
    assert re.search(r"Averages: prompt_tps=[\d.]+, generation_tps=[\d.]+", run.stdout)


@pytest.fixture(scope="module")
def server(guest: Environment, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a stock ``mlx_lm.server`` on the demo checkpoint."""
    with server_process(guest, "mlx_lm.server", demo, tmp_path_factory.mktemp("server") / "log") as address:
        yield address


def test_server_completes_a_chat(server: str) -> None:
    request = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "temperature": 0}
    answer = post(f"{server}/v1/chat/completions", request)
    (choice,) = answer["choices"]
    message = choice["message"]
    assert (message.get("content") or "") + (message.get("reasoning") or "")
    assert answer["usage"]["completion_tokens"] == 12 or choice["finish_reason"] == "stop"
    # The same prompt again comes out of the prompt cache, with the same answer.
    assert post(f"{server}/v1/chat/completions", request)["choices"][0]["message"] == message


def post(url: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(content).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)
