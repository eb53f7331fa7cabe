"""``mlx-m3 convert`` of a checkpoint with a draft head: quantized by the recipe, and drafting as before."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox.draft_head import draft_shapes, open_draft_head
from mlx_m3_plugin.toolbox.inspect import inspect
from mlx_m3_plugin.weights.names import draft_parameter, published_draft_name
from tests.checkpoints.tiny_layouts import LAYOUTS
from tests.drafts.runs import load


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("m31") / "published"
    LAYOUTS["m31_published"].write(directory)
    return directory


def values(head: Path) -> dict[str, np.ndarray]:
    """Of the parameters, before any quantization."""
    pytest.importorskip("mlx_vlm.speculative.drafters.dspark", reason="this mlx-vlm has no DSpark")
    found = {}
    drafter = load(head)
    modules = dict(drafter.named_modules())
    for name, array in tree_flatten(drafter.parameters()):
        path, _, part = name.rpartition(".")
        module = modules[path]
        if part == "weight" and "scales" in module:
            options = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            array = mx.dequantize(array, module.scales, module.get("biases"), **options)
        if part in ("weight", "bias"):
            found[name] = np.array(array.astype(mx.float32))
    return found


@pytest.mark.parametrize(
    ("recipe", "stored"),
    [
        # Of attention, of fc, and of the Markov head, which is like an embedding and a head.
        ("4bit", ["4-bit g64"] * 3),
        ("mxfp8", ["mxfp8", "mxfp8", "as stored"]),
        ("keep-qat", ["mxfp8", "as stored", "8-bit g64"]),
    ],
)
def test_a_head_is_quantized_by_the_recipe(
    recipe: str, stored: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    assert main(["convert", str(source), str(made), "--recipe", recipe]) == 0
    assert "draft head (dspark/): quantized by the recipe, " in capsys.readouterr().out
    head = open_draft_head(made / "dspark")
    modules = ("layers.1.self_attn.q_proj", "fc", "markov_head.markov_w2")
    assert [str(head.quantized.get(m, "as stored")) for m in modules] == stored
    before, after = values(source / "dspark"), values(made / "dspark")
    assert before.keys() == after.keys() == draft_shapes(head.config).keys()
    for name, array in before.items():
        spec = head.quantized.get(name.removesuffix(".weight"))
        if spec is not None:
            options = spec.as_quantization()
            parts = mx.quantize(mx.array(array).astype(mx.bfloat16), **options)
            array = np.array(mx.dequantize(*parts, **options).astype(mx.float32))
        assert np.array_equal(array, after[name]), name
    assert not (made / "dspark" / "model.safetensors.index.json").exists()
    found = inspect(made)
    assert found.problems == []


def test_a_recipe_with_a_plan_keeps_the_head(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    arguments = ["convert", str(source), str(made), "--recipe", "oq4", "--sensitivity", "position"]
    assert main(arguments) == 0
    assert same_files(source / "dspark", made / "dspark")


def same_files(one: Path, other: Path) -> bool:
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (one, other)]
    return contents[0] == contents[1]


def test_a_damaged_head_stops_a_conversion_that_includes_it(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    (damaged / "dspark" / "model-00001-of-00003.safetensors").unlink()
    arguments = ["convert", str(damaged), str(tmp_path / "made"), "--recipe", "4bit"]
    assert main(arguments) == 2
    assert "dspark is not a whole draft head:\n" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    assert main([*arguments, "--no-draft"]) == 0
    assert not (tmp_path / "made" / "dspark").exists()
    assert main([*arguments, "--no-draft", "--keep-draft"]) == 2


def test_names_are_written_as_published(source: Path) -> None:
    published = {
        name for name in open_draft_head(source / "dspark").headers.tensors if "_scale_inv" not in name
    }
    assert {published_draft_name(draft_parameter(name)) for name in published} == published
