"""The same model in several layouts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sharded_checkpoints import write_published

from mlx_m3_plugin.toolbox.convert import convert, load_recipe, open_checkpoint, plan_conversion

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
            source = open_checkpoint(root / "published")
            asked = load_recipe(str(recipe) if kind == "fused" else kind, source.text_config)
            convert(
                plan_conversion(source, asked, None), root / kind, memory=1 << 28, progress=lambda *_: None
            )
        return root / kind

    return written
