"""``mlx-m3 demo``: the trained model, whole, in other bits and in every layout."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox import nano
from mlx_m3_plugin.toolbox.layouts import LAYOUTS
from mlx_m3_plugin.toolbox.layouts.reading import source_of

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
    size = sum(file.stat().st_size for file in nano.CHECKPOINT.iterdir())
    source = source_of(nano.CHECKPOINT)
    parameters = sum(array.size for array in (*source.parameters.values(), *source.vision.values()))
    assert size <= LARGEST
    assert parameters <= MOST_PARAMETERS
    card = (nano.CHECKPOINT / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "none of MiniMax's weights" in card


def test_it_answers(tmp_path: Path) -> None:
    nano.write_nano(tmp_path / "m3")
    assert answer(tmp_path / "m3", f"{WORLD} Where does Ben live?").endswith(">Ben lives in Oslo.")
    assert answer(tmp_path / "m3", f"{WORLD} What does Anna like?").endswith(">Anna likes figs.")
    assert answer(tmp_path / "m3", f"{WORLD} Who is the nurse?").endswith(">The nurse is Ben.")


@pytest.mark.parametrize("bits", [bits for bits in nano.BITS if bits != nano.STORED_BITS])
def test_other_bits(tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path / "m3"), "--bits", str(bits), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = json.loads((tmp_path / "m3/config.json").read_text())
    assert config["quantization"]["bits"] == bits
    assert report["bytes"] < (nano.CHECKPOINT / "model-00001-of-00001.safetensors").stat().st_size
    model = load(str(tmp_path / "m3"))[0]
    assert mx.isfinite(model(mx.array([[5, 6, 7]]))).all().item()


def test_every_layout_is_the_same_model(tmp_path: Path, count: Any, fresh_seed: int) -> None:
    """Each is opened by our reader again, and has the values that its maker says it has."""
    import random

    names = random.Random(fresh_seed).sample(sorted(LAYOUTS), count(8, len(LAYOUTS)))
    source = source_of(nano.CHECKPOINT)
    for name in names:
        values = LAYOUTS[name].write(tmp_path / name, source)
        again = source_of(tmp_path / name)
        assert again.parameters.keys() == values.keys(), name
        for parameter, value in values.items():
            difference = mx.abs(again.parameters[parameter] - value).max().item()
            # bfloat16 scales and tensors are read as such.
            assert difference <= 2**-7 * mx.abs(value).max().item(), (name, parameter)
        assert again.vision.keys() == (source.vision.keys() if LAYOUTS[name].has_vision else set()), name


def test_a_layout_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path / "m3"), "--layout", "mxfp4_quark"]) == 0
    assert "M3-nano (mxfp4_quark, " in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "m3")]) == 0
    assert "mxfp4" in capsys.readouterr().out


def test_layouts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--list-layouts"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(LAYOUTS)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--bits", "7"], "7 bits? there are 2, 3, 4, 5, 6, 8"),
        (["--bits", "0"], "0 bits? there are"),
        (["--layout", "gguf"], "there is no layout gguf"),
        (["--layout", "mxfp8_official", "--bits", "4"], "a layout has bits of its own"),
        (["--seed", "3"], "--seed and --vision are for --random"),
        (["--random", "--bits", "4"], "not for --random"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert main(["demo", str(tmp_path / "m3"), *options]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 2
    assert "needs a DIR" in capsys.readouterr().err
