# Long because: one question, asked of every member of the native class.
"""What mlx-lm's native M3 class offers, ours offers: nothing a user had may be lost.

From 0.32.2 on mlx-lm has a native class, and every comparison is with the installed file.
Before, the same things are asked of ours alone.
"""

import inspect

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import CacheList, KVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.utils import quantize_model

from tests.hosts import native_mlx_lm
from tests.hosts.native_mlx_lm import (
    NATIVE,
    FakeGroup,
    config,
    native_twin,
    our_model,
    our_module,
    randomized,
    tokens,
)

needs_native = pytest.mark.skipif(
    native_mlx_lm.MLX_LM_VERSION < (0, 32, 2), reason="mlx-lm has its own M3 class from 0.32.2 on"
)
MODEL_TYPES = ("minimax_m3_vl", "minimax_m3")
both_model_types = pytest.mark.parametrize("model_type", MODEL_TYPES)
LENGTH = 120

# What mlx-lm's utilities reach for on a model module and on a model.
MODULE_SURFACE = {"Model", "ModelArgs"}
MODEL_SURFACE = {
    *("args", "model_type", "language_model", "model", "layers"),
    *("sanitize", "make_cache", "shard", "pipeline", "quant_predicate", "cast_predicate"),
}


def close(a, b, tolerance=1e-4):
    return a.shape == b.shape and mx.abs(a - b).max().item() < tolerance


# --- what is there ---


def test_the_native_module_is_seen_where_there_is_one():
    assert (NATIVE is not None) == (native_mlx_lm.MLX_LM_VERSION >= (0, 32, 2))


@both_model_types
def test_upstream_names_give_our_classes(model_type):
    module = our_module(model_type)
    assert module.__name__ == module.Model.__module__ == f"mlx_lm.models.{model_type}"
    assert "mlx_m3_plugin" in inspect.getfile(module.Model)


@both_model_types
def test_surface(model_type):
    assert vars(our_module(model_type)).keys() >= MODULE_SURFACE
    model = our_model(model_type)
    assert {name for name in MODEL_SURFACE if not hasattr(model, name)} == set()


def test_text_args():
    assert our_module().TextArgs.from_dict(native_mlx_lm.TEXT).hidden_size == 64


@needs_native
@both_model_types
def test_every_public_name_of_the_native_model(model_type):
    def public(cls):
        return {n for c in cls.__mro__ if c.__module__ == cls.__module__ for n in vars(c) if n[0] != "_"}

    model = our_model(model_type)
    assert public(NATIVE.Model) <= MODEL_SURFACE
    assert {name for name in public(NATIVE.Model) if not hasattr(model, name)} == set()
    assert {name for name in public(NATIVE.TextModel) if not hasattr(model.model, name)} == set()


def own_classes(module):
    return {
        name: cls for name, cls in vars(module).items() if getattr(cls, "__module__", "") == NATIVE.__name__
    }


@needs_native
def test_every_class_of_the_native_module_is_there_and_made_alike():
    """Other packages import them, and build layers from them."""
    native = own_classes(NATIVE)
    assert native.keys() >= {"TextArgs", "DecoderLayer", "DenseMLP", "GemmaRMSNorm", "SparseMoeBlock"}
    assert native.keys() <= set(our_module().__all__)
    for name, cls in native.items():
        ours, theirs = (list(inspect.signature(c).parameters) for c in (getattr(our_module(), name), cls))
        assert set(theirs) <= set(ours) if "Args" in name else len(ours) >= len(theirs), name


@needs_native
def test_text_args_have_the_native_attributes():
    for changes in ({}, {"layer_types": ["full_attention"] * 4}, {"rotary_dim": 4, "rope_parameters": None}):
        native = NATIVE.TextArgs(**{**native_mlx_lm.TEXT, **changes})
        ours = our_module().TextArgs(**{**native_mlx_lm.TEXT, **changes})
        given = {key: value for key, value in vars(native).items() if value is not None}
        # Ours holds what is left of it, and in one place what a config has in two.
        rest = {"rope_parameters", "partial_rotary_factor"}
        assert {key: getattr(ours, key) for key in given.keys() - rest} == {
            key: value for key, value in given.items() if key not in rest
        }
        assert int(ours.head_dim * ours.partial_rotary_factor) == native.rotary_dim
        assert [ours.is_moe(i) for i in range(4)] == [native.is_moe(i) for i in range(4)]
        assert [ours.is_sparse_attn(i) for i in range(4)] == [native.is_sparse_attn(i) for i in range(4)]


@needs_native
def test_a_layer_made_alone_is_the_native_one():
    """Of a config with lists for one layer, as mlx-lm's own tests make it."""
    lists = {"layer_types": ["minimax_m3_sparse"], "mlp_layer_types": ["sparse"]}
    text = {k: v for k, v in native_mlx_lm.TEXT.items() if k != "num_hidden_layers"} | lists
    native, ours = (module.DecoderLayer(module.TextArgs(**text), 0) for module in (NATIVE, our_module()))
    native.load_weights(tree_flatten(randomized(ours).parameters()))
    x = mx.random.normal((1, LENGTH, text["hidden_size"]), key=mx.random.key(3))
    assert close(ours(x, "causal"), native(x, "causal"))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_without_a_shared_expert_nothing_is_added(model_type):
    with_zeros = our_model(model_type)
    for layer in with_zeros.layers[1:]:
        shared = layer.block_sparse_moe.shared_experts
        shared.down_proj.weight = mx.zeros_like(shared.down_proj.weight)
    weights = dict(tree_flatten(with_zeros.parameters()))
    module = our_module(model_type)
    model = module.Model(module.ModelArgs.from_dict(config(model_type, n_shared_experts=0)))
    weights = {name: array for name, array in weights.items() if ".shared_experts." not in name}
    model.load_weights(list(model.sanitize(weights).items()))
    assert mx.array_equal(model(tokens(LENGTH)), with_zeros(tokens(LENGTH)))
    model.shard(FakeGroup(0, 2))


@needs_native
def test_every_config_key_of_the_native_classes():
    def keys(cls):
        return set(inspect.signature(cls).parameters)

    assert keys(NATIVE.ModelArgs) <= keys(our_module().ModelArgs)
    assert keys(NATIVE.TextArgs) <= keys(our_module().TextArgs)


@needs_native
@pytest.mark.parametrize("method", ["__call__", "make_cache", "sanitize", "shard", "pipeline"])
def test_native_calls_are_ours_too(method):
    native = inspect.signature(getattr(NATIVE.Model, method)).parameters
    for model_type in MODEL_TYPES:
        ours = inspect.signature(getattr(our_module(model_type).Model, method)).parameters
        assert list(ours)[: len(native)] == list(native)
        rest = list(ours.values())[len(native) :]
        assert all(parameter.default is not parameter.empty for parameter in rest)


# --- parameters ---


@needs_native
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"use_qk_norm": False}], ids=str)
def test_parameters_have_the_native_names_and_shapes(changes):
    native = NATIVE.Model(NATIVE.ModelArgs.from_dict(config(**changes)))
    expected = {name: array.shape for name, array in tree_flatten(native.parameters())}
    ours = {name: array.shape for name, array in tree_flatten(our_model(**changes).parameters())}
    assert ours == expected


def test_a_text_only_model_has_the_same_parameters_without_the_prefix():
    vl = {name for name, _ in tree_flatten(our_model("minimax_m3_vl").parameters())}
    text = {name for name, _ in tree_flatten(our_model("minimax_m3").parameters())}
    assert {f"language_model.{name}" for name in text} == vl


@both_model_types
@pytest.mark.parametrize("loaded", MODEL_TYPES)
def test_either_model_type_loads_what_the_other_saves(model_type, loaded):
    saved = our_model(model_type)
    module = our_module(loaded)
    model = module.Model(module.ModelArgs.from_dict(config(loaded)))
    weights = model.sanitize(dict(tree_flatten(saved.parameters())))
    model.load_weights(list(weights.items()))
    assert mx.array_equal(model(tokens(LENGTH)), saved(tokens(LENGTH)))


def test_tied_embeddings():
    model = our_model(tie_word_embeddings=True)
    assert not any("lm_head" in name for name, _ in tree_flatten(model.parameters()))
    hidden = model.model(tokens(9))
    assert close(model(tokens(9)), hidden @ model.model.embed_tokens.weight.T)


# --- logits ---


@needs_native
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"use_gemma_norm": False},
        {"use_qk_norm": False},
        {"index_local_blocks": 0},
        {"index_local_blocks": 2, "index_block_size": 5},
        {"index_block_size": None},
        {"swiglu_alpha": 1.0, "swiglu_limit": 0.5, "routed_scaling_factor": 1.5},
        {"layer_types": ["full_attention"] * 4, "mlp_layer_types": ["dense"] * 4},
    ],
    ids=str,
)
def test_logits_are_the_native_ones(changes):
    model = our_model(**changes)
    native = native_twin(model, **changes)
    assert close(model(tokens(LENGTH, batch=2)), native(tokens(LENGTH, batch=2)))
    ours, theirs = make_prompt_cache(model), make_prompt_cache(native)
    for piece in mx.split(tokens(LENGTH), [70, 71, 72, 101], axis=1):
        assert close(model(piece, ours), native(piece, theirs))


def test_input_embeddings_stand_in_for_tokens():
    model = our_model()
    embeddings = model.model.embed_tokens(tokens(LENGTH))
    assert mx.array_equal(model(tokens(LENGTH), input_embeddings=embeddings), model(tokens(LENGTH)))


# --- conversion ---


def linear_paths(model):
    modules = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return [(path, module) for path, module in modules if hasattr(module, "to_quantized")]


@both_model_types
def test_quant_predicate(model_type):
    model = our_model(model_type)
    answers = {path: model.quant_predicate(path, module) for path, module in linear_paths(model)}
    routers = {path for path in answers if path.endswith("block_sparse_moe.gate")}
    assert len(routers) == 3
    assert all(answers[path] == {"group_size": 64, "bits": 8} for path in routers)
    assert all(answers[path] is True for path in answers.keys() - routers)


@needs_native
def test_quant_predicate_is_the_native_one():
    model = our_model()
    native = native_twin(model)
    for path, module in linear_paths(model):
        assert model.quant_predicate(path, module) == native.quant_predicate(path, module)


@both_model_types
def test_cast_predicate_keeps_the_router_in_float32(model_type):
    model = our_model(model_type)
    kept = [name for name, _ in tree_flatten(model.parameters()) if not model.cast_predicate(name)]
    assert len(kept) == 6
    assert all(name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias")) for name in kept)


@pytest.mark.parametrize(("dtype", "is_kept"), [(mx.bfloat16, True), (mx.float16, True), (mx.float32, False)])
def test_what_a_16_bit_model_has_in_float32_is_not_cast(dtype, is_kept):
    model = our_model()
    model.set_dtype(dtype)
    norm = model.language_model.model.norm
    norm.weight = norm.weight.astype(mx.float32)
    assert model.cast_predicate("language_model.model.norm.weight") is not is_kept
    assert model.cast_predicate("language_model.lm_head.weight")


@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
def test_no_part_of_a_quantized_matrix_is_cast(mode):
    model = our_model()
    nn.quantize(model, 32, 8, mode=mode, class_predicate=lambda path, _: path.endswith("lm_head"))
    head = [name for name, _ in tree_flatten(model.parameters()) if "lm_head" in name]
    assert len(head) == (3 if mode == "affine" else 2)
    assert not any(map(model.cast_predicate, head))


@needs_native
def test_what_the_native_cast_predicate_keeps_is_kept():
    model = our_model()
    native = native_twin(model)
    for name, _ in tree_flatten(model.parameters()):
        assert native.cast_predicate(name) or not model.cast_predicate(name)


def quantized(model, bits=4):
    return quantize_model(model, {}, 64, bits, quant_predicate=model.quant_predicate)


@both_model_types
def test_quantize_model_quantizes_every_linear_layer(model_type):
    model, quantized_config = quantized(our_model(model_type))
    linear = [path for path, _ in linear_paths(our_model(model_type))]
    parameters = dict(tree_flatten(model.parameters()))
    assert all(f"{path}.scales" in parameters for path in linear)
    assert sum(path.endswith(".gate") for path in quantized_config["quantization"]) == 3


def test_a_quantized_model_is_the_model_of_its_dequantized_weights():
    model, _ = quantized(our_model())
    parameters = dict(tree_flatten(model.parameters()))
    weights = {}
    for name, array in parameters.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and f"{module}.scales" in parameters:
            bits = 8 if module.endswith("block_sparse_moe.gate") else 4
            scales, biases = parameters[f"{module}.scales"], parameters[f"{module}.biases"]
            weights[name] = mx.dequantize(array, scales, biases, 64, bits)
        elif part not in ("scales", "biases"):
            weights[name] = array
    plain = our_model()
    plain.load_weights(list(weights.items()))
    assert close(model(tokens(LENGTH)), plain(tokens(LENGTH)), 1e-3)


@needs_native
def test_quantized_logits_are_the_native_ones():
    model, _ = quantized(our_model())
    native, _ = quantized(native_twin(our_model()))
    assert {n: a.shape for n, a in tree_flatten(native.parameters())} == {
        n: a.shape for n, a in tree_flatten(model.parameters())
    }
    native.load_weights(tree_flatten(model.parameters()))
    assert close(model(tokens(LENGTH)), native(tokens(LENGTH)), 1e-3)


# --- caches ---


def kinds(cache):
    """The class names, which are what mlx-lm saves and restores a cache by."""
    assert all(isinstance(layer, CacheList) for layer in cache)
    return [(type(layer).__name__, *(type(c) for c in layer.caches)) for layer in cache]


@both_model_types
def test_make_cache(model_type):
    model = our_model(model_type)
    expected = [("CacheList", KVCache)] + [("CacheList", KVCache, KVCache)] * 3
    assert kinds(model.make_cache()) == kinds(make_prompt_cache(model)) == expected


@needs_native
@both_model_types
def test_caches_are_of_the_native_types(model_type):
    native = NATIVE.Model(NATIVE.ModelArgs.from_dict(config()))
    assert kinds(our_model(model_type).make_cache()) == kinds(native.make_cache())


@needs_native
def test_caches_hold_what_the_native_ones_hold():
    model = our_model()
    native = native_twin(model)
    ours, theirs = model.make_cache(), native.make_cache()
    model(tokens(50), ours)
    native(tokens(50), theirs)
    states = [[c.state for layer in cache for c in layer.caches] for cache in (ours, theirs)]
    shapes = [tree_map(lambda x: x.shape if isinstance(x, mx.array) else x, state) for state in states]
    assert shapes[0] == shapes[1]
    for mine, other in zip(*(dict(tree_flatten(s)).values() for s in states), strict=True):
        assert not isinstance(mine, mx.array) or not mine.size or close(mine, other)


@needs_native
@pytest.mark.parametrize("prefix", [5, 77])
@pytest.mark.parametrize("saver", ["native", "ours"])
def test_a_saved_prompt_cache_continues_in_the_other_class(saver, prefix, tmp_path):
    models = {"ours": our_model()}
    models["native"] = native_twin(models["ours"])
    cache = make_prompt_cache(models[saver])
    models[saver](tokens(LENGTH)[:, :prefix], cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    cache = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    reader = models["ours" if saver == "native" else "native"]
    assert close(reader(tokens(LENGTH)[:, prefix:], cache), models[saver](tokens(LENGTH))[:, prefix:])


# --- drafts ---


def test_trimming_by_a_negative_number_brings_nothing_back():
    """What mlx-lm does when it is interrupted between two drafts."""
    model = our_model()
    cache = model.make_cache()
    model(tokens(LENGTH)[:, :60], cache)
    for entry in cache:
        assert entry.trim(9) == 9
        assert entry.trim(-4) == 0
    assert close(model(tokens(LENGTH)[:, 51:], cache), model(tokens(LENGTH))[:, 51:])


# --- pipeline ---


@pytest.fixture(autouse=True)
def a_group_of_one_mind(monkeypatch):
    """``FakeGroup`` has nobody to ask; ``tests/distributed`` has processes that disagree."""
    monkeypatch.setattr("mlx_m3_plugin.model.pipeline._agree", lambda split, group: None)


def held(model):
    """Numbers of the layers that are there, among the checkpoint's."""
    return [number for number, layer in enumerate(model.model.layers) if layer is not None]


def pipelined(model, *args):
    model.pipeline(*args)
    return model


@both_model_types
@pytest.mark.parametrize(
    ("size", "split", "expected"),
    [
        (1, None, [[0, 1, 2, 3]]),
        (2, None, [[2, 3], [0, 1]]),
        (3, None, [[2, 3], [1], [0]]),
        (4, None, [[3], [2], [1], [0]]),
        (2, [3, 1], [[1, 2, 3], [0]]),
        (2, [1, 3], [[3], [0, 1, 2]]),
        (3, [1, 2, 1], [[3], [1, 2], [0]]),
    ],
    ids=str,
)
def test_a_pipeline_splits_the_layers_from_the_end(model_type, size, split, expected):
    """Rank 0 holds the last layers; every layer is held once and keeps its number."""
    for rank in range(size):
        model = pipelined(our_model(model_type), FakeGroup(rank, size), split)
        assert held(model) == expected[rank]
        assert len(model.layers) == len(model.make_cache()) == len(expected[rank])
        assert (model.model.start_idx, model.model.end_idx) == (expected[rank][0], expected[rank][-1] + 1)


@both_model_types
def test_a_split_may_be_set_in_the_environment(model_type, monkeypatch):
    """Where mlx-lm's own ``sharded_load`` splits, too: it calls ``model.model.pipeline``."""
    monkeypatch.setenv("MLX_M3_PLUGIN_PIPELINE_SPLIT", " 3, 1 ")
    model, other, chosen = (our_model(model_type) for _ in range(3))
    model.pipeline(FakeGroup(0, 2))
    other.model.pipeline(FakeGroup(0, 2))
    chosen.pipeline(FakeGroup(0, 2), [1, 3])
    assert held(model) == held(other) == [1, 2, 3]
    assert held(chosen) == [3]


@both_model_types
@pytest.mark.parametrize("split", [[4], [2, 1], [3, 2], [4, 0], [5, -1], [2, 1, 1]], ids=str)
def test_a_split_that_does_not_fit_is_refused_and_changes_nothing(model_type, split):
    model = our_model(model_type)
    with pytest.raises(ValueError, match="cannot split 4 layers over 2 processes"):
        model.pipeline(FakeGroup(0, 2), split)
    assert held(model) == [0, 1, 2, 3]
    assert model.model.pipeline_size == 1


def test_more_processes_than_layers_are_refused():
    with pytest.raises(ValueError, match="cannot split 4 layers over 5 processes"):
        our_model().pipeline(FakeGroup(0, 5))


def test_a_stage_keeps_the_names_of_the_checkpoint():
    model = pipelined(our_model(), FakeGroup(0, 2))
    names = {name for name, _ in tree_flatten(model.parameters())}
    assert any(name.startswith("language_model.model.layers.3.") for name in names)
    assert not any(name.startswith("language_model.model.layers.1.") for name in names)


def test_caches_of_a_stage_follow_its_layers():
    last = pipelined(our_model(), FakeGroup(0, 2))
    first = pipelined(our_model(), FakeGroup(1, 2))
    assert [len(layer.caches) for layer in first.make_cache() + last.make_cache()] == [1, 2, 2, 2]


@needs_native
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_default_split_is_the_native_one(size):
    for rank in range(size):
        native = NATIVE.Model(NATIVE.ModelArgs.from_dict(config()))
        native.pipeline(FakeGroup(rank, size))
        assert held(pipelined(our_model(), FakeGroup(rank, size))) == held(native)


# --- tensor parallelism ---


@both_model_types
def test_shards_are_parts_of_the_whole(model_type):
    """Rows of what widens, columns of what narrows, and everything else on every process."""
    whole = dict(tree_flatten(our_model(model_type).parameters()))
    shards = []
    for rank in range(2):
        model = our_model(model_type)
        model.shard(FakeGroup(rank, 2))
        shards.append(dict(tree_flatten(model.parameters())))
        attention = model.layers[1].self_attn
        assert (attention.num_attention_heads, attention.num_key_value_heads, attention.index_n_heads) == (
            4,
            2,
            2,
        )
    narrowing = ("o_proj.weight", "down_proj.weight")
    widening = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    for name, array in whole.items():
        parts = [shard[name] for shard in shards]
        if name.endswith(narrowing):
            assert mx.array_equal(mx.concatenate(parts, axis=-1), array), name
        elif name.endswith(widening) and "index_k_proj" not in name:
            assert mx.array_equal(mx.concatenate(parts, axis=-2), array), name
        else:
            assert all(mx.array_equal(part, array) for part in parts), name


@needs_native
@pytest.mark.parametrize("rank", [0, 1])
def test_shards_are_the_native_ones(rank):
    model = our_model()
    native = native_twin(model)
    for either in (model, native):
        either.shard(FakeGroup(rank, 2))
    ours, theirs = (dict(tree_flatten(either.parameters())) for either in (model, native))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def test_heads_that_do_not_divide_are_refused_and_nothing_is_changed():
    model = our_model()
    before = dict(tree_flatten(model.parameters()))
    with pytest.raises(ValueError, match=r"num_key_value_heads.*3 processes"):
        model.shard(FakeGroup(0, 3))
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is before[name] for name in before)


def test_sharding_once_too_often_is_refused():
    model = our_model()
    model.shard(FakeGroup(0, 4))
    with pytest.raises(ValueError, match="sharded already"):
        model.shard(FakeGroup(0, 4))
