"""Checkpoints to look at, made by the tests of ``weights``."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints.tiny_layouts import LAYOUTS, UNREPRESENTABLE


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny layout, written once; not to be changed."""
    root = tmp_path_factory.mktemp("layouts")

    def written(name: str) -> Path:
        if not (root / name).exists():
            (LAYOUTS | UNREPRESENTABLE)[name].write(root / name)
        return root / name

    return written


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A published one with vision, to be damaged."""
    LAYOUTS["published_float"].write(tmp_path / "m3")
    return tmp_path / "m3"
