"""Weights that don't fit are refused with an error a person can read."""

import mlx.core as mx
import pytest
from mlx_lm.models.minimax_m3_vl import Model, ModelArgs

from mlx_m3_plugin.weights.check import check_weights, group_names
from tests.checkpoints.layouts.arrange import PREFIX, published
from tests.checkpoints.small_model import CONFIG, MOE, parameters, with_prefix

MOE_LAYERS = "language_model.model.layers.{}.block_sparse_moe"


def refusal(weights, params) -> list[str]:
    with pytest.raises(ValueError, match="do not fit this MiniMax-M3") as error:
        check_weights(weights, params)
    return str(error.value).splitlines()


def scalars(*names):
    return {name: mx.zeros(1) for name in names}


# --- names ---


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        ([], []),
        (["lm_head.weight"], ["lm_head.weight"]),
        (["layers.7.norm.weight"], ["layers.7.norm.weight"]),
        ([f"layers.{i}.norm.weight" for i in range(3, 60)], ["layers.{3-59}.norm.weight (57)"]),
        ([f"layers.{i}.w" for i in (0, 1, 2, 5, 8, 9)], ["layers.{0-2,5,8-9}.w (6)"]),
        (["layers.10.w", "layers.2.w"], ["layers.{2,10}.w (2)"]),
        (
            [
                f"layers.{i}.experts.{e}.{w}.weight"
                for i in range(3, 60)
                for e in range(128)
                for w in ("w1", "w2")
            ],
            [
                "layers.{3-59}.experts.{0-127}.w1.weight (7296)",
                "layers.{3-59}.experts.{0-127}.w2.weight (7296)",
            ],
        ),
        ([f"layers.4.experts.{e}.w1" for e in range(128)], ["layers.4.experts.{0-127}.w1 (128)"]),
        (["b.weight", "a.weight"], ["a.weight", "b.weight"]),
        # A number only counts between dots.
        (["linear_1.weight", "linear_2.weight"], ["linear_1.weight", "linear_2.weight"]),
        (["a.{odd}.0.name"], ["a.{odd}.0.name"]),
    ],
    ids=lambda value: "" if len(value) > 2 else str(value),
)
def test_names_are_told_by_module(names, lines):
    assert group_names(names) == lines


# --- the check itself ---


def test_weights_that_fit_pass():
    check_weights(scalars("a", "b"), scalars("a", "b"))


def test_missing_left_over_and_wrong_shape_are_told_apart():
    weights = scalars("left.0.over", "left.1.over") | {"shape": mx.zeros((2, 3))}
    params = scalars("missing.0.one", "missing.1.one") | {"shape": mx.zeros((3, 2))}
    assert refusal(weights, params)[1:] == [
        "missing (2):",
        "  missing.{0-1}.one (2)",
        "left over (2):",
        "  left.{0-1}.over (2)",
        "of the wrong shape (1):",
        "  shape: (2, 3) in the checkpoint, (3, 2) in the model",
    ]


def test_only_what_is_wrong_is_told():
    assert refusal(scalars("a"), scalars("a", "b"))[1:] == ["missing (1):", "  b"]
    assert refusal(scalars("a", "b"), scalars("a"))[1:] == ["left over (1):", "  b"]


def test_a_dtype_is_not_a_shape():
    check_weights({"a": mx.zeros(3, dtype=mx.bfloat16)}, {"a": mx.zeros(3)})


def test_thousands_of_names_make_a_short_error():
    """Experts that were not stacked: 21,888 left over, and their 171 stacks missing."""
    left_over = [
        f"{MOE_LAYERS.format(layer)}.experts.{expert}.{projection}.weight"
        for layer in range(3, 60)
        for expert in range(128)
        for projection in ("w1", "w2", "w3")
    ]
    missing = [
        f"{MOE_LAYERS.format(layer)}.switch_mlp.{projection}.weight"
        for layer in range(3, 60)
        for projection in ("gate_proj", "up_proj", "down_proj")
    ]
    lines = refusal(scalars(*left_over), scalars(*missing))
    assert len(lines) == 1 + 4 + 4
    assert lines[1:3] == [
        "missing (171):",
        f"  {MOE_LAYERS.format('{3-59}')}.switch_mlp.down_proj.weight (57)",
    ]
    assert lines[5] == "left over (21888):"
    assert lines[6] == f"  {MOE_LAYERS.format('{3-59}')}.experts.{{0-127}}.w1.weight (7296)"


def test_a_checkpoint_of_another_model_makes_a_short_error():
    """Many different names, and many wrong shapes: the rest is counted."""
    missing = scalars(*(f"missing_{i}.weight" for i in range(500)))
    left_over = scalars(*(f"left_over_{i}.weight" for i in range(500)))
    weights = left_over | {f"shape_{i}": mx.zeros(2) for i in range(500)}
    params = missing | {f"shape_{i}": mx.zeros(3) for i in range(500)}
    lines = refusal(weights, params)
    assert len(lines) < 60
    assert lines.count("  ... and 485 more") == 3


# --- through the model, as mlx-lm loads it ---


@pytest.fixture
def model() -> Model:
    return Model(ModelArgs(CONFIG))


def test_weights_that_fit_are_loaded(model):
    weights = with_prefix(parameters())
    model.load_weights(list(weights.items()))
    loaded = model.language_model.model.layers[1].block_sparse_moe.switch_mlp.up_proj.weight
    assert mx.array_equal(loaded, weights[f"{PREFIX}{MOE}.switch_mlp.up_proj.weight"])


def test_load_weights_takes_a_file(model, tmp_path):
    mx.save_safetensors(str(tmp_path / "w.safetensors"), with_prefix(parameters()))
    assert model.load_weights(str(tmp_path / "w.safetensors")) is model
    assert mx.array_equal(model.language_model.model.norm.weight, parameters()["model.norm.weight"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda w: w.pop(f"{PREFIX}{MOE}.gate.weight"),
            "missing (1):\n  language_model.model.layers.1.block_",
        ),
        (lambda w: w.update(scalars("surprise.weight")), "left over (1):\n  surprise.weight"),
        (
            lambda w: w.update({f"{PREFIX}model.norm.weight": mx.zeros(3)}),
            "language_model.model.norm.weight: (3,) in the checkpoint, (64,) in the model",
        ),
    ],
    ids=["missing", "left over", "wrong shape"],
)
def test_weights_that_do_not_fit_are_refused(model, change, told):
    weights = with_prefix(parameters())
    change(weights)
    with pytest.raises(ValueError, match="do not fit this MiniMax-M3") as error:
        model.load_weights(list(weights.items()))
    assert told in str(error.value)


def test_an_expert_that_is_missing_is_named(model):
    weights = with_prefix(published(parameters()))
    del weights[f"{PREFIX}{MOE}.experts.2.w1.weight"]
    with pytest.raises(ValueError, match="do not fit this MiniMax-M3") as error:
        model.load_weights(list(model.sanitize(weights).items()))
    assert str(error.value).splitlines()[1:] == [
        "missing (1):",
        f"  {PREFIX}{MOE}.switch_mlp.gate_proj.weight",
        "left over (3):",
        f"  {PREFIX}{MOE}.experts.{{0-1,3}}.w1.weight (3)",
    ]


def test_a_checkpoint_without_indexer_is_refused(model):
    """Text-only conversions of the time before the indexer was read: they can't be run as M3."""
    weights = {name: array for name, array in with_prefix(parameters()).items() if "index_" not in name}
    with pytest.raises(ValueError, match=r"missing \(4\):\n.*index_k_norm.weight"):
        model.load_weights(list(weights.items()))


def test_not_strict_loads_what_is_there(model):
    norm = parameters()["model.norm.weight"]
    model.load_weights([(f"{PREFIX}model.norm.weight", norm), ("surprise", mx.zeros(1))], strict=False)
    assert mx.array_equal(model.language_model.model.norm.weight, norm)
