"""The notebook runs from top to bottom, and says what is true."""

import ast
import os
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each code cell prints or shows as text."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path_factory.mktemp("quickstart"))}}
    with pytest.MonkeyPatch.context() as patch:
        # Where `!mlx-m3` is.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        NotebookClient(notebook, timeout=300, resources=where).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(map(text_of, cell.outputs)) for cell in cells]


def text_of(output: dict) -> str:
    return output.get("text", "") or output.get("data", {}).get("text/plain", "")


def test_it_answers_reasons_and_calls(said: list[str]) -> None:
    _, text, call, *_ = said
    assert "</mm:think>The nurse is Ben." in text
    assert "<mm:think>8 - 5 = 3, 6 - 2 = 4</mm:think>43" in text
    assert ast.literal_eval(call) == {
        "name": "book_room",
        "arguments": {"people": 4, "when": {"day": "Friday", "hour": 15}},
    }


def test_it_sees_and_finds_and_is_active(said: list[str]) -> None:
    *_, picture, needle, doctor = said
    assert "A red circle and a blue square." in picture
    assert "</mm:think>The code of Nora is 427." in needle
    assert "MiniMax-M3 runs here" in doctor
