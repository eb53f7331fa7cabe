"""Every kind of checkpoint opens, strictly, through stock ``mlx_lm.load_model``, and computes the same.

The reference is a float model that holds the values which the stored tensors stand for.
"""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.minimax_m3_vl import Model, ModelArgs
from mlx_lm.utils import load_config, load_model

from mlx_m3_plugin.toolbox.checkpoint import open_checkpoint
from mlx_m3_plugin.toolbox.parameters import expected_parameters, text_shapes
from mlx_m3_plugin.weights.check import shape_and_kind
from tests.checkpoints.opens import TOKENS, TOLERANCE, load_language_model, reference_logits
from tests.checkpoints.tiny_layouts import LAYOUTS, UNREPRESENTABLE


def test_a_checkpoint_opens_and_computes_what_its_tensors_say(layout_name, tmp_path):
    layout = LAYOUTS[layout_name]
    reference = reference_logits(tmp_path, layout.write(tmp_path), TOKENS)
    model, _ = load_model(tmp_path)
    logits = model(TOKENS).astype(mx.float32)
    assert mx.abs(logits - reference).max() <= TOLERANCE
    check_that_mapping_again_changes_nothing(model, tmp_path)
    check_that_inspection_expects_its_parameters(model, tmp_path)


def check_that_mapping_again_changes_nothing(model, tmp_path):
    weights = dict(tree_flatten(model.parameters()))
    again = Model(ModelArgs.from_dict(load_config(tmp_path))).sanitize(dict(weights))
    prefix = "" if model.model_type == "minimax_m3" else "language_model."
    assert {name.removeprefix("language_model.") for name in again} == {
        n.removeprefix(prefix) for n in weights
    }
    assert all(
        again[f"language_model.{name.removeprefix(prefix)}"] is array for name, array in weights.items()
    )


def check_that_inspection_expects_its_parameters(model, tmp_path):
    """Names, shapes and kinds of dtype: from headers they are the same as from modules."""
    checkpoint = open_checkpoint(tmp_path)
    shapes = text_shapes(checkpoint.text_config, indexers=checkpoint.indexers)
    expected = expected_parameters(checkpoint.plan, shapes, checkpoint.quantized)
    loaded = {
        path.removeprefix("language_model."): shape_and_kind(array)
        for path, array in tree_flatten(model.parameters())
    }
    assert expected == loaded


@pytest.mark.parametrize("library", ["mlx_lm", "mlx_vlm"])
def test_one_line_says_what_is_not_used(library, tmp_path, caplog):
    pytest.importorskip(library)
    LAYOUTS["m31_oq_keeping_nvfp4_draft"].write(tmp_path)
    load_language_model(library, tmp_path)
    ours = [record.getMessage() for record in caplog.records if record.name == "mlx_m3_plugin"]
    assert ours == ["mlx-m3-plugin: draft tensors are not used: 14 (language_model.model.dspark.*, mtp.*)"]


@pytest.mark.parametrize("name", UNREPRESENTABLE)
def test_what_cannot_be_represented_is_refused_by_name(name, tmp_path):
    UNREPRESENTABLE[name].write(tmp_path)
    with pytest.raises(ValueError, match=UNREPRESENTABLE[name].offender):
        load_model(tmp_path)


def test_shards_of_other_names_open(tmp_path):
    """ModelOpt's files are not called ``model*``, which is all that mlx-lm looks for."""
    layout = LAYOUTS["nvfp4_modelopt_mixed"]
    reference = reference_logits(tmp_path, layout.write(tmp_path), TOKENS)
    index = (tmp_path / "model.safetensors.index.json").read_text()
    (tmp_path / "model.safetensors.index.json").write_text(index.replace('"model-', '"experts-layer-'))
    for file in list(tmp_path.glob("model-*.safetensors")):
        file.rename(tmp_path / file.name.replace("model-", "experts-layer-"))
    model, _ = load_model(tmp_path)
    assert mx.abs(model(TOKENS).astype(mx.float32) - reference).max() <= TOLERANCE
    # Lazily too: the links are gone by the time the tensors are read.
    model, _ = load_model(tmp_path, lazy=True)
    assert mx.abs(model(TOKENS).astype(mx.float32) - reference).max() <= TOLERANCE
