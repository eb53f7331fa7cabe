"""The table of ``docs/layouts.md`` is complete; ``tests/toolbox/test_verdicts.py`` tries what it says."""

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
