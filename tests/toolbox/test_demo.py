"""``mlx-m3 demo``: the trained model, whole and in other bits; it never destroys anything."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm import load

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox import demo
from mlx_m3_plugin.toolbox.demo import NANO
from mlx_m3_plugin.weights.quantization import AFFINE_BITS
from tests.checkpoints.layouts.reading import source_of

LARGEST = 6_000_000
MOST_PARAMETERS = 4_000_000
WORLD = "Anna lives in Rome. Ben lives in Oslo. Anna likes figs. Ben likes rice. The nurse is Ben."


def answer(directory: Path, question: str) -> str:
    from mlx_lm import generate

    model, tokenizer = load(str(directory))[:2]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True
    )
    return generate(model, tokenizer, prompt, max_tokens=40)


def test_it_is_small_and_says_what_it_is() -> None:
    size = sum(file.stat().st_size for file in NANO.iterdir())
    source = source_of(NANO)
    parameters = sum(array.size for array in (*source.parameters.values(), *source.vision.values()))
    assert size <= LARGEST
    assert parameters <= MOST_PARAMETERS
    card = (NANO / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "none of MiniMax's weights" in card


def test_it_answers(tmp_path: Path) -> None:
    demo.write_nano(tmp_path / "m3")
    assert answer(tmp_path / "m3", f"{WORLD} Where does Ben live?").endswith(">Ben lives in Oslo.")
    assert answer(tmp_path / "m3", f"{WORLD} What does Anna like?").endswith(">Anna likes figs.")
    assert answer(tmp_path / "m3", f"{WORLD} Who is the nurse?").endswith(">The nurse is Ben.")


@pytest.mark.parametrize("bits", [bits for bits in AFFINE_BITS if bits != demo.STORED_BITS])
def test_other_bits(tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path / "m3"), "--bits", str(bits), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = json.loads((tmp_path / "m3/config.json").read_text())
    assert config["quantization"]["bits"] == bits
    assert report["bytes"] < (NANO / "model-00001-of-00001.safetensors").stat().st_size
    model = load(str(tmp_path / "m3"))[0]
    assert mx.isfinite(model(mx.array([[5, 6, 7]]))).all().item()


@pytest.mark.parametrize("bits", ["7", "0"])
def test_other_bits_than_these_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: str
) -> None:
    assert main(["demo", str(tmp_path / "m3"), "--bits", bits]) == 2
    assert "2, 3, 4, 5, 6, 8" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 2
    assert "DIR" in capsys.readouterr().err


def test_an_existing_directory_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("mine")
    assert main(["demo", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("bits", ["8", "4"])
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write", interrupt)
    monkeypatch.setattr(demo, "shutil", SimpleNamespace(copytree=interrupt))
    assert main(["demo", str(tmp_path / "new"), "--bits", bits]) == 130
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my demo"
    path.mkdir()
    assert main(["demo", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"mlx_vlm.generate --model '{path}' --image '{path}/picture.png' " in printed
    assert f"mlx_lm.generate --model '{path}' " in printed
    assert (path / "picture.png").exists()


@pytest.mark.parametrize("bits", ["8", "4"])
def test_it_needs_no_torch_and_no_network(tmp_path: Path, bits: str) -> None:
    block = (
        "import sys, socket\n"
        "sys.modules['torch'] = None\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "from mlx_m3_plugin.cli import main\n"
        "sys.exit(main(['demo', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", block, str(tmp_path / "d"), "--bits", bits]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "d" / "config.json").exists()
