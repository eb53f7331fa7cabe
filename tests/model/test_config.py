"""Every spelling of an M3 config is one ``TextConfig``; what the model does not compute is refused."""

from dataclasses import fields, replace
from importlib import import_module

import pytest

from mlx_m3_plugin.model.config import TextConfig, text_config_of, uncut_lists
from tests.model import m3_configs

SPELLINGS = {
    "published": m3_configs.PUBLISHED,
    "resaved": m3_configs.RESAVED,
    "flat": m3_configs.FLAT,
    "flat_resaved": m3_configs.FLAT_RESAVED,
    "nested_text_only": m3_configs.NESTED_TEXT_ONLY,
}
PUBLISHED_TEXT = m3_configs.PUBLISHED_TEXT
RESAVED_TEXT = m3_configs.RESAVED["text_config"]


def meaning(config: TextConfig) -> dict:
    """Without the two fields that say where a config comes from, not what it means."""
    rope = {} if config.rope_parameters == {"rope_type": "default"} else config.rope_parameters
    return {**vars(config), "model_type": "", "rope_parameters": rope}


def published(**changes):
    return {**PUBLISHED_TEXT, **changes}


def published_sparse(**changes):
    return published(sparse_attention_config={**PUBLISHED_TEXT["sparse_attention_config"], **changes})


def without(params, *keys):
    return {k: v for k, v in params.items() if k not in keys}


# --- one meaning ---


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_mean_the_same(spelling):
    assert meaning(text_config_of(SPELLINGS[spelling])) == meaning(text_config_of(m3_configs.PUBLISHED))


def test_the_real_model():
    config = text_config_of(m3_configs.PUBLISHED)
    assert [config.is_sparse_attention(i) for i in range(60)] == [False] * 3 + [True] * 57
    assert [config.is_moe(i) for i in range(60)] == [False] * 3 + [True] * 57
    assert (config.index_n_heads, config.index_head_dim) == (4, 128)
    assert (config.index_block_size, config.index_topk_blocks) == (128, 16)
    assert (config.index_local_blocks, config.index_init_blocks) == (1, 0)
    assert (config.rope_theta, config.rotary_dim, config.rope_parameters) == (5e6, 64, {})


@pytest.mark.parametrize("model_type", ["minimax_m3_vl", "minimax_m3"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_both_model_types_read_all_spellings(model_type, spelling):
    module = import_module(f"mlx_lm.models.{model_type}")
    args = module.ModelArgs.from_dict({**SPELLINGS[spelling], "model_type": model_type})
    assert args.model_type == model_type
    assert meaning(args.text_config) == meaning(text_config_of(m3_configs.PUBLISHED))


def test_model_args_take_a_text_config_as_a_dict():
    module = import_module("mlx_lm.models.minimax_m3_vl")
    args = module.ModelArgs(text_config=PUBLISHED_TEXT)
    assert args.text_config == module.TextArgs.from_dict(PUBLISHED_TEXT)


def test_an_mlx_conversion_keeps_unknown_keys_of_its_own():
    quantization = {"group_size": 64, "bits": 4, "mode": "affine"}
    converted = {**m3_configs.PUBLISHED, "quantization": quantization, "quantization_config": quantization}
    assert text_config_of(converted) == text_config_of(m3_configs.PUBLISHED)


def test_reading_leaves_the_config_as_it_is():
    before = repr(SPELLINGS)
    for config in SPELLINGS.values():
        text_config_of(config)
    assert repr(SPELLINGS) == before


# --- what is left out ---


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_gemma_norm", True), ("use_qk_norm", True), ("index_init_blocks", 0), ("index_local_blocks", 1)],
)
def test_defaults_for_what_transformers_leaves_out(key, value):
    assert getattr(TextConfig.from_dict(without(RESAVED_TEXT, key)), key) == value


def test_a_null_counts_as_left_out():
    params = published(rope_scaling=None, rope_parameters=None, layer_types=None, mlp_layer_types=None)
    assert TextConfig.from_dict(params) == TextConfig.from_dict(PUBLISHED_TEXT)


@pytest.mark.parametrize("key", ["layer_types", "mlp_layer_types"])
def test_without_layer_types_as_in_transformers(key):
    config = TextConfig.from_dict(without(RESAVED_TEXT, key))
    expected = {"layer_types": "full_attention", "mlp_layer_types": "sparse"}[key]
    assert getattr(config, key) == [expected] * 60


@pytest.mark.parametrize(("value", "sparse_layers"), [(False, 0), (0, 0), (True, 57), (1, 57), (None, 57)])
def test_sparse_attention_can_be_turned_off(value, sparse_layers):
    config = TextConfig.from_dict(published_sparse(use_sparse_attention=value))
    assert config.layer_types.count("minimax_m3_sparse") == sparse_layers


def test_every_key_may_be_left_out_and_then_is_transformers(transformers_defaults):
    """Of all that changes the computation: transformers has a default for each."""
    assert transformers_defaults.keys() >= {"routed_scaling_factor", "swiglu_alpha", "swiglu_limit"}
    none = text_config_of({"model_type": "minimax_m3_vl", "text_config": {}})
    assert {key: getattr(none, key) for key in transformers_defaults} == transformers_defaults
    # A key that is given is not the default.
    for key, value in transformers_defaults.items():
        other = 2 * value if isinstance(value, float) else value
        assert getattr(text_config_of({"text_config": {key: other}}), key) == other


@pytest.fixture(scope="module")
def transformers_defaults():
    """What ``MiniMaxM3VLTextConfig`` computes with when its config says nothing."""
    try:
        from transformers import MiniMaxM3VLTextConfig
    except ImportError:
        pytest.skip("this transformers has no M3")
    theirs = MiniMaxM3VLTextConfig()
    # Read by no layer of transformers', and here by rope types that stretch a context.
    names = (f.name for f in fields(TextConfig) if f.name not in ("model_type", "max_position_embeddings"))
    return {name: getattr(theirs, name) for name in names if hasattr(theirs, name) and name[:4] != "rope"}


@pytest.mark.parametrize("spelling", ["published", "resaved"])
def test_no_block_size_means_dense(spelling):
    text = SPELLINGS[spelling]["text_config"]
    none = {**text, "index_block_size": None}
    if spelling == "published":
        none = published_sparse(sparse_block_size=None)
    config = text_config_of({"text_config": none})
    assert config == replace(text_config_of({"text_config": text}), layer_types=["full_attention"] * 60)
    # A block size in the one place counts, whatever the other says.
    both = text_config_of({"text_config": published(index_block_size=None)})
    assert meaning(both) == meaning(text_config_of(m3_configs.PUBLISHED))


def test_without_a_number_of_layers_there_are_as_many_as_listed():
    text = without(RESAVED_TEXT, "num_hidden_layers")
    config = TextConfig(**text | {"layer_types": ["minimax_m3_sparse"]})
    assert (config.num_hidden_layers, config.layer_types) == (1, ["minimax_m3_sparse"])
    assert TextConfig(**text).num_hidden_layers == 60
    assert uncut_lists({"text_config": text}) == []


def test_mlx_vlms_name_of_dense_layers():
    named = ["minimax_m3_dense"] * 3 + ["minimax_m3_sparse"] * 57
    assert TextConfig(**{**RESAVED_TEXT, "layer_types": named}) == TextConfig(**RESAVED_TEXT)


def test_what_the_user_has_set_wins_over_the_config():
    config = {**m3_configs.PUBLISHED, "attention": "sparse", "pipeline_split": [1, 59]}
    assert text_config_of(config).attention == "sparse"
    assert text_config_of(config).pipeline_split is None
    asked = text_config_of(config, {"attention": "dense", "pipeline_split": (40, 20)})
    assert (asked.attention, asked.pipeline_split) == ("dense", (40, 20))


def test_a_flat_sparse_attention_freq():
    params = {**without(RESAVED_TEXT, "layer_types"), "sparse_attention_freq": [0] * 30 + [1] * 30}
    assert TextConfig.from_dict(params).layer_types == ["full_attention"] * 30 + ["minimax_m3_sparse"] * 30


@pytest.mark.parametrize(
    ("top", "nested", "tied"),
    [(True, None, True), (False, None, False), (None, True, True), (None, None, False), (True, False, False)],
)
def test_tied_embeddings_are_told_on_top_or_nested(top, nested, tied):
    text = without(PUBLISHED_TEXT, "tie_word_embeddings")
    text |= {} if nested is None else {"tie_word_embeddings": nested}
    config = {"model_type": "minimax_m3_vl", "text_config": text}
    config |= {} if top is None else {"tie_word_embeddings": top}
    assert text_config_of(config).tie_word_embeddings is tied


# --- other tools' spellings ---


@pytest.mark.parametrize("key", ["moe_layer_freq", "mlp_layer_types", "layer_types", "sparse_attention_freq"])
def test_of_a_longer_list_the_first_entries_count(key):
    """The first layers of a model, whose config was not cut."""
    text = RESAVED_TEXT if "types" in key else PUBLISHED_TEXT
    config = text_config_of({"model_type": "minimax_m3_vl", "text_config": {**text, "num_hidden_layers": 5}})
    assert config.layer_types == ["full_attention"] * 3 + ["minimax_m3_sparse"] * 2
    assert config.mlp_layer_types == ["dense"] * 3 + ["sparse"] * 2
    assert key in uncut_lists({"text_config": {**text, "num_hidden_layers": 5}})
    assert uncut_lists({"text_config": text}) == []


def test_entries_of_layers_that_are_not_there_are_not_looked_at():
    freq = [0] * 3 + [1] * 2 + ["?"] * 55
    params = published_sparse(sparse_attention_freq=freq, sparse_disable_index_value=[1] * 5 + [0] * 55)
    assert (
        TextConfig.from_dict({**params, "num_hidden_layers": 5}).layer_types[3:] == ["minimax_m3_sparse"] * 2
    )


@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [((0, 0), (0, 0)), ((1, 128), (1, 1)), ((128, 129), (1, 2)), ((257, 1), (3, 1))],
    ids=str,
)
def test_initial_and_local_tokens_are_whole_blocks(tokens, blocks):
    sparse = without(
        PUBLISHED_TEXT["sparse_attention_config"], "sparse_init_block", "sparse_local_block"
    ) | dict(zip(("sparse_init_tokens", "sparse_local_tokens"), tokens, strict=True))
    text = published(sparse_attention_config=sparse)
    config = text_config_of({"model_type": "minimax_m3_vl", "text_config": text})
    assert (config.index_init_blocks, config.index_local_blocks) == blocks


def test_blocks_go_before_tokens():
    given = published_sparse(sparse_init_block=2, sparse_init_tokens=128, sparse_local_tokens=640)
    config = TextConfig.from_dict(given)
    assert (config.index_init_blocks, config.index_local_blocks) == (2, 1)


@pytest.mark.parametrize("added", [{}, {"pack_shared_expert": False}])
def test_a_loader_may_add_a_text_config_to_a_flat_one(added):
    flat = {**m3_configs.FLAT, "text_config": added}
    assert meaning(text_config_of(flat)) == meaning(text_config_of(m3_configs.PUBLISHED))


# --- rotary embedding ---

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 524288}


@pytest.mark.parametrize(
    ("rope", "theta", "dims", "parameters"),
    [
        # Inside rope_parameters, then beside it, then the default.
        ({"rope_parameters": {"rope_theta": 2e4}, "rope_theta": 1e4}, 2e4, 64, {}),
        ({"rope_theta": 1e4}, 1e4, 64, {}),
        ({}, 5e6, 64, {}),
        # The same for the rotated share; rotary_dim counts only where no share is given.
        ({"rope_parameters": {"partial_rotary_factor": 0.25}, "partial_rotary_factor": 0.5}, 5e6, 32, {}),
        ({"partial_rotary_factor": 0.25, "rotary_dim": 64}, 5e6, 32, {}),
        ({"rotary_dim": 32}, 5e6, 32, {}),
        # rope_scaling stands in for all of rope_parameters.
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 2e4}, "rope_theta": 1e4},
            1e4,
            64,
            YARN,
        ),
        ({"rope_parameters": YARN, "rope_theta": 1e4, "partial_rotary_factor": 0.5}, 1e4, 64, YARN),
        ({"rope_parameters": {**YARN, "rope_theta": 2e4, "partial_rotary_factor": 0.25}}, 2e4, 32, YARN),
    ],
    ids=str,
)
def test_precedence_of_rope_values(rope, theta, dims, parameters):
    params = without(PUBLISHED_TEXT, "rope_theta", "rotary_dim", "partial_rotary_factor")
    config = TextConfig.from_dict({**params, **rope})
    assert (config.rope_theta, config.rotary_dim, config.rope_parameters) == (theta, dims, parameters)


# --- refusals ---

OTHER_COMPUTATION = [
    (published(attention_output_gate=True), "attention_output_gate"),
    (published(scoring_func="softmax"), "scoring_func"),
    (published(use_routing_bias=False), "use_routing_bias"),
    (published(qk_norm_type="per_layer"), "qk_norm_type"),
    (published(hidden_act="gelu"), "hidden_act"),
    (published(swiglu_beta=0.5), "swiglu_beta"),
    (published(n_shared_experts=2), "n_shared_experts"),
    (published_sparse(sparse_score_type="lse"), "sparse_score_type"),
    (published_sparse(sparse_disable_index_value=[0] * 60), "sparse_disable_index_value"),
]
LAYER_LISTS = [
    (published_sparse(sparse_attention_freq=[0] * 3 + [1] * 56), "sparse_attention_freq"),
    (published_sparse(sparse_attention_freq=1), "sparse_attention_freq"),
    (published_sparse(sparse_attention_freq=[0] * 3 + [2] * 57), "sparse_attention_freq"),
    (
        published(sparse_attention_config={"sparse_block_size": 128}),
        "sparse_attention_freq",
    ),
    (published(moe_layer_freq=[1] * 59), "moe_layer_freq"),
    (published(moe_layer_freq=["1"] * 60), "moe_layer_freq"),
    (published(moe_layer_freq=2), "moe_layer_freq"),
    ({**RESAVED_TEXT, "layer_types": ["full_attention"] * 59}, "layer_types"),
    ({**RESAVED_TEXT, "layer_types": ["sliding_attention"] * 60}, "layer_types"),
    ({**RESAVED_TEXT, "mlp_layer_types": ["moe"] * 60}, "mlp_layer_types"),
    (published(num_hidden_layers=61), "sparse_attention_freq"),
]
WRONG_TYPES = [
    (published(num_hidden_layers="60"), "num_hidden_layers"),
    (published(n_shared_experts=True), "n_shared_experts"),
    (published(num_hidden_layers=0, moe_layer_freq=[], sparse_attention_config=None), "num_hidden_layers"),
    (published(hidden_size=6144.0), "hidden_size"),
    (published(vocab_size=True), "vocab_size"),
    (published(vocab_size=0), "vocab_size"),
    (published(head_dim="128"), "head_dim"),
    (published(rms_norm_eps="1e-6"), "rms_norm_eps"),
    (published(routed_scaling_factor=[2.0]), "routed_scaling_factor"),
    (published(rope_theta="5e6"), "rope_theta"),
    (published(use_gemma_norm=1), "use_gemma_norm"),
    (published(partial_rotary_factor="half"), "partial_rotary_factor"),
    (without(published(rotary_dim="64"), "partial_rotary_factor"), "rotary_dim"),
    (published(rope_scaling="yarn"), "rope_scaling"),
    (published(rope_parameters=[5e6]), "rope_parameters"),
    (published(sparse_attention_config=True), "sparse_attention_config"),
    (published_sparse(sparse_block_size="128"), "block_size"),
    (published_sparse(use_sparse_attention="false"), "use_sparse_attention"),
    (published_sparse(use_sparse_attention=2), "use_sparse_attention"),
    (published_sparse(sparse_block_size=0), "block_size"),
    (published_sparse(sparse_topk_blocks=None), "topk_blocks"),
    (published_sparse(sparse_local_block=-1), "local_block"),
    (published_sparse(sparse_init_block=None), "init_block"),
    (
        published(
            sparse_attention_config={
                **without(PUBLISHED_TEXT["sparse_attention_config"], "sparse_local_block"),
                "sparse_local_tokens": 1.5,
            }
        ),
        "sparse_local_tokens",
    ),
]
DO_NOT_FIT = [
    (published(num_attention_heads=62), "num_attention_heads"),
    (published(num_experts_per_tok=129), "num_experts_per_tok"),
    (published(partial_rotary_factor=1.5), "partial_rotary_factor|rotary_dim"),
    (without(published(rotary_dim=63), "partial_rotary_factor"), "partial_rotary_factor|rotary_dim"),
    (published_sparse(sparse_num_index_heads=1), "index_n_heads|sparse_num_index_heads"),
    (published_sparse(sparse_index_dim=32), "index_head_dim|sparse_index_dim"),
    (published_sparse(sparse_init_block=16), "topk_blocks"),
]


@pytest.mark.parametrize(
    ("params", "key"),
    OTHER_COMPUTATION + LAYER_LISTS + WRONG_TYPES + DO_NOT_FIT,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_names_the_key(params, key):
    with pytest.raises(ValueError, match=key) as error:
        TextConfig.from_dict(params)
    message = str(error.value)
    assert message.startswith("config: ")
    assert len(message) < 250


def test_a_text_config_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match="text_config must be an object"):
        text_config_of({"model_type": "minimax_m3_vl", "text_config": []})


def test_index_values_may_be_absent_on_dense_layers_only():
    """``sparse_disable_index_value`` is 0 on layers that have no indexer at all."""
    config = TextConfig.from_dict(published_sparse(sparse_disable_index_value=[0, 0, 0] + [1] * 57))
    assert config.layer_types.count("minimax_m3_sparse") == 57


def test_one_index_head_per_kv_head_is_asked_of_sparse_layers_only():
    params = {**RESAVED_TEXT, "layer_types": ["full_attention"] * 60, "num_key_value_heads": 8}
    assert TextConfig.from_dict(params).num_key_value_heads == 8
