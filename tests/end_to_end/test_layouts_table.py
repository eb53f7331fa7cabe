"""``docs/layouts.md`` says of each library what it opens alone.  Each word of it is tried."""

from collections.abc import Callable
from importlib.metadata import version

import pytest

from tests.checkpoints import layouts_table
from tests.checkpoints.tiny_layouts import LAYOUTS


def test_every_layout_has_its_row():
    assert layouts_table.read_table().keys() == LAYOUTS.keys()
    assert len(LAYOUTS) >= 24


def test_with_the_plugin_every_layout_opens():
    """What ``tests/weights/test_checkpoints.py`` shows, in the words of the table."""
    columns = [c for c in next(iter(layouts_table.read_table().values())) if c.endswith("with the plugin")]
    assert columns
    for row in layouts_table.read_table().values():
        assert [row[column] for column in columns] == ["yes"] * len(columns)


def test_what_mlx_lm_opens_alone(opened_alone: Callable[[str], dict[str, str | None]]):
    column = f"mlx-lm {version('mlx-lm')} alone"
    table = layouts_table.read_table()
    answers = opened_alone("mlx_lm")
    if version("mlx-lm").startswith("0.31."):
        assert all("not supported" in answer for answer in answers.values())
    elif column not in next(iter(table.values())):
        pytest.skip(f"the table has no column '{column}'; make one with layouts_table.py")
    else:
        said = {name: table[name][column] for name in answers}
        assert said == {name: "yes" if answer is None else "no" for name, answer in answers.items()}
