# Long because: it is a table, one entry for each kind of checkpoint.
"""Every MiniMax-M3 checkpoint layout in circulation, made from one model.

``LAYOUTS[name].write(directory, source)`` writes the checkpoint and returns the float32 parameters that it
stands for, in the names of :class:`.source.Source`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx

from . import arrange, circulating, experts, formats, integers, m31
from .arrange import as_they_are, model_around, model_language_model, text_only
from .experts import CT_MXFP4, CT_MXFP8, CT_NVFP4, compressed_tensors, other_experts, two_to_a_byte
from .formats import (
    MXFP4,
    MXFP8,
    NVFP4,
    Checkpoint,
    affine,
    all_float,
    as_converted,
    mlx,
    plain,
)
from .source import Source, Weights, flat, respelled, respelled_flat, with_text_config


@dataclass(frozen=True)
class Layout:
    """One kind of checkpoint.

    Attributes:
        title: a line for a table.
        where: who publishes it.
        make: the checkpoint, in memory, of its ``source=``.
        offender: of a checkpoint to be refused, what the error has to mention (for tests).
    """

    name: str
    title: str
    where: str
    make: Callable[..., Checkpoint]
    has_indexer: bool = True
    has_vision: bool = True
    offender: str = ""

    def write(self, directory: Path, source: Source) -> Weights:
        return self.make(source=source).write(directory, source.files)


text = partial(Layout, has_vision=False)
# With text layers only and no indexer, as early branches of mlx-lm converted.
dense_text = partial(Layout, has_indexer=False, has_vision=False)

HUB = "MiniMaxAI/MiniMax-M3"
MLX_LM, MLX_VLM = "mlx_lm.convert", "mlx_vlm.convert"
OUTER = "re-saved under an outer model"
FOUR_BITS, SIX_BITS, EIGHT_BITS = (as_converted(affine(bits), affine(8)) for bits in (4, 6, 8))
SHARED_8 = as_converted(affine(4), affine(8), shared_experts=affine(8))
FUSED_129 = arrange.fused_shared_as_last_expert
unfused_4 = partial(mlx, FOUR_BITS)
fused_4 = partial(mlx, FOUR_BITS, arrange=FUSED_129, vision=True)
# In these modes MLX makes bfloat16 of an embedding, and then of all that follows.
float_embeddings = partial(as_converted, router=affine(8), embed_tokens=None)


def _index_and_first_attention(module: str) -> bool:
    return formats.is_index_projection(module) or module.startswith("model.layers.0.self_attn")


_PUBLISHED = (
    Layout("published_float", "published, unquantized", HUB, plain),
    Layout(
        "published_float_respelled",
        "published names, config of transformers 5",
        "save_pretrained of transformers 5",
        partial(plain, config=respelled),
    ),
    Layout(
        "published_dense_under_moe",
        "published, dense MLP under block_sparse_moe",
        "some exports",
        partial(plain, arrange.dense_under_block_sparse_moe),
    ),
    Layout(
        "published_with_mtp",
        "published, with multi-token-prediction tensors",
        "training checkpoints",
        partial(plain, extra=formats.mtp_tensors()),
    ),
    Layout(
        "published_model_around",
        "published under model., as model.language_model.model.layers",
        OUTER,
        partial(plain, rename=model_around),
    ),
    Layout(
        "published_model_language_model",
        "published under model., as model.language_model.layers, lm_head on top",
        OUTER,
        partial(plain, rename=model_language_model),
    ),
    Layout(
        "published_model_language_model_head",
        "published under model., as model.language_model.layers and .lm_head",
        OUTER,
        partial(plain, rename=arrange.model_language_model_and_head),
    ),
    Layout(
        "transformers_in_memory",
        "transformers' own modules, gate and up fused",
        "state_dict of transformers 5",
        partial(plain, arrange.in_memory, arrange.in_memory_names, respelled),
    ),
    text(
        "transformers_in_memory_text_only",
        "transformers' own modules, text only",
        "state_dict of transformers 5",
        partial(plain, arrange.in_memory, text_only, respelled_flat, vision=False),
    ),
    text(
        "published_text_only",
        "published experts, text only, flat config",
        "extractions as minimax_m3",
        partial(plain, rename=text_only, config=flat, vision=False),
    ),
    text(
        "published_text_only_text_config",
        "published experts, text only, config with text_config",
        "extractions as minimax_m3",
        partial(plain, rename=text_only, config=with_text_config, vision=False),
    ),
)

_LOW_PRECISION = (
    Layout("mxfp8_official", "MXFP8", "MiniMaxAI/MiniMax-M3-MXFP8", formats.mxfp8),
    Layout(
        "mxfp8_more_ignored",
        "MXFP8, index projections and one attention layer in float",
        "own quantizations",
        partial(formats.mxfp8, _index_and_first_attention),
    ),
    Layout(
        "nvfp4_modelopt_mixed",
        "ModelOpt NVFP4 experts, the rest MXFP8",
        "nvidia/MiniMax-M3-NVFP4",
        experts.modelopt_mixed,
    ),
    Layout(
        "mxfp4_compressed_tensors",
        "compressed-tensors MXFP4 experts, the rest MXFP8 as published",
        "olka-fi/MiniMax-M3-MXFP4",
        partial(other_experts, two_to_a_byte(MXFP4, "weight_packed"), compressed_tensors(CT_MXFP4)),
    ),
    Layout(
        "mxfp4_mxfp8_compressed_tensors",
        "compressed-tensors MXFP4 experts, the rest MXFP8 by compressed-tensors",
        "llm-compressor",
        partial(
            other_experts,
            two_to_a_byte(MXFP4, "weight_packed"),
            compressed_tensors(CT_MXFP4, CT_MXFP8),
            rest_scale="weight_scale",
        ),
    ),
    Layout(
        "mxfp4_quark",
        "Quark MXFP4 experts, the rest float",
        "amd/MiniMax-M3-MXFP4",
        partial(other_experts, two_to_a_byte(MXFP4, "weight"), experts.QUARK, all_float),
    ),
    Layout(
        "nvfp4_compressed_tensors",
        "compressed-tensors NVFP4 experts, the rest float",
        "llm-compressor",
        partial(
            other_experts,
            experts.nvfp4_compressed_tensors,
            compressed_tensors(CT_NVFP4),
            all_float,
            float8_scales=True,
        ),
    ),
    Layout(
        "nvfp4_everywhere_compressed_tensors",
        "compressed-tensors NVFP4 everywhere, a tensor scale for each matrix",
        "llm-compressor",
        partial(
            experts.nvfp4_everywhere,
            experts.nvfp4_compressed_tensors,
            compressed_tensors(experts.CT_NVFP4_LINEAR),
        ),
    ),
)


def _packed_integers(
    make: Callable[[mx.array, int], tuple[Weights, mx.array]], bits: int
) -> Callable[..., Checkpoint]:
    group = {"num_bits": bits, "type": "int", "group_size": 32}
    return partial(
        other_experts,
        lambda array, _: make(array, bits),
        compressed_tensors(("pack-quantized", "Linear", group)),
        all_float,
    )


_INTEGERS = (
    Layout(
        "int4_compressed_tensors",
        "compressed-tensors 4-bit integers for experts, the rest float",
        "cyankiwi/MiniMax-M3-AWQ-INT4",
        _packed_integers(integers.integers, 4),
    ),
    Layout(
        "int4_compressed_tensors_zero_points",
        "the same with zero points",
        "llm-compressor",
        _packed_integers(integers.with_zero_points, 4),
    ),
    Layout(
        "int8_compressed_tensors",
        "compressed-tensors 8-bit integers for experts, the rest float",
        "llm-compressor",
        _packed_integers(integers.integers, 8),
    ),
)

_MLX_UNFUSED = (
    text("mlx_unfused_float", "MLX, unquantized", MLX_LM, partial(plain, as_they_are, vision=False)),
    text("mlx_unfused_4bit", "MLX 4-bit", MLX_LM, unfused_4),
    Layout(
        "mlx_unfused_4bit_vision",
        "MLX 4-bit, with the vision tower",
        "mlx-community/MiniMax-M3-4bit of June",
        partial(unfused_4, vision=True),
    ),
    text(
        "mlx_unfused_6bit", "MLX 6-bit", MLX_LM, partial(mlx, as_converted(affine(6), affine(8)), affine(6))
    ),
    text(
        "mlx_unfused_8bit", "MLX 8-bit", MLX_LM, partial(mlx, as_converted(affine(8), affine(8)), affine(8))
    ),
    text("mlx_unfused_mxfp4", "MLX mxfp4", MLX_LM, partial(mlx, float_embeddings(MXFP4), MXFP4)),
    text("mlx_unfused_mxfp8", "MLX mxfp8", MLX_LM, partial(mlx, float_embeddings(MXFP8), MXFP8)),
    text("mlx_unfused_nvfp4", "MLX nvfp4", MLX_LM, partial(mlx, float_embeddings(NVFP4), NVFP4)),
    text(
        "mlx_unfused_nvfp4_tensor_scales",
        "MLX nvfp4, a global_scale for each expert",
        MLX_LM,
        partial(formats.nvfp4_with_tensor_scales, float_embeddings(NVFP4)),
    ),
    Layout(
        "mlx_config_i",
        "MLX 2/3-bit experts, 4-bit attention, 8-bit ends, indexer in bfloat16",
        "thetom-ai/MiniMax-M3-ConfigI-MLX",
        partial(mlx, formats.config_i, vision=True, name_floats=True),
    ),
    text(
        "mlx_router_float32",
        "MLX 4-bit, router in float32",
        "own conversions",
        partial(mlx, as_converted(affine(4), None)),
    ),
    text(
        "mlx_router_float16",
        "MLX 4-bit, router in float16",
        "own conversions",
        partial(mlx, as_converted(affine(4), mx.float16)),
    ),
    text(
        "mlx_indexer_bfloat16",
        "MLX 4-bit, indexer in bfloat16",
        "own conversions",
        partial(mlx, as_converted(affine(4), affine(8), index_=mx.bfloat16)),
    ),
    Layout(
        "mlx_shared_8bit_unpacked",
        "MLX 4-bit, shared expert 8-bit, pack_shared_expert false",
        "oMLX oQ",
        partial(mlx, SHARED_8, vision=True, pack_shared_expert=False),
    ),
    Layout(
        "mlx_shared_8bit",
        "MLX 4-bit, shared expert 8-bit, without the flag",
        "mixes made by hand",
        partial(mlx, SHARED_8, vision=True),
    ),
    text(
        "mlx_no_indexer",
        "MLX 4-bit without indexer",
        "early branches of mlx-lm",
        partial(unfused_4, indexer=False),
        has_indexer=False,
    ),
    text("mlx_model_around_4bit", "MLX 4-bit under model.", OUTER, partial(unfused_4, rename=model_around)),
    text(
        "mlx_model_language_model_4bit",
        "MLX 4-bit as model.language_model.layers",
        OUTER,
        partial(unfused_4, rename=model_language_model),
    ),
    text(
        "mlx_text_only_4bit",
        "MLX 4-bit, text only, flat config",
        "conversions of minimax_m3",
        partial(unfused_4, rename=text_only, config=flat),
    ),
    text(
        "mlx_text_only_4bit_text_config",
        "MLX 4-bit, text only, config with text_config",
        "conversions of minimax_m3",
        partial(unfused_4, rename=text_only, config=with_text_config),
    ),
    dense_text(
        "mlx_text_only_no_indexer_4bit",
        "MLX 4-bit, text only, without indexer",
        "pipenetwork/MiniMax-M3-MLX-4bit",
        partial(mlx, as_converted(affine(4), affine(4)), rename=text_only, config=flat, indexer=False),
    ),
    dense_text(
        "mlx_text_only_no_indexer_mixed_3_6",
        "MLX 3/6-bit, text only, without indexer",
        "pipenetwork/MiniMax-M3-MLX-mixed-3_6",
        partial(mlx, formats.mixed_3_6, affine(3), rename=text_only, config=flat, indexer=False),
    ),
)

_MLX_FUSED = (
    Layout("mlx_fused_129_float", "MLX fused 129, unquantized", MLX_VLM, partial(plain, FUSED_129)),
    Layout("mlx_fused_129_4bit", "MLX fused 129, 4-bit", "mlx-community/MiniMax-M3-4bit", fused_4),
    Layout(
        "mlx_fused_129_4bit_packed_flag",
        "MLX fused 129, 4-bit, pack_shared_expert true",
        MLX_VLM,
        partial(fused_4, pack_shared_expert=True),
    ),
    Layout(
        "mlx_fused_129_oq4",
        "MLX fused 129, 4/5/8-bit by module",
        "unigilby/MiniMax-M3-oQ4",
        partial(mlx, formats.oq4, arrange=FUSED_129, vision=True),
    ),
    Layout(
        "mlx_fused_129_model_around_4bit",
        "MLX fused 129, 4-bit, under model.",
        OUTER,
        partial(fused_4, rename=model_around),
    ),
    Layout(
        "mlx_fused_129_model_language_model_4bit",
        "MLX fused 129, 4-bit, as model.language_model.layers",
        OUTER,
        partial(fused_4, rename=model_language_model),
    ),
    text(
        "mlx_unfused_129_4bit",
        "MLX 4-bit, 129 rows, gate and up apart",
        "own conversions",
        partial(unfused_4, arrange=arrange.shared_as_last_expert),
    ),
    text(
        "mlx_fused_128_4bit",
        "MLX fused 128, 4-bit, shared expert apart and fused",
        "own conversions",
        partial(unfused_4, arrange=arrange.fused),
    ),
    text(
        "mlx_fused_128_4bit_shared_unfused",
        "MLX fused 128, 4-bit, shared expert apart and unfused",
        "own conversions",
        partial(unfused_4, arrange=arrange.fused_experts_only),
    ),
)

M31 = "MiniMaxAI/MiniMax-M3.1-Flash"
# Published as NVFP4 experts with a tensor scale each, the rest MXFP8.
_M31 = (
    Layout("m31_published", "M3.1: NVFP4 experts, the rest MXFP8, draft in dspark/", M31, m31.published),
    text(
        "m31_published_text_only",
        "M3.1 as published, text only, flat config",
        "extractions as minimax_m3",
        partial(m31.published_text_only, flat),
    ),
    Layout(
        "m31_oq_keeping_nvfp4",
        "M3.1: MLX, NVFP4 experts bit for bit, 8-bit ends, the rest MXFP8",
        "oMLX oQ of MiniMax-M3.1-Flash",
        m31.keeping_the_experts,
    ),
    Layout(
        "m31_oq_keeping_nvfp4_draft",
        "the same with draft tensors in the shards",
        "kszlachcikowski/MiniMax-M3.1-Flash-oQ4e",
        m31.keeping_the_experts_and_a_draft,
    ),
    text(
        "m31_mlx_4bit",
        "M3.1: MLX 4-bit",
        "mlx-community/MiniMax-M3.1-Flash-Text-4bit",
        partial(m31.conversion, FOUR_BITS),
    ),
    Layout(
        "m31_mlx_fused_129_4bit",
        "M3.1: MLX fused 129, 4-bit",
        MLX_VLM,
        partial(m31.conversion, FOUR_BITS, arrange=FUSED_129, vision=True),
    ),
)

_CIRCULATING = (
    Layout(
        "published_pruned",
        "published, the first layers; lists for all layers in the config",
        "ubicloud/MiniMax-M3-MXFP8-Pruned",
        circulating.pruned,
    ),
    Layout(
        "published_expert_projections",
        "published, experts.N.gate_proj in place of w1",
        "exports by other tools",
        circulating.experts_by_projection,
    ),
    Layout(
        "published_doubled_prefix",
        "published, as language_model.language_model.model.layers",
        OUTER,
        partial(plain, rename=circulating.doubled_prefix),
    ),
    Layout(
        "published_in_a_folder",
        "published, shards in a folder that the index names",
        "own uploads",
        partial(plain, folder="shards"),
    ),
    Layout(
        "published_flat_vl",
        "published, flat config as minimax_m3_vl",
        "exports by other tools",
        partial(plain, config=circulating.flat_with_vision_type),
    ),
    Layout(
        "published_sparse_tokens",
        "published, initial and local blocks given in tokens",
        "SGLang's spelling",
        circulating.sparse_tokens,
    ),
    Layout(
        "mxfp8_with_extras",
        "MXFP8 with rotary frequencies and scales of an FP8 KV cache",
        "exports by other tools",
        circulating.with_extras,
    ),
    Layout(
        "nvfp4_modelopt_shared_experts",
        "ModelOpt NVFP4 for routed and shared experts, the rest float",
        "lukealonso/MiniMax-M3-NVFP4",
        circulating.nvfp4_shared_experts,
    ),
    Layout(
        "nvfp4_modelopt_fused_down",
        "ModelOpt NVFP4 experts; dense and shared MLPs with down NVFP4, gate and up fused in float",
        "brandonmusic/MiniMax-M3-NVFP4",
        partial(circulating.fused_mlps, "down_proj"),
    ),
    Layout(
        "nvfp4_modelopt_fused_gate_up",
        "the same with gate and up fused in NVFP4, down float",
        "own quantizations",
        partial(circulating.fused_mlps, "gate_up_proj"),
    ),
)

LAYOUTS = {
    layout.name: layout
    for layout in (
        *_PUBLISHED,
        *_LOW_PRECISION,
        *_INTEGERS,
        *_MLX_UNFUSED,
        *_MLX_FUSED,
        *_M31,
        *_CIRCULATING,
    )
}
