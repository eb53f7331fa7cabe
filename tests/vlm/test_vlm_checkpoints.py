"""Every kind of checkpoint opens, strictly, in mlx-vlm, and computes what its tensors say past the budget."""

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm")

from mlx_m3_plugin.hosts.mlx_vlm.model import MlxVlmModel
from tests.checkpoints.opens import TOKENS, TOLERANCE, load_language_model, logits_of, reference_logits
from tests.checkpoints.tiny_layouts import LAYOUTS


def test_a_checkpoint_opens_and_computes_what_its_tensors_say(layout_name, tmp_path):
    layout = LAYOUTS[layout_name]
    reference = reference_logits(tmp_path, layout.write(tmp_path), TOKENS)
    logits = logits_of(load_language_model("mlx_vlm", tmp_path)(TOKENS))
    assert mx.abs(logits - reference).max() <= TOLERANCE


def test_a_flat_config_of_a_vision_model_is_saved_and_opens_again(tmp_path):
    """The loader adds an empty ``text_config``, and we what mlx-vlm needs to know of the experts."""
    from mlx_vlm.utils import load_model, save_config, save_weights

    LAYOUTS["published_flat_vl"].write(tmp_path / "m3")
    model = load_model(tmp_path / "m3")
    assert isinstance(model, MlxVlmModel)
    (tmp_path / "again").mkdir()
    save_weights(tmp_path / "again", model)
    save_config(dict(model.loader_config), tmp_path / "again" / "config.json")
    again = load_language_model("mlx_vlm", tmp_path / "again")
    assert mx.array_equal(logits_of(again(TOKENS)), logits_of(model.language_model(TOKENS)))
