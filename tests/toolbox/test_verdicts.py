"""What ``inspect`` says of opening a checkpoint, and what loading it really does."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from mlx_m3_plugin.toolbox.inspect import inspect, lines_of
from mlx_m3_plugin.toolbox.stock import why_not_opened
from tests.checkpoints import layouts_table, opens
from tests.checkpoints.corruptions import CORRUPTIONS, Shards
from tests.checkpoints.tiny_layouts import UNREPRESENTABLE
from tests.end_to_end.environments import here
from tests.weights.test_corruptions import DAMAGED, origins

LIBRARIES = ("mlx-lm", "mlx-vlm")
IS_NEWEST = Version(version("mlx-lm")) >= Version("0.32.2")
# mlx-lm alone opens them, and computes with them on a GPU only.
ON_A_GPU = "Global scale is only supported on the GPU"
# Found when values are read, which inspect does not do.
UNSEEN = "nan_scale"

pytest.importorskip("mlx_vlm")


def test_what_inspect_says_of_every_layout(sampled_layouts: list[str], tiny: Callable[[str], Path]) -> None:
    """With us it opens; alone it opens and is right, or is wrong past the budget, or does not open.

    And ``docs/layouts.md`` says the same.
    """
    table = layouts_table.read_table()
    # The last one opens in both alone, and is wrong in both past the budget.
    names = list(dict.fromkeys([*sampled_layouts, "m31_mlx_fused_129_4bit"]))
    for library in LIBRARIES:
        alone = measured_alone(library, names)
        said_alone = why_not_opened(library, *map(tiny, names))
        column = f"{library} {version(library)} alone"
        for name, said in zip(names, said_alone, strict=True):
            found = inspect(tiny(name))
            assert found.opens[library]
            why, is_right = alone[name]
            if table[name].get(column):
                assert table[name][column] == ("yes" if why is None else "no")
            if why and ON_A_GPU in why:
                assert not said
                continue
            assert (not said) == (why is None), (name, library, said, why)
            # Of older releases than those that inspect knows, nothing is said past the budget.
            if why is None and IS_NEWEST:
                assert (library not in found.wrong_without_plugin) == is_right, (name, library)


def measured_alone(library: str, names: list[str]) -> dict[str, tuple[str | None, bool]]:
    which = (library.replace("-", "_"), "--past-the-budget", *names)
    run = here().run(opens.__file__, *which, env={"MLX_M3_PLUGIN": "off"})
    answers: dict[str, tuple[str | None, bool]] = json.loads(run.stdout)
    assert list(answers) == names
    return answers


def test_what_stock_says_in_words(tiny: Callable[[str], Path]) -> None:
    found = inspect(tiny("m31_mlx_4bit"))
    found.fails_without_plugin = {"mlx-lm": "", "mlx-vlm": "ValueError: Received 30 parameters"}
    lines = [line.strip() for line in lines_of(found) if " alone " in line]
    assert lines == [
        "mlx-lm alone  opens, not right past 32 tokens (it ignores sparse_init_block)",
        "mlx-vlm alone does not open (ValueError: Received 30 parameters)",
    ]


def test_what_inspect_says_of_broken_checkpoints(
    tiny: Callable[[str], Path], tmp_path: Path, fresh_seed: int, count: Callable[[int, int], int]
) -> None:
    """Thirty: six in formats that cannot be represented, and two of each kind of damage."""
    said = 0
    for what, directory in broken(tiny, tmp_path, random.Random(fresh_seed), count(2, 40)):
        try:
            verdict: dict[str, Any] = inspect(directory).opens
        except (ValueError, OSError):
            verdict = dict.fromkeys(LIBRARIES, False)
        for library in LIBRARIES:
            error = error_of_loading(library.replace("-", "_"), directory)
            assert verdict[library] == (error is None or what.startswith(UNSEEN)), (what, library, error)
        said += 1
    assert said >= 30


def broken(
    tiny: Callable[[str], Path], work: Path, rng: random.Random, each: int
) -> Iterator[tuple[str, Path]]:
    for name in UNREPRESENTABLE:
        yield name, tiny(name)
    made_from = {name: origins(tiny(name)) for name in DAMAGED}
    for kind, corruption in CORRUPTIONS.items():
        for number in range(each):
            name = rng.choice(DAMAGED)
            copy = Path(shutil.copytree(tiny(name), work / f"{kind}-{number}"))
            damage = corruption(Shards.read(copy, made_from[name]), rng)
            assert damage is not None
            yield f"{kind} of {name}: {damage.what}", copy
            shutil.rmtree(copy)


def error_of_loading(library: str, directory: Path) -> str | None:
    try:
        opens.load_language_model(library, directory)
    except Exception as error:  # whatever a library says
        return str(error)
    return None
