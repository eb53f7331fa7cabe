"""Layouts in words, and who opens them: verdicts that the libraries themselves confirm."""

import importlib.util
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_m3_plugin.toolbox.inspect import Inspection, inspect, readers
from mlx_m3_plugin.toolbox.inspect.readers import NEWEST_KNOWN
from mlx_m3_plugin.toolbox.inspect.text import lines_of
from tests.checkpoints.edits import edit_json, stored_names
from tests.checkpoints.tiny_layouts import LAYOUTS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("published_float", ["published names", "one tensor for each expert's projection"]),
        ("published_model_around", ["published names behind another model."]),
        ("published_model_language_model", ["transformers' names"]),
        ("published_text_only", ["text-only names"]),
        ("published_dense_under_moe", ["dense MLPs under block_sparse_moe"]),
        ("published_with_mtp", ["2 mtp tensors that nothing reads"]),
        ("transformers_in_memory", ["modules as transformers names them in memory", "gate and up fused"]),
        ("mlx_unfused_4bit", ["experts stacked (4 rows), gate and up apart"]),
        ("mlx_unfused_129_4bit", ["experts stacked (5 rows), gate and up apart", "packed as their last row"]),
        ("mlx_fused_129_4bit", ["experts stacked (5 rows), gate and up fused", "packed as their last row"]),
        ("mlx_fused_128_4bit", ["experts stacked (4 rows), gate and up fused"]),
    ],
)
def test_a_layout_in_words(name, words, tiny):
    told = "; ".join(inspect(tiny(name)).layout.in_words())
    assert [word for word in words if word not in told] == []
    assert ("last row" in told) == ("129" in name)


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
    assert found.readers[0].with_plugin.opens
    assert found.vision == any("vision_tower" in tensor for tensor in stored_names(tiny(name))), (
        "vision is what the tensors say"
    )
    assert [len(line) for line in lines_of(replace(found, name="m3", commands=[])) if len(line) > 100] == []


@pytest.mark.parametrize("library", ["mlx_lm", "mlx_vlm"])
def test_the_libraries_confirm_the_verdicts(library, tiny, opened_alone):
    name = library.replace("_", "-")
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if library == "mlx_vlm" and version(name) != NEWEST_KNOWN[name]:
        pytest.skip(f"the rules are those of {name} {NEWEST_KNOWN[name]}")
    # What is wrong with a machine is not wrong with the checkpoint.
    told = opened_alone(library)
    answers = {name: error is None or "only supported on the GPU" in error for name, error in told.items()}
    verdicts = {name: stock_verdict(inspect(tiny(name)), library) for name in answers}
    assert {n: v for n, v in verdicts.items() if v.opens != answers[n]} == {}
    assert all(v.opens or v.reason for v in verdicts.values())


def stock_verdict(found: Inspection, library: str) -> Any:
    reader = next(reader for reader in found.readers if reader.library == library.replace("_", "-"))
    assert reader.installed
    return reader.without_plugin


def name_shards_otherwise(checkpoint: Path) -> None:
    """As ModelOpt does."""
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"experts-'))
    for file in list(checkpoint.glob("model-*.safetensors")):
        file.rename(checkpoint / file.name.replace("model-", "experts-"))


NOTHING_INSTALLED = SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None))


def forget_quantization(checkpoint: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        del config["quantization"], config["quantization_config"]

    edit_json(checkpoint / "config.json", forget)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("published_float", name_shards_otherwise, "it opens files named model*.safetensors only"),
        ("mlx_unfused_4bit", forget_quantization, "its config does not say how it is quantized"),
    ],
)
def test_what_only_the_plugin_opens(name, damage, reason, tmp_path, monkeypatch):
    # As if nothing were installed: the newest versions known are meant.
    monkeypatch.setattr(readers, "importlib", NOTHING_INSTALLED)
    LAYOUTS[name].write(tmp_path)
    assert inspect(tmp_path).readers[0].without_plugin.opens
    damage(tmp_path)
    verdicts = inspect(tmp_path).readers[0]
    assert (verdicts.without_plugin.opens, verdicts.without_plugin.reason) == (False, reason)
    assert verdicts.with_plugin.opens


@pytest.mark.parametrize(
    ("name", "mlx_lm", "mlx_vlm"),
    [
        ("published_text_only", "it has no model type minimax_m3", None),
        ("transformers_in_memory", "it does not know transformers' names of modules", "transformers' names"),
        ("mlx_shared_8bit", None, "it wants gate and up fused"),
        ("mlx_shared_8bit_unpacked", None, None),
        ("mlx_fused_129_4bit", None, None),
        ("mxfp8_official", None, "it does not know this quantized format"),
    ],
)
def test_the_reasons(name, mlx_lm, mlx_vlm, tiny, monkeypatch):
    monkeypatch.setattr(readers, "importlib", NOTHING_INSTALLED)
    for reader, reason in zip(inspect(tiny(name)).readers, (mlx_lm, mlx_vlm), strict=True):
        assert reader.without_plugin.opens == (reason is None)
        assert reason is None or reason in reader.without_plugin.reason


def test_what_the_plugin_does_not_serve_is_said(tiny, monkeypatch):
    entry_points = [SimpleNamespace(name="minimax_m3_vl", group="mlx_lm.models")]
    target = "mlx_m3_plugin.toolbox.inspect.readers.distribution"
    monkeypatch.setattr(target, lambda _: SimpleNamespace(entry_points=entry_points))
    verdict = inspect(tiny("mxfp8_official")).readers[1].with_plugin
    assert (verdict.not_yet, verdict.opens) == (True, False)
    entry_points.append(SimpleNamespace(name="minimax_m3_vl", group="mlx_vlm.models"))
    verdict = inspect(tiny("mxfp8_official")).readers[1].with_plugin
    assert (verdict.not_yet, verdict.opens) == (False, True)


def test_without_an_indexer_a_note_says_what_that_means(tiny):
    found = inspect(tiny("mlx_no_indexer"))
    assert found.attention.with_indexer == []
    assert "no indexer here" in found.notes[0]
    assert inspect(tiny("mlx_unfused_4bit")).notes == []


def test_yarn_is_told(checkpoint):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 524288}
    edit_json(checkpoint / "config.json", lambda config: config["text_config"].update(rope_scaling=yarn))
    assert "by YaRN (2.0 x 524288)" in "\n".join(lines_of(inspect(checkpoint)))
