"""Every layout of a checkpoint is read back to the same parameters, bit for bit and lazily."""

import json
import re
from dataclasses import dataclass

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.minimax_m3_vl import Model, ModelArgs

from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.weights.check import check_weights
from mlx_m3_plugin.weights.layouts import pack_experts, plan_layout
from tests.checkpoints.layouts import arrange
from tests.checkpoints.layouts.arrange import PREFIX
from tests.checkpoints.layouts.formats import as_mxfp8_bytes
from tests.checkpoints.layouts.reading import map_weights
from tests.checkpoints.layouts.source import Weights
from tests.checkpoints.small_model import (
    CONFIG,
    EXPERTS,
    LAYOUTS,
    MLP,
    MOE,
    parameters,
    quantized,
    with_other_parts,
    with_prefix,
)

# Keyword arguments of mx.quantize, or none.
PRECISIONS = {
    "float32": None,
    "4-bit": {"group_size": 32, "bits": 4},
    "8-bit": {"group_size": 64, "bits": 8},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}


@pytest.fixture(scope="module", params=PRECISIONS)
def truth(request: pytest.FixtureRequest) -> Weights:
    spec = PRECISIONS[request.param]
    return parameters() if spec is None else quantized(parameters(), **spec)


@pytest.fixture(scope="module")
def float_truth() -> Weights:
    return parameters()


def assert_same(made: Weights, expected: Weights):
    assert made.keys() == expected.keys()
    for name, array in made.items():
        assert array.dtype == expected[name].dtype, name
        assert mx.array_equal(array, expected[name]), name


def test_the_parameters_are_those_of_the_model(float_truth):
    model = Model(ModelArgs(CONFIG))
    check_weights(with_prefix(float_truth), dict(tree_flatten(model.parameters())))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_back_bit_for_bit(layout, truth):
    """Whatever the model's prefix, and whether or not the stored names carry ``language_model.``."""
    stored = LAYOUTS[layout](truth)
    for prefix in ("", PREFIX):
        expected = {prefix + name: array for name, array in truth.items()}
        once = map_weights(with_prefix(stored), CONFIG, prefix)
        assert_same(once, expected)
        assert_same(map_weights(stored, CONFIG, prefix), expected)
        # Reading twice is reading once.
        twice = map_weights(once, CONFIG, prefix)
        assert once.keys() == twice.keys()
        assert all(twice[name] is once[name] for name in once)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_parts_of_a_checkpoint_are_dropped(layout, float_truth):
    stored = with_other_parts(with_prefix(LAYOUTS[layout](float_truth)))
    assert_same(map_weights(stored, CONFIG, PREFIX), with_prefix(float_truth))


@pytest.mark.parametrize("layout", ["as_they_are", "published", "dense_under_block_sparse_moe"])
def test_mxfp8_bytes(layout):
    """The official checkpoint: e4m3 bytes as uint8, exponents as ``weight_scale_inv``."""
    expected = quantized(parameters(), **PRECISIONS["mxfp8"])
    stored = as_mxfp8_bytes(LAYOUTS[layout](expected))
    assert f"{MOE}.gate.weight_scale_inv" not in stored
    assert stored["model.layers.1.self_attn.index_q_proj.weight"].dtype == mx.uint8
    assert_same(map_weights(with_prefix(stored), CONFIG, PREFIX), with_prefix(expected))


# --- the way back ---


def test_packing_is_the_inverse_of_splitting(truth):
    plan = pack_experts(plan_layout(truth, CONFIG, ""), CONFIG, "")
    made = {name: tensor.make(truth) for name, tensor in plan.items()}
    assert_same(made, arrange.fused_experts_only(arrange.shared_as_last_expert(truth)))


def test_what_differs_in_bits_stays_apart(float_truth):
    """No tensor can hold rows of 4 and of 8 bits."""
    weights = quantized(float_truth, **PRECISIONS["4-bit"])
    more_bits = quantized(float_truth, **PRECISIONS["8-bit"])
    assert pack_experts(plan_layout(weights, CONFIG, ""), CONFIG, "") is not None
    for apart in (f"{MOE}.shared_experts", "up_proj"):
        mixed = weights | {name: array for name, array in more_bits.items() if apart in name}
        assert pack_experts(plan_layout(mixed, CONFIG, ""), CONFIG, "") is None


def test_mxfp8_from_a_file_with_float8_tensors(tmp_path):
    weight, scales = mx.quantize(parameters()[f"{MLP}.gate_proj.weight"], **PRECISIONS["mxfp8"])
    stored = {
        f"{MLP}.gate_proj.weight": ("F8_E4M3", weight.view(mx.uint8)),
        f"{MLP}.gate_proj.weight_scale_inv": ("U8", scales),
    }
    header, data = {}, b""
    for name, (dtype, array) in stored.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
        data += bytes(memoryview(array))
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    made = map_weights(mx.load(str(tmp_path / "model.safetensors")), CONFIG, "")
    assert_same(made, {f"{MLP}.gate_proj.weight": weight, f"{MLP}.gate_proj.scales": scales})


def test_a_fused_4_bit_checkpoint_is_split_exactly():
    """Splitting packed rows is quantizing the halves: no value is unpacked on the way."""
    spec = PRECISIONS["4-bit"]
    apart = parameters()
    whole = arrange.fused_shared_as_last_expert(apart)
    gate_up = whole[f"{MOE}.switch_mlp.gate_up_proj.weight"]
    packed = dict(zip(("weight", "scales", "biases"), mx.quantize(gate_up, **spec), strict=True))
    stored = {f"{MOE}.switch_mlp.gate_up_proj.{part}": array for part, array in packed.items()}
    made = map_weights(stored, CONFIG, "")
    assert len(made) == 12
    for owner in ("switch_mlp", "shared_experts"):
        for projection in ("gate_proj", "up_proj"):
            expected = mx.quantize(apart[f"{MOE}.{owner}.{projection}.weight"], **spec)
            for part, array in zip(("weight", "scales", "biases"), expected, strict=True):
                assert mx.array_equal(made[f"{MOE}.{owner}.{projection}.{part}"], array)


def test_the_head_of_tied_embeddings_is_dropped(float_truth):
    config = TextConfig(**{**vars(CONFIG), "tie_word_embeddings": True})
    made = map_weights(with_prefix(float_truth), config, PREFIX)
    assert with_prefix(float_truth).keys() - made.keys() == {f"{PREFIX}lm_head.weight"}


@pytest.mark.parametrize("missing", ["w1.weight", "w2.weight"])
def test_a_missing_expert_is_not_papered_over(missing, float_truth):
    """The other experts keep their stored names, for the check to name them."""
    stored = arrange.published(float_truth)
    del stored[f"{MOE}.experts.2.{missing}"]
    made = map_weights(stored, CONFIG, "")
    projection = {"w1.weight": "gate_proj", "w2.weight": "down_proj"}[missing]
    assert f"{MOE}.switch_mlp.{projection}.weight" not in made
    assert f"{MOE}.experts.0.{missing}" in made


def test_unknown_tensors_keep_their_names(float_truth):
    stored = with_prefix(float_truth) | {"language_model.model.layers.1.self_attn.surprise": mx.ones(1)}
    made = map_weights(stored, CONFIG, PREFIX)
    assert made.keys() - with_prefix(float_truth).keys() == {f"{PREFIX}model.layers.1.self_attn.surprise"}


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_tensor_of_another_model_is_named_as_stored(prefix, float_truth):
    stored = with_prefix(float_truth) | {"visual.blocks.0.attn.qkv.weight": mx.ones(1)}
    made = map_weights(stored, CONFIG, prefix)
    assert "visual.blocks.0.attn.qkv.weight" in made
    assert len(made) == len(stored)


@pytest.mark.parametrize("layout", ["published", "fused", "shared_as_last_expert"])
def test_experts_in_two_arrangements_are_refused(layout, float_truth):
    """As old shards beside new ones hold them: neither may win in silence."""
    apart = {name: array for name, array in float_truth.items() if f"{MOE}.s" in name}
    stored = apart | LAYOUTS[layout](float_truth)
    with pytest.raises(ValueError, match=r"the same tensor twice, as model\.layers\.1\.block_sparse_moe\.s"):
        map_weights(stored, CONFIG, PREFIX)


@pytest.mark.parametrize("owner", ["switch_mlp", "shared_experts"])
def test_fused_halves_share_their_tensor_scale(owner, float_truth):
    fused = arrange.fused(float_truth)[f"{MOE}.{owner}.gate_up_proj.weight"]
    packed, scales = mx.quantize(fused, group_size=16, bits=4, mode="nvfp4")
    scale = mx.arange(EXPERTS) + 1.0 if owner == "switch_mlp" else mx.array(3.0)
    parts = {"weight": packed, "scales": scales, "global_scale": scale}
    stored = {f"{MOE}.{owner}.gate_up_proj.{part}": array for part, array in parts.items()}
    made = map_weights(stored, CONFIG, "")
    assert len(made) == 6
    for half in ("gate_proj", "up_proj"):
        assert mx.array_equal(made[f"{MOE}.{owner}.{half}.global_scale"], scale)


# --- without reading anything ---


@dataclass
class Header:
    """All that a safetensors header says of a tensor."""

    shape: tuple[int, ...]
    dtype: mx.Dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_needs_headers_only_and_tells_shapes_and_dtypes(layout, truth):
    stored = LAYOUTS[layout](truth)
    headers = {name: Header(array.shape, array.dtype) for name, array in stored.items()}
    plan = plan_layout(headers, CONFIG, "")
    from_arrays = plan_layout(stored, CONFIG, "")
    assert list(plan) == list(from_arrays)
    assert {name: str(t) for name, t in plan.items()} == {name: str(t) for name, t in from_arrays.items()}
    assert {n: (t.shape, t.dtype) for n, t in plan.items()} == {
        n: (a.shape, a.dtype) for n, a in truth.items()
    }


def real_text_tensors() -> Weights:
    """The published text tensors at their real sizes, which nobody could evaluate here."""
    shapes = {
        "model.embed_tokens.weight": (200064, 6144),
        "lm_head.weight": (200064, 6144),
        "model.norm.weight": (6144,),
    }
    attention = {
        "self_attn.q_proj.weight": (8192, 6144),
        "self_attn.k_proj.weight": (512, 6144),
        "self_attn.v_proj.weight": (512, 6144),
        "self_attn.o_proj.weight": (6144, 8192),
        "self_attn.q_norm.weight": (128,),
        "self_attn.k_norm.weight": (128,),
        "input_layernorm.weight": (6144,),
        "post_attention_layernorm.weight": (6144,),
    }
    dense = {
        "mlp.gate_proj.weight": (12288, 6144),
        "mlp.up_proj.weight": (12288, 6144),
        "mlp.down_proj.weight": (6144, 12288),
    }
    sparse = {
        "self_attn.index_q_proj.weight": (512, 6144),
        "self_attn.index_k_proj.weight": (128, 6144),
        "self_attn.index_q_norm.weight": (128,),
        "self_attn.index_k_norm.weight": (128,),
        "block_sparse_moe.gate.weight": (128, 6144),
        "block_sparse_moe.e_score_correction_bias": (128,),
        "block_sparse_moe.shared_experts.gate_proj.weight": (3072, 6144),
        "block_sparse_moe.shared_experts.up_proj.weight": (3072, 6144),
        "block_sparse_moe.shared_experts.down_proj.weight": (6144, 3072),
    }
    for expert in range(128):
        sparse[f"block_sparse_moe.experts.{expert}.w1.weight"] = (3072, 6144)
        sparse[f"block_sparse_moe.experts.{expert}.w3.weight"] = (3072, 6144)
        sparse[f"block_sparse_moe.experts.{expert}.w2.weight"] = (6144, 3072)
    for layer in range(60):
        for name, shape in (attention | (dense if layer < 3 else sparse)).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    return {PREFIX + name: unread(shape, mx.bfloat16) for name, shape in shapes.items()}


def unread(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """No memory even when evaluated; a stack or a copy of these would take all there is."""
    return mx.broadcast_to(mx.zeros((), dtype), shape)


REAL_CONFIG = TextConfig(
    layer_types=["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
    mlp_layer_types=["dense"] * 3 + ["sparse"] * 57,
)


@pytest.mark.parametrize("bytes_per_weight", [2, 1], ids=["bf16", "mxfp8"])
def test_the_real_model_is_mapped_and_loaded_without_reading_it(bytes_per_weight):
    stored = real_text_tensors()
    assert len(stored) == 22893
    assert sum(array.size for array in stored.values()) == 426_174_572_928
    model = Model(ModelArgs(REAL_CONFIG))
    if bytes_per_weight == 1:
        for name in [
            n for n, a in stored.items() if a.ndim == 2 and not re.search(r"embed|head|\.gate\.", n)
        ]:
            rows, columns = stored[name].shape
            stored[name] = unread((rows, columns), mx.uint8)
            stored[f"{name}_scale_inv"] = unread((rows, columns // 32), mx.uint8)
        assert len(stored) == 45838 - 523  # of which 523 belong to the vision path
    before = mx.get_active_memory()
    made = model.sanitize(stored)
    if bytes_per_weight == 2:
        model.load_weights(list(made.items()))
    assert sum(array.nbytes for array in made.values()) == sum(array.nbytes for array in stored.values())
    assert mx.get_active_memory() - before < 2**20


def test_applying_a_plan_to_a_file_reads_nothing(tmp_path, float_truth):
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrange.published(float_truth))
    before = mx.get_active_memory()
    made = map_weights(mx.load(str(tmp_path / "model.safetensors")), CONFIG, "")
    assert mx.get_active_memory() - before < 1024
    assert_same(made, float_truth)


def test_a_split_does_not_keep_the_whole_alive():
    """A slice would hold the fused tensor in memory; the halves are tensors of their own."""
    fused = mx.random.normal((2, 2048, 64))
    mx.eval(fused)
    nbytes = fused.nbytes
    stored = {f"{MOE}.switch_mlp.gate_up_proj.weight": fused}
    before = mx.get_active_memory()
    made = map_weights(stored, CONFIG, "")
    gate = made[f"{MOE}.switch_mlp.gate_proj.weight"]
    mx.eval(gate)
    del made, fused
    stored.clear()
    assert mx.get_active_memory() - before < -0.4 * nbytes
    assert gate.shape == (2, 1024, 64)
