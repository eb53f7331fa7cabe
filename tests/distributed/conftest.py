"""The same model in several layouts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints.conversions import converted
from tests.checkpoints.sharded import write_published

FLOAT = """
summary = "as it is"
[default]
dtype = "keep"
"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("distributed")
    write_published(root / "published")
    recipe = root / "fused.toml"
    recipe.write_text(FLOAT)

    def written(kind: str) -> Path:
        if not (root / kind).exists():
            converted(root / "published", str(recipe) if kind == "fused" else kind, root / kind)
        return root / kind

    return written
