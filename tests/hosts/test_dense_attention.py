"""Dense attention: by choice or for want of indexer weights, and never in silence."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import _get_classes, load_model

from tests.hosts.native_mlx_lm import FakeGroup, native_module, needs_native

CHECKPOINT = Path(__file__).parents[1] / "golden" / "as_published"
BUDGET = 4 * 8
TOKENS = mx.random.randint(0, 64, (1, 120), key=mx.random.key(0))
WARNING = "every layer attends to all tokens"


@pytest.fixture(scope="module")
def sparse() -> mx.array:
    return load_model(CHECKPOINT)[0](TOKENS)


@pytest.fixture
def without_indexer(tmp_path: Path) -> Path:
    weights = mx.load(str(CHECKPOINT / "model.safetensors"))
    kept = {name: w for name, w in weights.items() if ".index_" not in name}
    assert len(kept) < len(weights)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), kept)
    (tmp_path / "config.json").write_text((CHECKPOINT / "config.json").read_text())
    return tmp_path


def plainly_dense(tmp_path: Path, without_indexer: Path) -> Any:
    """The same weights under a config that has no sparse layer."""
    config = json.loads((without_indexer / "config.json").read_text())
    config["text_config"]["layer_types"] = ["full_attention"] * 4
    (without_indexer / "config.json").write_text(json.dumps(config))
    return load_model(without_indexer)[0]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if WARNING in r.getMessage()]


def test_sparse_is_the_default_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    load_model(CHECKPOINT)
    assert warnings_of(caplog) == []


def test_a_stage_of_dense_layers_alone_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Of a pipeline: the layers that choose blocks are on other machines."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    Model, ModelArgs = _get_classes(config)
    model = Model(ModelArgs.from_dict(config))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mlx_m3_plugin.model.pipeline._agree", lambda split, group: None)
        model.pipeline(FakeGroup(1, 2), [3, 1])
    assert [layer.self_attn.is_sparse_attn for layer in model.layers] == [False]
    weights = model.sanitize(mx.load(str(CHECKPOINT / "model.safetensors")))
    model.load_weights(list(weights.items()))
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("by", ["config", "dense", " Dense\n"], ids=repr)
def test_by_choice(
    by: str, sparse: mx.array, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    override = None
    if by == "config":
        override = {"attention": "dense"}
    else:
        monkeypatch.setenv("MLX_M3_PLUGIN_ATTENTION", by)
    model, _ = load_model(CHECKPOINT, model_config=override)
    logits = model(TOKENS)
    (warning,) = warnings_of(caplog)
    assert "dense attention is set" in warning
    assert f"past {BUDGET} tokens" in warning
    assert mx.abs(logits - sparse)[:, :BUDGET].max().item() <= 1e-4
    assert mx.abs(logits - sparse)[:, BUDGET:].max().item() > 0.1


def test_a_cache_of_the_dense_model_goes_on_in_the_sparse_one() -> None:
    """Its index keys were stored all the same."""
    dense, _ = load_model(CHECKPOINT, model_config={"attention": "dense"})
    model, _ = load_model(CHECKPOINT)
    cache = dense.make_cache()
    dense(TOKENS[:, :BUDGET], cache=cache)
    logits = model(TOKENS[:, BUDGET:], cache=cache)
    assert mx.abs(logits - model(TOKENS)[:, BUDGET:]).max().item() <= 1e-4


def test_without_indexer_weights(
    without_indexer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = load_model(without_indexer)
    logits = model(TOKENS)
    (warning,) = warnings_of(caplog)
    assert "no indexer weights" in warning
    assert mx.abs(logits - plainly_dense(tmp_path, without_indexer)(TOKENS)).max().item() <= 1e-5


def test_some_indexers_missing_is_an_error(tmp_path: Path) -> None:
    weights = mx.load(str(CHECKPOINT / "model.safetensors"))
    kept = {name: w for name, w in weights.items() if ".layers.2.self_attn.index_" not in name}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), kept)
    (tmp_path / "config.json").write_text((CHECKPOINT / "config.json").read_text())
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.index_q_proj"):
        load_model(tmp_path)


def test_anything_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_M3_PLUGIN_ATTENTION", "sparce")
    message = "MLX_M3_PLUGIN_ATTENTION='sparce' is not understood; use 'sparse' or 'dense'"
    with pytest.raises(ValueError, match=message):
        load_model(CHECKPOINT)
    monkeypatch.delenv("MLX_M3_PLUGIN_ATTENTION")
    with pytest.raises(ValueError, match="config: attention must be 'sparse' or 'dense', not 'sparce'"):
        load_model(CHECKPOINT, model_config={"attention": "sparce"})


@needs_native
def test_upstream_does_not_load_it(without_indexer: Path) -> None:
    """A line of the README's table."""
    upstream: Any = native_module()
    text = json.loads((CHECKPOINT / "config.json").read_text())["text_config"]
    text["rotary_dim"] = text["head_dim"] // 2  # what transformers saves there is wrong for small heads
    with pytest.raises(ValueError, match="index_q_proj"):
        load_model(
            without_indexer,
            model_config={"text_config": text},
            get_model_classes=lambda config: (upstream.Model, upstream.ModelArgs),
        )
