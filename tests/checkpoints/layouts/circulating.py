"""Checkpoints that people have pruned, merged or exported by tools of their own."""

from collections.abc import Callable

import mlx.core as mx

from .arrange import PROJECTIONS, nested, published
from .experts import NVFP4_LAYERS, encode_experts, nvfp4_modelopt
from .formats import Checkpoint, mxfp8, plain
from .source import Json, Source, Weights, as_published


def pruned(*, source: Source) -> Checkpoint:
    """The first layers of a longer model, whose lists were not cut."""
    made = plain(source=source)
    text = made.config["text_config"]
    sparse = text["sparse_attention_config"]
    for holder, key in (
        (text, "moe_layer_freq"),
        (sparse, "sparse_attention_freq"),
        (sparse, "sparse_disable_index_value"),
    ):
        holder[key] = holder[key] + [1] * 5
    return made


def experts_by_projection(*, source: Source) -> Checkpoint:
    """``experts.N.gate_proj`` in place of ``w1``."""
    made = plain(source=source)
    for name in [n for n in made.tensors if ".experts." in n]:
        module, _, part = name.rpartition(".")
        owner, _, stored = module.rpartition(".")
        projection = next(p for p, w in PROJECTIONS.items() if w == stored)
        made.tensors[f"{owner}.{projection}.{part}"] = made.tensors.pop(name)
    return made


def sparse_tokens(*, source: Source) -> Checkpoint:
    """Initial and local blocks in tokens, of which a part counts as a whole block."""
    made = plain(source=source)
    sparse = made.config["text_config"]["sparse_attention_config"]
    size = sparse["sparse_block_size"]
    for key in ("sparse_init_block", "sparse_local_block"):
        sparse.pop(key, None)
    sparse["sparse_init_tokens"], sparse["sparse_local_tokens"] = size - 1, size + 1
    return made


def flat_with_vision_type(config: Json) -> Json:
    """``model_type: minimax_m3_vl`` with the text keys on top."""
    outer = as_published(config)
    return outer.pop("text_config") | outer


def with_extras(*, source: Source) -> Checkpoint:
    """Tensors that other libraries store and nothing needs: rotary frequencies, scales of an FP8 KV cache."""
    made = mxfp8(source=source)
    for layer in range(made.config["text_config"]["num_hidden_layers"]):
        attention = nested(f"model.layers.{layer}.self_attn")
        made.tensors |= {
            f"{attention}.rotary_emb.inv_freq": mx.ones(8),
            f"{attention}.k_proj.k_scale": mx.ones(1),
            f"{attention}.v_proj.v_scale": mx.ones(1),
            f"{attention}.k_scale": mx.ones(()),
            f"{attention}.v_scale": mx.ones(()),
        }
    return made


def doubled_prefix(name: str) -> str:
    return f"language_model.{nested(name)}" if nested(name) != name else f"model.model.{name}"


def nvfp4_parts(*parts: str) -> Callable[[str], bool]:
    """Which modules of dense and shared MLPs are NVFP4."""
    return lambda module: module.rpartition(".")[2] in parts


def fused_mlps(quantized: str, *, source: Source) -> Checkpoint:
    """ModelOpt's NVFP4 experts; dense and shared MLPs have gate and up fused, and ``quantized`` in NVFP4."""
    parameters = published_rest(source)
    halves = [n for n in parameters if n.endswith("gate_proj.weight")]
    for name in halves:
        pair = [parameters.pop(name), parameters.pop(name.replace("gate_proj", "up_proj"))]
        parameters[name.replace("gate_proj", "gate_up_proj")] = mx.concatenate(pair)
    made = with_nvfp4(parameters, nvfp4_parts(quantized), source)
    for name in halves:
        fused = made.values.pop(name.replace("gate_proj", "gate_up_proj"))
        made.values[name], made.values[name.replace("gate_proj", "up_proj")] = mx.split(fused, 2)
    return made


def nvfp4_shared_experts(*, source: Source) -> Checkpoint:
    """ModelOpt's NVFP4 for routed and shared experts, the rest float."""
    return with_nvfp4(published_rest(source), lambda module: ".shared_experts." in module, source)


def published_rest(source: Source) -> Weights:
    """All but the routed experts."""
    return {n: a for n, a in published(source.parameters).items() if ".experts." not in n}


def with_nvfp4(rest: Weights, quantized: Callable[[str], bool], source: Source) -> Checkpoint:
    tensors, values, _ = encode_experts(source.parameters, nvfp4_modelopt)
    for name, array in rest.items():
        module = name.removesuffix(".weight")
        is_mlp = ".mlp." in name or ".shared_experts." in name
        if is_mlp and quantized(module):
            parts, values[name] = nvfp4_modelopt(array, mx.abs(array).max())
            tensors |= {nested(f"{module}.{part}"): tensor for part, tensor in parts.items()}
        else:
            tensors[nested(name)] = values[name] = array
    config = as_published(source.config) | {"quantization_config": dict(NVFP4_LAYERS)}
    float8 = [name for name in tensors if name.endswith(".weight_scale")]
    return Checkpoint(tensors | source.vision, config, values, float8)
