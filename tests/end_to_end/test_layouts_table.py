"""``docs/layouts.md`` says of each library what it opens alone.  A sample of its words is tried."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.checkpoints import layouts_table, opens
from tests.checkpoints.tiny_layouts import LAYOUTS


def opened_alone(library: str, names: list[str]) -> dict[str, str | None]:
    """In a process of its own, without the plugin."""
    command = [sys.executable, opens.__file__, library, *names]
    environment = os.environ | {"MLX_M3_PLUGIN": "off"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    answers: dict[str, str | None] = json.loads(run.stdout)
    assert list(answers) == names
    return answers


def test_every_layout_has_its_row():
    assert layouts_table.read_table().keys() == LAYOUTS.keys()
    assert len(LAYOUTS) >= 24


def test_with_the_plugin_every_layout_opens():
    """What ``tests/weights/test_checkpoints.py`` shows, in the words of the table."""
    columns = [c for c in next(iter(layouts_table.read_table().values())) if c.endswith("with the plugin")]
    assert columns
    for row in layouts_table.read_table().values():
        assert [row[column] for column in columns] == ["yes"] * len(columns)


@pytest.mark.parametrize("library", ["mlx_lm", "mlx_vlm"])
def test_what_a_library_opens_alone(library, sampled_layouts):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    package = library.replace("_", "-")
    column = f"{package} {version(package)} alone"
    table = layouts_table.read_table()
    answers = opened_alone(library, sampled_layouts)
    if package == "mlx-lm" and version("mlx-lm").startswith("0.31."):
        assert all("not supported" in answer for answer in answers.values())
    elif column not in next(iter(table.values())):
        pytest.skip(f"the table has no column '{column}'; make one with layouts_table.py")
    else:
        said = {name: table[name][column] for name in answers}
        assert said == {name: "yes" if answer is None else "no" for name, answer in answers.items()}
