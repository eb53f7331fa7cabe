"""``mlx-m3 demo``: complete, valid, repeatable, and it never destroys anything."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox import demo

NEEDED_TOKENS = [
    "]<]minimax[>[",
    "<tool_call>",
    "</tool_call>",
    "<mm:think>",
    "</mm:think>",
    "]~b]",
    "]~!b[",
    "[e~[",
    "]<]image[>[",
    "]<]video[>[",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "checkpoint"
    demo.write_demo(directory)
    return directory


def test_it_opens_with_stock_mlx_lm_and_every_marker_is_one_token(checkpoint: Path) -> None:
    model, tokenizer = load(str(checkpoint))
    for token in NEEDED_TOKENS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1, token
    assert tokenizer.eos_token_ids == {tokenizer.encode("[e~[", add_special_tokens=False)[0]}
    assert (tokenizer.think_start, tokenizer.think_end) == ("<mm:think>", "</mm:think>")
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    logits = model(mx.array(tokens)[None])
    assert len(tokens) > 4 * 32  # several budgets of four blocks of eight tokens
    assert mx.isfinite(logits).all().item()
    assert logits.shape[-1] == model.text_config.vocab_size


def test_text_survives_the_tokenizer(checkpoint: Path) -> None:
    _, tokenizer = load(str(checkpoint))
    text = "Grüße, 世界!\n\tprint('x' * 3)  # <mm:think>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_config_and_files_are_those_of_a_published_checkpoint(checkpoint: Path) -> None:
    assert {p.name for p in checkpoint.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "minimax_m3_vl"
    assert config["text_config"]["sparse_attention_config"]["sparse_block_size"] == 8
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert "language_model.model.layers.5.block_sparse_moe.experts.15.w2.weight" in index
    assert set(index) == set(mx.load(str(checkpoint / "model.safetensors")))


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        demo.write_demo(tmp_path / name, seed)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_an_existing_directory_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("mine")
    assert main(["demo", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "save_file", interrupt)
    assert main(["demo", str(tmp_path / "new")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled_and_the_report_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", str(tmp_path), "--seed", "5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(tmp_path)
    assert report["seed"] == 5
    assert report["bytes"] == 4 * report["parameters"]


def test_it_needs_no_torch_and_no_network(tmp_path: Path) -> None:
    block = (
        "import sys, socket\n"
        "sys.modules['torch'] = None\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "from mlx_m3_plugin.cli import main\n"
        "sys.exit(main(['demo', sys.argv[1]]))"
    )
    subprocess.run([sys.executable, "-c", block, str(tmp_path / "d")], check=True, capture_output=True)
    assert (tmp_path / "d" / "config.json").exists()
