"""A tiny MiniMax-M3 with vision, opened by the installed mlx-vlm.  None of this imports mlx_lm."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published layout, in float32.  For reading only."""
    from tests.checkpoints.tiny_layouts import LAYOUTS

    directory = tmp_path_factory.mktemp("published")
    LAYOUTS["published_float"].write(directory)
    return directory


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Any:
    from mlx_vlm.utils import load_model

    return load_model(checkpoint)
