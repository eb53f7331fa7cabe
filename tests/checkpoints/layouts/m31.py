"""MiniMax-M3.1-Flash: sparse attention on every layer, an initial block, and a draft head beside it."""

from dataclasses import replace
from functools import partial

import mlx.core as mx

from tests.drafts import checkpoint as drafts

from .arrange import STACK, as_they_are, nested
from .experts import nvfp4_compressed_tensors, other_experts
from .formats import MXFP8, NVFP4, Arrange, Checkpoint, Policy, Rename, Spelling, affine, as_converted, mlx
from .source import Json, Source, Weights, as_published

# As rtp-llm's fixtures have it.
QUANTIZATION = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [1, 32],
    "moe_quant_algo": "NVFP4",
    "moe_quant_format": "nvfp4-pack-quantized",
}


def m31(source: Source) -> Source:
    """The same model with an indexer on every layer; dense layers get those of the first sparse one."""
    config = as_published(source.config)
    sparse = config["text_config"]["sparse_attention_config"]
    freq = sparse["sparse_attention_freq"]
    first = f"model.layers.{freq.index(1)}.self_attn.index_"
    parameters = dict(source.parameters)
    for layer in (number for number, is_sparse in enumerate(freq) if not is_sparse):
        own = f"model.layers.{layer}.self_attn.index_"
        parameters |= {n.replace(first, own): a for n, a in source.parameters.items() if first in n}
    sparse["sparse_init_block"] = 1
    sparse["sparse_attention_freq"] = sparse["sparse_disable_index_value"] = [1] * len(freq)
    config["text_config"].pop("num_mtp_modules", None)
    return replace(source, config=config, parameters=parameters)


def published(*, source: Source) -> Checkpoint:
    """NVFP4 experts, the rest MXFP8, and the draft head in a folder of its own."""
    made = other_experts(nvfp4_compressed_tensors, dict(QUANTIZATION), float8_scales=True, source=m31(source))
    made.beside["dspark"] = draft()
    return made


def published_text_only(config: Spelling, *, source: Source) -> Checkpoint:
    made = published(source=source)
    names = {name: name.removeprefix("language_model.") for name in made.tensors if name not in source.vision}
    text = {new: made.tensors[name] for name, new in names.items()}
    float8 = [names[name] for name in made.float8]
    return Checkpoint(text, config(made.config), made.values, float8)


def draft() -> Checkpoint:
    """A random draft head, stored as the published one."""
    config = drafts.config(dspark_markov_rank=64)
    tensors: Weights = {}
    for name, array in drafts.values(config["text_config"], 31).items():
        if drafts.is_matrix_of_layer(name):
            packed, scales = mx.quantize(array, **drafts.MXFP8)
            tensors |= {name: packed.view(mx.uint8), f"{name}_scale_inv": scales}
        else:
            tensors[name] = array.astype(mx.bfloat16)
    config["quantization_config"] = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
    return Checkpoint(tensors, config, {}, [name for name in tensors if f"{name}_scale_inv" in tensors])


def draft_tensors(prefix: str) -> Weights:
    """Some of the tensors of a draft head."""
    attention = "layers.0.decoder_layer.self_attn"
    tensors = {
        "fc.weight": mx.ones((128, 640)),
        "hidden_norm.weight": mx.ones((128,)),
        "markov_head.markov_w1.weight": mx.ones((90, 16)),
        "confidence_head.proj.bias": mx.ones((1,)),
        f"{attention}.q_norm.weight": mx.ones((32,)),
        f"{attention}.q_proj.weight": mx.ones((256, 128), mx.uint8),
        f"{attention}.q_proj.weight_scale_inv": mx.ones((256, 4), mx.uint8),
    }
    return {prefix + name: array for name, array in tensors.items()}


# --- conversions ---


def conversion(
    policy: Policy,
    base: Json | None = None,
    arrange: Arrange = as_they_are,
    rename: Rename = nested,
    config: Spelling = as_published,
    vision: bool = False,
    *,
    source: Source,
) -> Checkpoint:
    return mlx(policy, base, arrange, rename, config, vision, source=m31(source))


def keeping_the_experts(drafts: Weights | None = None, *, source: Source) -> Checkpoint:
    """NVFP4 experts with tensor scales, 8-bit head and embedding, the router float32, the rest MXFP8."""
    source = m31(source)
    eight: Policy = as_converted(MXFP8, None, embed_tokens=affine(8), lm_head=affine(8))
    policy: Policy = lambda module: None if ".switch_mlp." in module else eight(module)
    made = mlx(policy, MXFP8, vision=True, source=source)
    for name in [n for n in source.parameters if STACK in n]:
        module = nested(name.removesuffix(".weight"))
        encoded = [nvfp4_compressed_tensors(one, mx.abs(one).max()) for one in source.parameters[name]]
        del made.tensors[nested(name)]
        made.tensors |= {
            f"{module}.weight": mx.stack([e["weight_packed"] for e, _ in encoded]).view(mx.uint32),
            f"{module}.scales": mx.stack([e["weight_scale"] for e, _ in encoded]),
            # MLX's is the largest value that can be expressed.
            f"{module}.global_scale": 2688 / mx.concatenate([e["weight_global_scale"] for e, _ in encoded]),
        }
        made.values[name] = mx.stack([values for _, values in encoded])
        made.config["quantization"][module] = NVFP4 | {"global_scale": True}
    made.tensors |= drafts or {}
    return made


keeping_the_experts_and_a_draft = partial(
    keeping_the_experts, draft_tensors("language_model.model.dspark.") | draft_tensors("mtp.")
)
