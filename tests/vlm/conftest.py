"""A tiny MiniMax-M3 with vision, opened by the installed mlx-vlm.  None of this imports mlx_lm."""

import sys
from pathlib import Path
from typing import Any

import pytest

# ``ties``, ``environments`` and the makers of replies serve these tests as well.
sys.path += [str(Path(__file__).parents[1] / room) for room in ("hosts", "end_to_end", "chat")]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published layout, in float32.  For reading only."""
    from checkpoints import LAYOUTS

    directory = tmp_path_factory.mktemp("published")
    LAYOUTS["published_float"].write(directory)
    return directory


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Any:
    from mlx_vlm.utils import load_model

    return load_model(checkpoint)
