"""mlx-lm finds shards under any name, and a stage loads its own."""

import json

import pytest

from mlx_m3_plugin.hosts.mlx_lm.sharded import with_shards_named_as_expected
from tests.checkpoints.tiny_layouts import LAYOUTS

SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.fixture
def checkpoint(tmp_path):
    LAYOUTS["mxfp8_official"].write(tmp_path)
    return tmp_path


def test_shards_of_other_names_are_found_and_linked(checkpoint):
    """As ModelOpt names them."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    for number, file in enumerate(SHARDS):
        new = f"experts-layer-{number}.safetensors"
        (checkpoint / file).rename(checkpoint / new)
        index["weight_map"] = {n: new if f == file else f for n, f in index["weight_map"].items()}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with with_shards_named_as_expected(checkpoint) as links:
        assert links != checkpoint
        shards = sorted(path.name for path in links.glob("model*.safetensors"))
        assert shards == [f"model-experts-layer-{n}.safetensors" for n in range(3)]
        assert (links / "config.json").read_text() == (checkpoint / "config.json").read_text()
    assert not links.exists()


def test_ordinary_names_are_left_alone(checkpoint):
    with with_shards_named_as_expected(checkpoint) as path:
        assert path == checkpoint
