"""Sensitivity of layers, and bits worked out to a budget."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox.checkpoint import Checkpoint, open_checkpoint
from mlx_m3_plugin.toolbox.convert.allocation import (
    allocate_bits,
    read_scores,
    scores_by_position,
    write_scores,
)
from mlx_m3_plugin.toolbox.convert.plan import plan_conversion
from mlx_m3_plugin.toolbox.convert.recipe import RecipeError, load_recipe, matrices_of, parse_recipe
from mlx_m3_plugin.toolbox.convert.sensitivity import measure_sensitivity
from mlx_m3_plugin.toolbox.forward_pass import Texts, cut
from mlx_m3_plugin.toolbox.precision import Quantization
from tests.checkpoints import real_size
from tests.checkpoints.conversions import Written

BASE = Quantization(3)
ROUTER_AND_INDEXER = ("block_sparse_moe.gate", "index_q_proj", "index_k_proj")


def texts() -> Texts:
    return cut([(7 * i * i + 3 * i) % 700 for i in range(300)], None, 100)


def quiet(layer: int, count: int) -> None:
    pass


def measured(source: Path, cache: Path, **options: int) -> dict[int, float]:
    settings = {"memory": 1 << 24, "step": 64} | options
    return measure_sensitivity(open_checkpoint(source), texts(), BASE, cache, progress=quiet, **settings)


def scores_in_memory(directory: Path) -> dict[int, float]:
    """With the whole model in memory and its weights quantized and back, one layer at a time."""
    model, _ = load_model(directory)
    scores, states = (
        {},
        [model.language_model.model.embed_tokens(mx.array([list(w)])) for w in texts().windows],
    )
    for number, layer in enumerate(model.layers):
        out = mx.concatenate([layer(h, "causal") for h in states], axis=1)
        kept = {}
        for path, module in layer.named_modules():
            if "weight" in module and module.weight.ndim > 1 and not path.endswith(ROUTER_AND_INDEXER):
                kept[path] = (module, module.weight)
                words = BASE.as_quantization()
                module.weight = mx.dequantize(*mx.quantize(module.weight, **words), **words)
        tried = mx.concatenate([layer(h, "causal") for h in states], axis=1)
        for module, weight in kept.values():
            module.weight = weight
        scores[number] = (mx.square(out - tried).mean() / mx.square(out).mean()).item()
        states = [layer(h, "causal") for h in states]
    return scores


def test_it_equals_the_whole_model_in_memory(tiny: Written, tmp_path: Path) -> None:
    expected = scores_in_memory(tiny("published_float"))
    for step in (100, 33):
        found = measured(tiny("published_float"), tmp_path / str(step), step=step)
        assert found == pytest.approx(expected, rel=1e-4)


def test_what_has_few_bits_already_loses_one_more(tiny: Written, tmp_path: Path) -> None:
    found = measured(tiny("mlx_config_i"), tmp_path)
    assert all(0 < score < 1 for score in found.values())


def test_an_interrupted_measurement_goes_on(tiny: Written, tmp_path: Path) -> None:
    whole = measured(tiny("published_float"), tmp_path / "whole")
    seen: list[int] = []

    def stop(layer: int, count: int) -> None:
        seen.append(layer)
        if layer == 0:
            raise KeyboardInterrupt

    source, cache = open_checkpoint(tiny("published_float")), tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(source, texts(), BASE, cache, memory=1 << 24, step=64, progress=stop)
    seen.clear()
    again = measure_sensitivity(
        source, texts(), BASE, cache, memory=1 << 24, step=64, progress=lambda n, c: seen.append(n)
    )
    assert again == whole
    assert seen == [-1, 1, 2]


def test_no_two_processes_measure_in_one_directory(tiny: Written, tmp_path: Path) -> None:
    alone = measured(tiny("published_float"), tmp_path / "alone")
    source, cache = open_checkpoint(tiny("published_float")), tmp_path / "shared"
    refused = []

    def begin_a_second(layer: int, count: int) -> None:
        if layer == 0:
            with pytest.raises(BlockingIOError) as error:
                measured(tiny("published_float"), cache)
            refused.append(str(error.value))

    first = measure_sensitivity(
        source, texts(), BASE, cache, memory=1 << 24, step=64, progress=begin_a_second
    )
    assert first == alone
    assert len(refused) == 1
    assert f"another `mlx-m3 convert` is measuring {source.directory} in {cache}" in refused[0]
    assert measured(tiny("published_float"), cache) == alone


def test_maps_are_saved_and_given_back(
    tiny: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = str(tiny("published_float"))
    (tmp_path / "text").write_text("Measured by a short text, which is of no matter here. " * 20)
    options = ["--recipe", "oq4", "--text", str(tmp_path / "text")]
    assert main(["convert", source, str(tmp_path / "made"), *options]) == 0
    saved = tmp_path / "made" / "mlx-m3-sensitivity.json"
    assert set(read_scores(saved)) == {0, 1, 2}
    capsys.readouterr()
    arguments = ["convert", source, "--recipe", "oq4", "--sensitivity", str(saved), "--dry-run"]
    assert main(arguments) == 0
    assert f"sensitivity of layers: from {saved}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"scores": [1]}', '{"scores": {"a": 1}}', '{"scores": {"0": []}}']
)
def test_what_is_not_a_map_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "map").write_text(content)
    with pytest.raises(ValueError, match="map is not a sensitivity map"):
        read_scores(tmp_path / "map")


def test_maps_survive_writing(tmp_path: Path) -> None:
    write_scores(tmp_path / "map.json", {1: 0.25, 0: 1e-9})
    assert read_scores(tmp_path / "map.json") == {0: 1e-9, 1: 0.25}


# --- budgets, at real size ---


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("real") / "published"
    real_size.write_published(directory)
    return open_checkpoint(directory)


LEVELS = ["oq2", "oq2.5", "oq2.7", "oq3", "oq3.5", "oq4", "oq5", "oq6"]


def spent(
    real: Checkpoint, level: str, scores: Callable[[int], float] | None = None
) -> dict[str, Quantization]:
    recipe = load_recipe(level, real.text_config)
    given = {n: scores(n) for n in range(60)} if scores else scores_by_position(60)
    return allocate_bits(real, recipe, given)


@pytest.mark.some(4)
@pytest.mark.parametrize("level", LEVELS)
def test_a_level_keeps_to_its_budget(real: Checkpoint, level: str) -> None:
    recipe = load_recipe(level, real.text_config)
    specs = spent(real, level)
    plan = plan_conversion(real, recipe, specs)
    assert plan.bits_per_weight <= recipe.bit_targets["cap_bpw"]
    base = recipe.bit_targets["base_bits"]
    for matrix in matrices_of(real.text_config):
        spec = specs[matrix.module]
        if matrix.part == "router":
            assert spec.dtype == "float16"
        elif matrix.part in ("indexer", "shared_expert", "lm_head", "embeddings"):
            assert spec.bits == 8
        elif matrix.part == "experts":
            assert base <= (spec.bits or 0) <= base + 1
        else:
            assert (spec.bits or 0) >= max(4, base)


def test_oq4_is_as_large_as_the_published_one(real: Checkpoint) -> None:
    plan = plan_conversion(real, load_recipe("oq4", real.text_config), spent(real, "oq4"))
    assert plan.nbytes / 2**30 == pytest.approx(228, rel=0.01)
    assert plan.bits_per_weight == pytest.approx(4.59, rel=0.01)


def test_config_i_is_as_large_as_the_published_one(real: Checkpoint) -> None:
    plan = plan_conversion(real, load_recipe("config-i", real.text_config))
    assert plan.nbytes / 1e9 == pytest.approx(167, rel=0.01)


def test_the_most_sensitive_layers_get_the_most(real: Checkpoint) -> None:
    specs = spent(real, "oq4", lambda layer: 1.0 if layer in (20, 21) else 0.3 if layer == 40 else 0.01)
    bits = {n: specs[f"model.layers.{n}.self_attn.q_proj"].bits for n in (20, 21, 40, 50)}
    assert bits[20] == bits[21] == 8
    assert (bits[40] or 0) >= 6
    assert (bits[50] or 0) < 8


def test_budgets_that_cannot_be_worked_out(real: Checkpoint) -> None:
    text = "[default]\nbits = 4\n[plan]\n"
    with pytest.raises(RecipeError, match=r'mine: \[plan\] .*"oq"'):
        allocate_bits(
            real, parse_recipe("mine", text + 'method = "x"', real.text_config), scores_by_position(60)
        )
    with pytest.raises(RecipeError, match="lacks base_bits, target_bpw, cap_bpw"):
        allocate_bits(
            real, parse_recipe("mine", text + 'method = "oq"', real.text_config), scores_by_position(60)
        )
    with pytest.raises(RecipeError, match=r"oq4: .* 1 of 60 layers: 59"):
        allocate_bits(real, load_recipe("oq4", real.text_config), scores_by_position(59))
    assert json.loads(json.dumps(scores_by_position(3))) == {"0": 1.0, "1": 0.5, "2": 1.0}
