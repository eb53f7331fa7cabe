"""NVFP4 with a tensor scale for every matrix, as llm-compressor's and ModelOpt's recipes make it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, save_config, save_model

from mlx_m3_plugin.toolbox.inspect import inspect
from tests.checkpoints.conversions import parameters
from tests.checkpoints.layouts import experts
from tests.checkpoints.layouts.arrange import nested
from tests.checkpoints.opens import load_language_model, logits_of, reference_logits
from tests.checkpoints.tiny_model import tiny

# Three times the block budget of these models.
TOKENS = mx.array([[(7 * i * i + 3 * i) % 90 for i in range(100)]])
TOLERANCE = 1e-4
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "quantized_layers": {}}
COMPRESSED = experts.compressed_tensors(experts.CT_NVFP4_LINEAR)
WAYS = {
    "compressed-tensors": (experts.nvfp4_compressed_tensors, COMPRESSED),
    "modelopt": (experts.nvfp4_modelopt, MODELOPT),
}

Write = Callable[..., dict[str, mx.array]]


def write(directory: Path, way: str, *more: str) -> dict[str, mx.array]:
    """A checkpoint, with tensor scales for ``more`` modules as well; returns the values it stands for."""
    encoder, quantization = WAYS[way]
    made = experts.nvfp4_everywhere(encoder, quantization, source=tiny())
    for module in more:
        array = made.tensors.pop(nested(f"{module}.weight"))
        tensors, made.values[f"{module}.weight"] = encoder(array, mx.abs(array).max())
        made.tensors |= {nested(f"{module}.{part}"): a for part, a in tensors.items()}
        made.float8 = [*made.float8, nested(f"{module}.weight_scale")]
    return made.write(directory, tiny().files)


@pytest.mark.some(5)
@pytest.mark.parametrize("library", ["mlx_lm", "mlx_vlm"])
@pytest.mark.parametrize("more", [(), ("lm_head",), ("model.layers.1.block_sparse_moe.gate",)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_its_values_say(way: str, more: tuple[str, ...], library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    reference = reference_logits(tmp_path, write(tmp_path, way, *more), TOKENS)
    assert inspect(tmp_path).problems == []
    model = load_language_model(library, tmp_path)
    cache = model.make_cache()
    parts = [model(part, cache=cache) for part in (TOKENS[:, :70], TOKENS[:, 70:71], TOKENS[:, 71:])]
    for logits in (model(TOKENS), model(TOKENS, cache=model.make_cache())):
        assert mx.abs(logits_of(logits) - reference).max().item() <= TOLERANCE
    in_parts = mx.concatenate([logits_of(part) for part in parts], axis=1)
    assert mx.abs(in_parts - reference).max().item() <= TOLERANCE
    # Without the scales the answer is another one.
    for module in model.modules():
        if "global_scale" in module:
            module.global_scale = 2 * module.global_scale
    assert mx.abs(logits_of(model(TOKENS)) - reference).max().item() > 100 * TOLERANCE


def test_what_is_saved_opens_again(tmp_path: Path) -> None:
    write(tmp_path / "m3", "compressed-tensors")
    model, config = load_model(tmp_path / "m3")
    save_model(tmp_path / "again", model)
    save_config(config, tmp_path / "again" / "config.json")
    again, _ = load_model(tmp_path / "again")
    weights = dict(tree_flatten(again.parameters()))
    assert weights["language_model.model.layers.0.self_attn.q_proj.global_scale"].shape == ()
    assert all(mx.array_equal(array, weights[name]) for name, array in tree_flatten(model.parameters()))
    assert mx.array_equal(again(TOKENS), model(TOKENS))


def test_a_tensor_scale_of_embeddings_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "compressed-tensors", "model.embed_tokens")
    refusal = r"no tensor scale for embeddings.*language_model\.model\.embed_tokens\.weight_global_scale"
    with pytest.raises(ValueError, match=refusal):
        load_model(tmp_path)
    found = inspect(tmp_path)
    assert any("no tensor scale for embeddings" in problem for problem in found.problems)
    assert not any(found.opens.values())


# --- tools that would lose the scales ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("m3")
    write(directory, "compressed-tensors")
    return load_model(directory)[0]


@pytest.mark.parametrize("library", ["mlx_lm", "mlx_vlm"])
@pytest.mark.parametrize("way", WAYS)
def test_dequantized_by_either_library_it_has_the_true_values(way: str, library: str, tmp_path: Path) -> None:
    convert = pytest.importorskip(f"{library}.convert")
    values = write(tmp_path / "m3", way, "lm_head")
    convert.convert(str(tmp_path / "m3"), str(tmp_path / "floats"), dequantize=True)
    assert "quantization" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    found = parameters(tmp_path / "floats")
    scaled = {name: value for name, value in values.items() if name.endswith("_proj.weight")}
    assert len(scaled) > 30
    for name, value in scaled.items():
        # The divisor of compressed-tensors and MLX's factor are two roundings in float32.
        assert mx.allclose(found[name].astype(mx.float32), value, rtol=2**-8, atol=0), name


@pytest.mark.parametrize("library", ["mlx_lm", "mlx_vlm"])
def test_copied_in_bfloat16_it_keeps_its_scales(library: str, tmp_path: Path) -> None:
    convert = pytest.importorskip(f"{library}.convert")
    write(tmp_path / "m3", "modelopt")
    config = json.loads((tmp_path / "m3" / "config.json").read_text())
    (tmp_path / "m3" / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    convert.convert(str(tmp_path / "m3"), str(tmp_path / "copy"))
    before, after = parameters(tmp_path / "m3"), parameters(tmp_path / "copy")
    scaled = [name.removesuffix(".global_scale") for name in before if name.endswith(".global_scale")]
    parts = [f"{module}.{part}" for module in scaled for part in ("weight", "scales", "global_scale")]
    assert len(parts) > 90
    assert [name for name in parts if not same(before[name], after[name])] == []
    assert after["model.norm.weight"].dtype == mx.bfloat16


def same(one: mx.array, other: mx.array) -> bool:
    return one.dtype == other.dtype and bool(mx.array_equal(one, other))


@pytest.mark.parametrize("dequantize", [False, True])
def test_adapters_train_and_are_not_fused(model: Any, dequantize: bool, tmp_path: Path) -> None:
    write(tmp_path, "compressed-tensors")
    adapted, _ = load_model(tmp_path)
    adapted.freeze()
    linear_to_lora_layers(adapted, 3, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    assert all("lora" in name for name, _ in tree_flatten(adapted.trainable_parameters()))
    assert mx.array_equal(adapted(TOKENS), model(TOKENS))
    gradients = nn.value_and_grad(adapted, lambda m: mx.square(m(TOKENS)).mean())(adapted)[1]
    assert any(mx.abs(gradient).max().item() > 0 for _, gradient in tree_flatten(gradients))
    layers = [m for m in adapted.modules() if isinstance(m, (LoRALinear, LoRASwitchLinear))]
    scaled = [layer for layer in layers if "global_scale" in layer.linear]
    assert {type(layer) for layer in scaled} == {LoRALinear, LoRASwitchLinear}
    for layer in scaled:
        with pytest.raises(NotImplementedError, match="the scales would be lost"):
            layer.fuse(dequantize=dequantize)
