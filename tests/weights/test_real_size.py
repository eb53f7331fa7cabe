"""Checkpoints of the real size, as sparse files, open strictly without being read."""

import json
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox.fit import fit
from mlx_m3_plugin.weights.headers import StoredTensor, read_headers
from tests.checkpoints.real_size import REAL_LAYOUTS, real

TENSORS = {"published": 23_416, "mxfp8": 45_838}
BYTES = {"published": 854_172_958_720, "mxfp8": 443_742_085_120, "fused_4bit": 241_477_881_856}
PARAMETERS, WITHOUT_VISION_AND_INDEXERS = 427_040_140_160, 425_950_425_216
# Three more layers have an indexer.
M31_PARAMETERS = PARAMETERS + 3 * 3_932_416
# Of MiniMax's files, in GB.
M31_PUBLISHED = 250.12


def vision_of(directory: Path) -> list[StoredTensor]:
    tensors = read_headers(directory).tensors.items()
    return [t for name, t in tensors if name.startswith(("vision", "multi_modal", "patch_merge"))]


@pytest.mark.some(4)
@pytest.mark.parametrize("layout", REAL_LAYOUTS)
def test_a_checkpoint_of_real_size_opens_without_being_read(layout):
    written = real(layout)
    assert written.tensors == TENSORS.get(layout, written.tensors)
    assert written.bytes == BYTES.get(layout, written.bytes)
    text_only = layout == "text_only_6bit"
    others = {"text_only_6bit": WITHOUT_VISION_AND_INDEXERS, "m31": M31_PARAMETERS}
    assert written.parameters == others.get(layout, PARAMETERS)

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load_model(written.path, lazy=True)
    assert mx.get_peak_memory() - before < 2**20

    arrays = dict(tree_flatten(model.parameters()))
    assert read_headers(written.path).problems == []
    vision = vision_of(written.path)
    assert len(vision) == (0 if text_only else 523)
    in_text = written.bytes - sum(tensor.nbytes for tensor in vision)
    assert sum(array.nbytes for array in arrays.values()) == in_text


def test_m31_has_its_published_size_everywhere(capsys):
    """In the headers, as `fit` says, as the dry run of a conversion says, and in both hosts.

    That mlx-lm loads all that is not vision is the test above.
    """
    written = real("m31")
    assert written.bytes / 1e9 == pytest.approx(M31_PUBLISHED, rel=0.005)
    assert written.parameters / 1e9 == pytest.approx(427.052, abs=0.0005)
    found = fit(written.path, 512 << 30)
    assert found.model == "MiniMax-M3.1-Flash"
    assert found.weights == written.bytes - sum(t.nbytes for t in vision_of(written.path))
    assert found.weights + found.vision == written.bytes

    # The published 4-bit M3 is the only conversion by a recipe of ours whose size is known.  Here there are
    # three more indexers.
    assert main(["convert", str(written.path), "--recipe", "4bit", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["bytes"] == pytest.approx(BYTES["fused_4bit"] + 3 * 3_932_416 * 4.5 / 8, rel=0.005)
    assert planned["parameters"] == M31_PARAMETERS

    if find_spec("mlx_vlm") is not None:
        from mlx_vlm.utils import load_model as load_vlm

        mx.clear_cache()
        before = mx.get_active_memory()
        arrays = dict(tree_flatten(load_vlm(written.path, lazy=True).parameters()))
        assert mx.get_active_memory() - before < 2**20
        assert sum(array.nbytes for array in arrays.values()) == written.bytes


def test_the_bits_of_a_mixed_checkpoint_follow_its_tensors():
    """``config.json`` names the fused module, which is two in memory."""
    _, config = load_model(real("oq4").path, lazy=True)
    quantization = config["quantization"]
    assert not any("gate_up_proj" in path for path in quantization)
    assert quantization["language_model.lm_head"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    attention = "language_model.model.layers.{}.self_attn.q_proj"
    assert quantization[attention.format(20)]["bits"] == 5
    assert quantization[attention.format(3)]["bits"] == 8
