"""What we convert opens, strictly and with the right logits, in stock mlx-lm and mlx-vlm without us."""

import json
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import pytest

from mlx_m3_plugin.toolbox.convert.recipe import recipe_names
from tests.checkpoints.conversions import SOURCES, converted, one_of_each, text_values
from tests.checkpoints.opens import reference_logits
from tests.checkpoints.tiny_layouts import LAYOUTS
from tests.end_to_end.environments import Environment

CHILD = Path(__file__).with_name("stock_opens.py")
# Below the block budget of these models, so that a library's own selection is not judged here.
TOKENS = [(7 * i * i + 3 * i) % 90 for i in range(30)]
# Of mlx's kernels for quantized matrices, against matrices of the same values in float32.
TOLERANCE = 1e-3


class Made(NamedTuple):
    """A conversion, and the logits that its tensors stand for.

    Attributes:
        scaled: the modules around layers that have NVFP4's tensor scales.
    """

    directory: Path
    packed: bool
    vision: bool
    scaled: frozenset[str]
    logits: mx.array


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, count: Callable[[int, int], int]) -> list[Made]:
    root = tmp_path_factory.mktemp("converted")
    pairs = [(recipe, source) for recipe in recipe_names() for source in SOURCES]
    if not count(0, 1):
        pairs = one_of_each(pairs)
    return [convert_and_compute(root, recipe, source) for recipe, source in pairs]


def convert_and_compute(root: Path, recipe: str, source: str) -> Made:
    if not (root / source).exists():
        LAYOUTS[source].write(root / source)
    directory = root / f"{recipe} of {source}"
    plan = converted(root / source, recipe, directory)
    logits = reference_logits(directory, text_values(directory, plan), mx.array([TOKENS]))
    mx.eval(logits)
    scaled = frozenset(path.rpartition(".")[0] for path, spec in plan.specs.items() if spec.tensor_scales)
    return Made(directory, plan.packed, bool(plan.source.vision), scaled, logits)


def errors_and_differences(
    stock: Environment, library: str, made: list[Made], work: Path
) -> tuple[dict[str, str], dict[str, float]]:
    """What did not open and why; what opened and computes something else."""
    asked = {"tokens": TOKENS, "directories": [str(one.directory) for one in made]}
    (work / "asked.json").write_text(json.dumps(asked))
    stock.run(CHILD, library, work, timeout=1800)
    errors = json.loads((work / "errors.json").read_text())
    logits = mx.load(str(work / "logits.npz"))
    largest = {
        one.directory.name: mx.abs(logits[str(place)] - one.logits).max().item()
        for place, one in enumerate(made)
        if errors[str(one.directory)] is None
    }
    return (
        {Path(directory).name: error for directory, error in errors.items() if error is not None},
        {name: difference for name, difference in largest.items() if not difference <= TOLERANCE},
    )


@pytest.mark.skipif(version("mlx-lm").startswith("0.31."), reason="mlx-lm 0.31 has no M3 class")
def test_in_stock_mlx_lm(stock: Environment, made: list[Made], tmp_path: Path) -> None:
    errors, differences = errors_and_differences(stock, "mlx_lm", made, tmp_path)
    assert differences == {}
    assert errors.keys() == {one.directory.name for one in made if one.scaled}
    for one in made:
        # Only experts may have tensor scales there.  It loads them, and these tests run on a CPU.
        if one.scaled and all(module.endswith(".switch_mlp") for module in one.scaled):
            assert "Global scale is only supported on the GPU" in errors[one.directory.name]


@pytest.mark.skipif(find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed here")
def test_in_stock_mlx_vlm(stock: Environment, made: list[Made], tmp_path: Path) -> None:
    errors, differences = errors_and_differences(stock, "mlx_vlm", made, tmp_path)
    assert differences == {}
    # 0.6.4 knows no other M3 than one with packed experts and a vision tower.
    old = version("mlx-vlm") == "0.6.4"
    not_for_it = {one.directory.name for one in made if not (one.packed and one.vision)}
    scaled = {one.directory.name for one in made if one.scaled}
    assert errors.keys() == scaled | (not_for_it if old else set())
