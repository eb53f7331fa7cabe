"""What mlx-vlm and its users reach for on the native M3 classes is there on ours."""

import ast
import inspect
import shutil
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from tests.vlm.vlm_runs import BUDGET, TOLERANCE, difference, embeddings, fresh_logits, text, with_images

VL = "mlx_vlm.models.minimax_m3_vl"
TEXT_ONLY = "mlx_vlm.models.minimax_m3"
SUB_MODULES = ("config", "language", "minimax_m3_vl", "processing_minimax_m3_vl", "vision")
# Absent on purpose: with the first mlx-vlm passes the positions of a whole prompt for the part not cached,
# with the second it verifies drafts by the embedding.
HARMFUL = {"get_rope_index", "logits_from_hidden"}
# The native Model hands these on; no caller asks the language model for them.
ON_THE_MODEL = {"quant_predicate", "cast_predicate"}


def native_file(module: str) -> Path:
    import mlx_vlm

    directory = Path(mlx_vlm.__file__).parent / "models" / module.rpartition(".")[2]
    assert directory.is_dir()
    return directory / "__init__.py"


def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names}


def public(cls: type) -> set[str]:
    """Names that upstream's own code gives a class."""
    own = [c for c in cls.__mro__ if c.__module__.startswith("mlx_vlm.models.minimax_m3")]
    return {name for c in own for name in vars(c) if not name.startswith("_")}


def native(module: str, cls: str) -> Any:
    return getattr(import_module(f"{VL}.{module}"), cls)


# --- modules ---


@pytest.mark.parametrize("name", [VL, TEXT_ONLY])
def test_the_served_modules_have_the_native_names(name: str) -> None:
    served = import_module(name)
    assert "mlx_m3_plugin" in str(served.__file__)
    assert served.Model.__module__ == name
    expected = names_in(native_file(name))
    assert {"Model", "ModelConfig"} <= expected
    assert {n for n in expected if not hasattr(served, n)} == set()
    assert expected <= set(served.__all__)


def test_sub_modules_stay_upstreams() -> None:
    """Also after ours were served: the prefix cache imports one of them by name."""
    import_module(VL)
    directory = native_file(VL).parent
    for name in SUB_MODULES:
        module = import_module(f"{VL}.{name}")
        assert Path(str(module.__file__)) == directory / f"{name}.py"
    assert native("minimax_m3_vl", "Model") is not import_module(VL).Model
    assert native("language", "LanguageModel") is not import_module(VL).LanguageModel


def test_the_processor_is_upstreams() -> None:
    served = import_module(VL)
    for name in ("MiniMaxM3VLProcessor", "MiniMaxVLProcessor", "MiniMaxM3VLImageProcessor"):
        assert getattr(served, name) is native("processing_minimax_m3_vl", name)


def test_no_class_sanitizers() -> None:
    """Where an exported part has one, the loader builds that part alone and runs it."""
    served: ModuleType = import_module(VL)
    for part in (served.LanguageModel, served.VisionModel):
        assert not hasattr(part, "sanitize")


# --- classes ---


def test_every_public_name_of_the_native_model(model: Any) -> None:
    assert missing(public(native("minimax_m3_vl", "Model")), model) == set()


def test_every_public_name_of_the_native_language_model(model: Any) -> None:
    expected = public(native("language", "LanguageModel")) - HARMFUL - ON_THE_MODEL
    assert {"make_cache", "rollback_speculative_cache"} <= expected
    assert missing(expected, model.language_model) == set()
    assert missing(ON_THE_MODEL, model) == set()
    assert missing({"args", "config", "model_type", "model", "lm_head"}, model.language_model) == set()
    assert missing({"embed_tokens", "layers", "norm"}, model.language_model.model) == set()


def test_every_public_name_of_the_native_text_only_model() -> None:
    native_names = methods_in(native_file(TEXT_ONLY).with_name("minimax_m3.py"), "Model")
    assert {"sanitize", "make_cache"} <= native_names
    assert missing(native_names, import_module(TEXT_ONLY).Model) == set()


def test_every_public_name_of_the_native_cache() -> None:
    from mlx_m3_plugin.hosts.mlx_vlm.cache import make_layer_cache

    ours, theirs = make_layer_cache(True), native("language", "MiniMaxM3KVCache")
    assert missing(public(theirs), ours) == set()
    assert isinstance(ours, theirs)
    assert (type(ours).__name__, type(ours).__module__) == (theirs.__name__, theirs.__module__)


def missing(names: Iterable[str], thing: Any) -> set[str]:
    return {name for name in names if not hasattr(thing, name)}


def methods_in(file: Path, cls: str) -> set[str]:
    """Of a class that cannot be imported, because its module's name is ours."""
    (node,) = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef) and n.name == cls]
    return {n.name for n in node.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("minimax_m3_vl", "Model", "__call__"), "Model"),
        (("minimax_m3_vl", "Model", "encode_image"), "Model"),
        (("minimax_m3_vl", "Model", "encode_video"), "Model"),
        (("minimax_m3_vl", "Model", "get_input_embeddings"), "Model"),
        (("language", "LanguageModel", "__call__"), "LanguageModel"),
        (("language", "LanguageModel", "rollback_speculative_cache"), "LanguageModel"),
        (("language", "LanguageModel", "shard"), "LanguageModel"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_calls_take_what_the_native_ones_take(theirs: tuple[str, str, str], ours: str) -> None:
    module, cls, method = theirs
    expected = inspect.signature(getattr(native(module, cls), method)).parameters
    taken = inspect.signature(getattr(getattr(import_module(VL), ours), method)).parameters
    assert expected.keys() <= taken.keys()
    required = [p for p in taken.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    assert {p.name for p in required} <= {p.name for p in expected.values() if p.default is p.empty}


def test_text_model_call_takes_what_the_native_one_takes(model: Any) -> None:
    expected = inspect.signature(native("language", "MiniMaxM3Model").__call__).parameters
    assert list(inspect.signature(type(model.language_model.model).__call__).parameters) == list(expected)


# --- what the calls give ---


def test_the_output_object(model: Any) -> None:
    """The loops read all of its fields, whether there is something in them or not."""
    from mlx_vlm.models.base import LanguageModelOutput

    output = model(mx.array([text(9).tokens]))
    assert type(output) is LanguageModelOutput
    assert output.logits.shape == (1, 9, 704)
    for field in ("hidden_states", "cross_attention_states", "encoder_outputs", "gdn_states"):
        assert getattr(output, field) is None
    assert model.language_model(mx.array([[1]]), return_shared_kv=True).shared_kv_states == {}
    assert model.language_model(mx.array([[1]]), skip_logits=True).logits is None


def test_keywords_for_every_model_change_nothing(model: Any) -> None:
    tokens = mx.array([text(60).tokens])
    plain = model.language_model(tokens).logits
    given = model.language_model(
        tokens,
        n_to_process=60,
        rope_deltas=mx.full((1, 1), 7),
        position_ids=mx.full((1, 60), 3),
        attention_mask=mx.ones((1, 60)),
        attention_mask_4d=None,
        visual_pos_masks=mx.ones((1, 60)),
        image_grid_thw=mx.array([[1, 4, 6]]),
        video_grid_thw=None,
        speculative_verify=True,
    ).logits
    assert mx.array_equal(given, plain)


@pytest.mark.parametrize("prompt", [text(BUDGET - 2), with_images(20)], ids=["text", "image"])
def test_logits_are_the_native_ones_within_the_budget(model: Any, checkpoint: Path, prompt: Any) -> None:
    """Beyond it upstream chooses blocks otherwise."""
    import json

    assert len(prompt.tokens) <= BUDGET
    config = json.loads((checkpoint / "config.json").read_text())
    upstream = native("minimax_m3_vl", "Model")(native("config", "ModelConfig").from_dict(config))
    weights: dict[str, mx.array] = {}
    for shard in checkpoint.glob("*.safetensors"):
        weights |= mx.load(str(shard))  # type: ignore[arg-type]
    upstream.load_weights(list(upstream.sanitize(weights).items()))
    assert difference(fresh_logits(model, prompt), fresh_logits(upstream, prompt)) <= TOLERANCE


def test_embeddings_given_instead_of_tokens(model: Any) -> None:
    prompt = with_images(90)
    made = embeddings(model, prompt)
    assert made.keys() == {"inputs_embeds", "visual_pos_masks"}
    tokens = mx.array([prompt.tokens])
    through_model = model(tokens, inputs_embeds=made["inputs_embeds"]).logits[0]
    through_text_model = model.language_model(tokens, **made).logits[0]
    expected = fresh_logits(model, prompt)
    assert mx.array_equal(through_model, expected)
    assert mx.array_equal(through_text_model, expected)


# --- make_cache, layers, predicates, shards ---


def test_make_cache(model: Any) -> None:
    from mlx_vlm.models.cache import KVCache, make_prompt_cache

    for cache in (model.make_cache(), model.language_model.make_cache()):
        assert [type(entry).__name__ for entry in cache] == ["KVCache"] + ["MiniMaxM3KVCache"] * 2
        assert type(cache[0]) is KVCache
    assert len(make_prompt_cache(model.language_model)) == len(model.layers) == 3


def test_layers_are_a_list_of_modules(model: Any) -> None:
    assert isinstance(model.layers, list)
    assert model.layers[1] is model.language_model.model.layers[1]
    assert (model.language_model.head_dim, model.language_model.n_kv_heads) == (32, 2)


def test_predicates(model: Any) -> None:
    router = "language_model.model.layers.1.block_sparse_moe.gate"
    assert model.quant_predicate(router, None) == {"group_size": 64, "bits": 8}
    assert model.quant_predicate("language_model.lm_head", None) is True
    assert not model.cast_predicate(f"{router}.weight")
    assert not model.cast_predicate("language_model.model.layers.1.block_sparse_moe.e_score_correction_bias")
    assert model.cast_predicate("language_model.lm_head.weight")


@pytest.mark.parametrize("how", ["tensor_group", "pipeline_group"])
def test_sharded_load_with_a_group_of_one(model: Any, checkpoint: Path, how: str) -> None:
    from mlx_vlm.utils import sharded_load

    loaded, _ = sharded_load(str(checkpoint), **{how: mx.distributed.init()})
    tokens = mx.array([text(120).tokens])
    cache = loaded.make_cache()
    pieces = [loaded(piece, cache=cache).logits for piece in (tokens[:, :70], tokens[:, 70:])]
    assert difference(mx.concatenate(pieces, axis=1), model(tokens).logits) <= TOLERANCE


def test_sharded_load_is_strict(checkpoint: Path, tmp_path: Path) -> None:
    """What a checkpoint lacks would stay random."""
    from mlx_vlm.utils import sharded_load

    shutil.copytree(checkpoint, tmp_path / "lacking")
    name = "language_model.model.norm.weight"
    (file,) = (f for f in (tmp_path / "lacking").glob("*.safetensors") if name in mx.load(str(f)))
    mx.save_safetensors(str(file), {key: array for key, array in mx.load(str(file)).items() if key != name})
    (tmp_path / "lacking" / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        sharded_load(str(tmp_path / "lacking"), tensor_group=mx.distributed.init())


# --- configs, as other packages make and read them ---


@pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 0}, {"use_qk_norm": False}], ids=str)
def test_text_configs_have_the_native_attributes(checkpoint: Path, changes: dict[str, Any]) -> None:
    import json

    text_config = {**json.loads((checkpoint / "config.json").read_text())["text_config"], **changes}
    theirs = native("config", "TextConfig").from_dict(text_config)
    ours = import_module(VL).TextConfig.from_dict(text_config)
    # Of a published config: the flat spellings are empty in theirs.
    same = {name for name, value in vars(theirs).items() if value is not None}
    same -= {"layer_types", "model_type", "architectures", "sparse_attention_config"}
    assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
    assert ours.sparse_attention_config == theirs.sparse_attention_config
    for layer in range(theirs.num_hidden_layers):
        assert ours.is_moe_layer(layer) == theirs.is_moe_layer(layer)
        assert ours.has_sparse_index(layer) == theirs.has_sparse_index(layer)


def test_quantization_is_read_as_the_native_class_reads_it() -> None:
    router = {"bits": 8, "group_size": 64}
    given = {"bits": 4, "model.layers.1.block_sparse_moe.gate": router, "lm_head": False}
    for name in (VL, TEXT_ONLY):
        config = {"num_hidden_layers": 4, "quantization": given, "quantization_config": given}
        made = import_module(name).ModelConfig.from_dict(config)
        native_names = {"language_model.model.layers.1.block_sparse_moe.gate": router}
        assert made.quantization == {"bits": 4, "language_model.lm_head": False} | native_names
        assert made.quantization_config is made.quantization


def test_an_object_with_the_configs_alone_is_sanitized_by_upstream(model: Any, checkpoint: Path) -> None:
    """A quantizer calls the method like this to know the names."""
    from types import SimpleNamespace

    weights = dict(mx.load(str(next(checkpoint.glob("*.safetensors")))))  # type: ignore[arg-type]
    stand_in = SimpleNamespace(
        config=model.config, language_model=SimpleNamespace(args=model.config.text_config)
    )
    upstream = native("minimax_m3_vl", "Model")
    named = import_module(VL).Model.sanitize(stand_in, dict(weights))
    assert list(named) == list(upstream.sanitize(stand_in, dict(weights)))
    assert any(".switch_mlp." in name for name in named)
