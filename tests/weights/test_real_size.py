"""Checkpoints of the real size, as sparse files, open strictly without being read."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_m3_plugin.weights import read_headers
from tests.checkpoints.real_size import REAL_LAYOUTS

TENSORS = {"published": 23_416, "mxfp8": 45_838}
BYTES = {"published": 854_172_958_720, "mxfp8": 443_742_085_120, "fused_4bit": 241_477_881_856}
PARAMETERS, WITHOUT_VISION_AND_INDEXERS = 427_040_140_160, 425_950_425_216


@pytest.mark.parametrize("layout", REAL_LAYOUTS)
def test_a_checkpoint_of_real_size_opens_without_being_read(layout, tmp_path):
    written = REAL_LAYOUTS[layout](tmp_path)
    assert written.tensors == TENSORS.get(layout, written.tensors)
    assert written.bytes == BYTES.get(layout, written.bytes)
    text_only = layout == "text_only_6bit"
    assert written.parameters == (WITHOUT_VISION_AND_INDEXERS if text_only else PARAMETERS)

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load_model(tmp_path, lazy=True)
    assert mx.get_peak_memory() - before < 2**20

    arrays = dict(tree_flatten(model.parameters()))
    headers = read_headers(tmp_path)
    assert headers.problems == []
    vision = [n for n in headers.tensors if n.startswith(("vision", "multi_modal", "patch_merge"))]
    assert len(vision) == (0 if text_only else 523)
    in_text = written.bytes - sum(headers.tensors[name].nbytes for name in vision)
    assert sum(array.nbytes for array in arrays.values()) == in_text


def test_the_bits_of_a_mixed_checkpoint_follow_its_tensors(tmp_path):
    """``config.json`` names the fused module, which is two in memory."""
    REAL_LAYOUTS["oq4"](tmp_path)
    _, config = load_model(tmp_path, lazy=True)
    quantization = config["quantization"]
    assert not any("gate_up_proj" in path for path in quantization)
    assert quantization["language_model.lm_head"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    attention = "language_model.model.layers.{}.self_attn.q_proj"
    assert quantization[attention.format(20)]["bits"] == 5
    assert quantization[attention.format(3)]["bits"] == 8
