"""``docs/conversions.md`` says what each command makes of each layout.  No cell is a silent change."""

from importlib.metadata import version
from pathlib import Path

import pytest

from tests.checkpoints import conversions_table as table
from tests.checkpoints.edits import edit_json
from tests.checkpoints.tiny_layouts import LAYOUTS
from tests.end_to_end.environments import here

COLUMNS = table.columns_here()
CELLS = {table.EXACT, table.CAST, table.QUANTIZED, "refused"}


def test_every_layout_has_its_row_and_no_cell_is_silent() -> None:
    published = table.read_table()
    assert published.keys() == LAYOUTS.keys()
    for row in published.values():
        assert [*row] == ["layout", *table.LOADS, *table.WAYS]
        assert {cell for column, cell in row.items() if column != "layout"} <= CELLS


@pytest.mark.skipif(version("mlx-lm").startswith("0.31."), reason="the table is of the newest releases")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.some(3)
def test_what_conversions_do_to_values(name: str) -> None:
    found = table.answers(name, COLUMNS)
    said = table.read_table()[name]
    assert {column: table.cell(answer) for column, answer in found.items()} == {
        c: said[c] for c in COLUMNS
    }, found
    for answer in found.values():
        if answer.startswith("refused"):
            assert ("tensor scales" in answer and "convert" in answer) or "num_hidden_layers" in answer


OPEN = "import sys, pathlib, mlx_lm.utils; mlx_lm.utils.load_model(pathlib.Path(sys.argv[1]), lazy=True)"


@pytest.mark.skipif(version("mlx-lm").startswith("0.31."), reason="mlx-lm 0.31 has no M3 class")
@pytest.mark.parametrize("layout", ["mlx_unfused_nvfp4_tensor_scales", "nvfp4_modelopt_mixed"])
@pytest.mark.parametrize("column", ["mlx_lm.convert", "mlx_vlm.convert", "mlx-m3 keep", "keep-qat"])
def test_copied_tensor_scales_open_in_stock_mlx_lm(column: str, layout: str, tmp_path: Path) -> None:
    """It loads them; only GPUs compute with them."""
    if column not in COLUMNS:
        pytest.skip("mlx-vlm is not installed here")
    LAYOUTS[layout].write(tmp_path / "m3")
    edit_json(tmp_path / "m3" / "config.json", lambda config: config.update(torch_dtype="bfloat16"))
    table.WAYS[column](tmp_path / "m3", tmp_path / "made")
    here().run("-c", OPEN, tmp_path / "made", env={"MLX_M3_PLUGIN": "off"})
