"""Layouts in words, and every known layout sound and opened by the plugin."""

import pytest

from mlx_m3_plugin.toolbox.inspect import inspect, lines_of
from tests.checkpoints.edits import edit_json, stored_names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("published_float", ["published names", "one tensor for each expert's projection"]),
        ("published_model_around", ["published names under an extra model."]),
        ("published_model_language_model", ["transformers' names"]),
        ("published_text_only", ["text-only names"]),
        ("published_dense_under_moe", ["dense MLPs under block_sparse_moe"]),
        ("published_with_mtp", ["2 unused tensors"]),
        ("transformers_in_memory", ["transformers' in-memory module names", "gate and up fused"]),
        ("mlx_unfused_4bit", ["experts stacked (4 rows), gate and up separate"]),
        (
            "mlx_unfused_129_4bit",
            ["experts stacked (5 rows), gate and up separate", "as the last row"],
        ),
        ("mlx_fused_129_4bit", ["experts stacked (5 rows), gate and up fused", "as the last row"]),
        ("mlx_fused_128_4bit", ["experts stacked (4 rows), gate and up fused"]),
    ],
)
def test_a_layout_in_words(name, words, tiny):
    words_of_it = "; ".join(inspect(tiny(name)).layout.in_words())
    assert [word for word in words if word not in words_of_it] == []
    assert ("last row" in words_of_it) == ("129" in name)


@pytest.mark.parametrize(
    ("name", "precisions"),
    [
        ("mlx_config_i", {"affine 2-bit g64", "affine 3-bit g64", "affine 4-bit g64", "affine 8-bit g64"}),
        ("nvfp4_modelopt_mixed", {"nvfp4", "mxfp8"}),
        ("mxfp4_quark", {"mxfp4"}),
        ("published_float", set()),
    ],
)
def test_precisions(name, precisions, tiny):
    found = inspect(tiny(name))
    assert {str(p) for p in found.precisions if p.group_size is not None} == precisions
    assert sum(p.parameters for p in found.precisions) == found.parameters


def test_every_known_layout_is_sound(layout_name, tiny):
    name = layout_name
    found = inspect(tiny(name))
    assert found.problems == []
    assert found.opens == {"mlx-lm": True, "mlx-vlm": True}
    assert found.vision == any("vision_tower" in tensor for tensor in stored_names(tiny(name))), (
        "vision is what the tensors say"
    )
    found.name, found.commands = "m3", []
    assert [len(line) for line in lines_of(found) if len(line) > 100] == []


def test_without_an_indexer_a_note_says_what_that_means(tiny):
    found = inspect(tiny("mlx_no_indexer"))
    assert found.attention.with_indexer == []
    assert "no indexer" in found.notes[0]
    assert inspect(tiny("mlx_unfused_4bit")).notes == []


def test_yarn_is_shown(checkpoint):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 524288}
    edit_json(checkpoint / "config.json", lambda config: config["text_config"].update(rope_scaling=yarn))
    assert "by YaRN (2.0 x 524288)" in "\n".join(lines_of(inspect(checkpoint)))
