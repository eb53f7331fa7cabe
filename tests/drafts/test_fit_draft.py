"""``mlx-m3 fit --draft`` on files of the real size, against sums made by hand."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox.demo import NANO
from mlx_m3_plugin.toolbox.fit import AUTO, Drafting, Fit, fit
from tests.checkpoints import real_size
from tests.checkpoints.edits import edit_json

GIB = 1 << 30
# FP8 values, their scales, and what is bfloat16.
HEAD = 1_667_235_840 + 52_101_120 + 582_515_714
TEXT = real_size.DSPARK_CONFIG["text_config"]
MARKOV = 200_064 * 256 * 2


@pytest.fixture(scope="module")
def m31(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of M3.1's size in 4 bits, but with M3's 57 sparse layers."""
    directory = tmp_path_factory.mktemp("real") / "m31"
    real_size.REAL_LAYOUTS["fused_4bit"](directory)
    assert real_size.write_dspark(directory / "dspark").tensors == 97
    return directory


def drafting(found: Fit) -> Drafting:
    assert found.drafting is not None
    return found.drafting


def test_the_published_head(m31: Path) -> None:
    plain = fit(m31, 512 * GIB, context=4096)
    found = fit(m31, 512 * GIB, context=4096, draft=AUTO, acceptance=[0.8])
    # 10,240 bytes of K and V per token.
    assert (drafting(found).weights, drafting(found).cache) == (HEAD, 4096 * 10_240)
    assert found.total == plain.total + plain.vision + HEAD + 4096 * 10_240
    assert (found.touched, found.ceilings) == (plain.touched, plain.ceilings)
    # Three matrices per layer and expert.
    experts = 57 * 3 * 6144 * 3072 * 4.5 / 8
    keys_values = 57 * 2048 * 2 * 4 * 128 * 2
    lm_head = 200_064 * 6144 * 4.5 / 8
    for length in drafting(found).lengths:
        n = length.drafted
        distinct = 128 * (1 - (1 - 4 / 128) ** (n + 1))
        verified = plain.touched + n * keys_values + experts * (distinct - 4)
        head = HEAD - 2 * MARKOV + n * MARKOV + 4096 * 10_240 + lm_head
        assert length.read == pytest.approx(verified + head, rel=1e-9)
        assert length.tokens_per_pass == pytest.approx((1 - 0.8 ** (n + 1)) / 0.2, abs=1e-3)
        speedup = length.tokens_per_pass * plain.touched / length.read
        assert length.speedup == pytest.approx(speedup, abs=1e-3)
    assert len(drafting(found).lengths) == 7


def test_drafting_need_not_pay(m31: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", str(m31), "--memory", "512GB", "--context", "4K", "--draft"]
    assert main([*arguments, "--acceptance", "0.4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["drafting"]
    assert answer["best"] is None
    assert max(length["speedup"] for length in answer["lengths"]) < 1
    assert main([*arguments, "--acceptance", "0.4"]) == 0
    assert "Drafting does NOT pay." in capsys.readouterr().out

    assert main([*arguments, "--acceptance", "0.95"]) == 0
    printed = capsys.readouterr().out
    found = drafting(fit(m31, 512 * GIB, context=4096, draft=AUTO, acceptance=[0.95]))
    assert found.best is not None
    assert found.best.speedup == max(length.speedup for length in found.lengths) > 1
    assert f"--draft-model {m31}/dspark --draft-block-size {found.best.drafted + 1}\n" in printed
    assert f"{found.ceilings['M3 Ultra']} on M3 Ultra" in printed
    plain = fit(m31, 512 * GIB, context=4096).ceilings["M3 Ultra"]
    assert found.ceilings["M3 Ultra"] == pytest.approx(plain * found.best.speedup, rel=0.01)


def test_acceptance_by_position(m31: Path) -> None:
    found = drafting(fit(m31, 512 * GIB, draft=m31 / "dspark", acceptance=[0.9, 0.5]))
    assert [length.tokens_per_pass for length in found.lengths] == [1.9, 2.35]
    with pytest.raises(ValueError, match=r"--acceptance has 8 values, but .*dspark drafts 7 tokens"):
        fit(m31, 512 * GIB, draft=AUTO, acceptance=[0.9] * 8)


@pytest.mark.parametrize("text", ["", "1.1", "-0.1", "nan", "0.5,", "80%"])
def test_acceptance_is_a_rate(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "nowhere", "--draft", "--acceptance", text]) == 2
    assert "numbers from 0 to 1" in capsys.readouterr().err


def test_options_that_do_not_go_together(m31: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(m31), "--memory", "512GB", "--acceptance", "0.8"]) == 2
    assert "--acceptance is for --draft" in capsys.readouterr().err
    assert main(["fit", str(m31), "--memory", "256GB,256GB", "--draft"]) == 2
    assert "--draft is for one machine" in capsys.readouterr().err


def without_shards(head: Path) -> None:
    next(head.glob("*.safetensors")).unlink()


def described(**wrong: object) -> Callable[[Path], None]:
    return lambda head: edit_json(head / "config.json", lambda config: config.update(wrong))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "No such file"),
        (described(architectures=["Other"]), "is not a draft head of MiniMax-M3.1: the architectures"),
        (described(text_config={"hidden_size": "wide"}), "hidden_size must be a positive integer"),
        (
            described(text_config=TEXT | {"vocab_size": 9}),
            r"markov_w1.weight is float.200064, 256., not",
        ),
        (without_shards, "is not a whole draft head"),
    ],
)
def test_a_head_that_cannot_be_counted(
    damage: Callable[[Path], object], message: str, m31: Path, tmp_path: Path
) -> None:
    # Links: copies would fill the holes of sparse files.
    head = Path(shutil.copytree(m31 / "dspark", tmp_path / "head", copy_function=os.link))
    shutil.copyfile(head / "config.json", tmp_path / "config.json")
    os.replace(tmp_path / "config.json", head / "config.json")
    damage(head)
    with pytest.raises((OSError, ValueError), match=message):
        fit(m31, 512 * GIB, draft=head)


def test_a_head_of_another_model(m31: Path) -> None:
    with pytest.raises(ValueError, match="for another model: its hidden_size is 6144, the checkpoint's 128"):
        fit(NANO, 64 * GIB, draft=m31 / "dspark")


def test_a_checkpoint_without_a_head() -> None:
    with pytest.raises(FileNotFoundError, match=r"has no draft head in dspark/ on disk; name its directory"):
        fit(real_size.real("fused_4bit").path, 512 * GIB, draft=AUTO)
