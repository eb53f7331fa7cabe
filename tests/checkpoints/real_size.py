"""MiniMax-M3 checkpoints of the real size that take next to no disk.

Every name, shape, dtype and byte offset is there; the data itself is a hole in a sparse file
and reads as zeros.  What remains on disk are the safetensors headers and the index: about
12 MB for the 45,838 tensors of MXFP8, under 1 MB where experts are stacked.  The file system
must know sparse files (APFS, ext4, XFS, tmpfs do).
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

Config = dict[str, Any]
# Module path -> bits of its weight, or None for a weight that stays as it is.
Bits = Callable[[str], int | None]

N_LAYERS, N_DENSE, N_EXPERTS = 60, 3, 128
HIDDEN, EXPERT_WIDTH, DENSE_WIDTH, VOCAB = 6144, 3072, 12288, 200064
HEAD, QUERY_WIDTH, KEY_WIDTH, INDEX_QUERY_WIDTH = 128, 64 * 128, 4 * 128, 4 * 128
N_VISION_LAYERS, VISION_HIDDEN, VISION_WIDTH = 32, 1280, 5120

TEXT = "language_model."
GROUP, MXFP8_GROUP, NVFP4_GROUP = 64, 32, 16
MARKOV_RANK = 256
# What mlx-lm and mlx-vlm cut conversions into.
MLX_SHARD_BYTES = 5 << 30

_BYTES = {"F32": 4, "U32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}


@dataclass(frozen=True)
class RealCheckpoint:
    """What was written.

    Attributes:
        tensors: stored tensors; a quantized weight is three of them (two in MXFP8).
        parameters: numbers in the model, before any quantization.
        bytes: of tensor data, as if none of it were a hole.
    """

    path: Path
    tensors: int
    parameters: int
    bytes: int


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def bytes(self) -> int:
        return prod(self.shape) * _BYTES[self.dtype]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def may_be_quantized(self) -> bool:
        """Matrices of the text model.  No known conversion quantizes the vision part."""
        return len(self.shape) > 1 and not self.name.startswith(("vision_", "multi_modal_", "patch_merge_"))


# --- the parameters, before quantization ---


def _gated_mlp(
    base: str, width: int, *rows: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> list[Tensor]:
    gate, up, down = (f"{base}.{name}.weight" for name in names)
    into = (*rows, width, HIDDEN)
    return [Tensor(gate, into), Tensor(up, into), Tensor(down, (*rows, HIDDEN, width))]


def experts_one_by_one(moe: str) -> list[Tensor]:
    experts: list[Tensor] = []
    for expert in range(N_EXPERTS):
        experts += _gated_mlp(f"{moe}.experts.{expert}", EXPERT_WIDTH, names=("w1", "w3", "w2"))
    return experts + _gated_mlp(f"{moe}.shared_experts", EXPERT_WIDTH)


def experts_stacked(moe: str) -> list[Tensor]:
    routed = _gated_mlp(f"{moe}.switch_mlp", EXPERT_WIDTH, N_EXPERTS)
    return routed + _gated_mlp(f"{moe}.shared_experts", EXPERT_WIDTH)


def experts_fused_with_shared(moe: str) -> list[Tensor]:
    rows = N_EXPERTS + 1
    return [
        Tensor(f"{moe}.switch_mlp.gate_up_proj.weight", (rows, 2 * EXPERT_WIDTH, HIDDEN)),
        Tensor(f"{moe}.switch_mlp.down_proj.weight", (rows, HIDDEN, EXPERT_WIDTH)),
    ]


# Path of a layer's mixture of experts -> the experts' tensors.
Arrangement = Callable[[str], list[Tensor]]


def _attention(base: str) -> list[Tensor]:
    return [
        Tensor(f"{base}.q_proj.weight", (QUERY_WIDTH, HIDDEN)),
        Tensor(f"{base}.k_proj.weight", (KEY_WIDTH, HIDDEN)),
        Tensor(f"{base}.v_proj.weight", (KEY_WIDTH, HIDDEN)),
        Tensor(f"{base}.o_proj.weight", (HIDDEN, QUERY_WIDTH)),
        Tensor(f"{base}.q_norm.weight", (HEAD,)),
        Tensor(f"{base}.k_norm.weight", (HEAD,)),
    ]


def _indexer(base: str) -> list[Tensor]:
    return [
        Tensor(f"{base}.index_q_proj.weight", (INDEX_QUERY_WIDTH, HIDDEN)),
        Tensor(f"{base}.index_k_proj.weight", (HEAD, HIDDEN)),
        Tensor(f"{base}.index_q_norm.weight", (HEAD,)),
        Tensor(f"{base}.index_k_norm.weight", (HEAD,)),
    ]


def text_model(
    experts: Arrangement,
    prefix: str = TEXT,
    indexer: bool = True,
    router_dtype: str = "F32",
    first_indexed: int = N_DENSE,
) -> list[Tensor]:
    """All parameters of the text model, with the experts in the arrangement asked for."""
    tensors = [Tensor(f"{prefix}model.embed_tokens.weight", (VOCAB, HIDDEN))]
    for layer in range(N_LAYERS):
        base = f"{prefix}model.layers.{layer}"
        tensors += _attention(f"{base}.self_attn")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.append(Tensor(f"{base}.{norm}.weight", (HIDDEN,)))
        if indexer and layer >= first_indexed:
            tensors += _indexer(f"{base}.self_attn")
        if layer < N_DENSE:
            tensors += _gated_mlp(f"{base}.mlp", DENSE_WIDTH)
            continue
        moe = f"{base}.block_sparse_moe"
        tensors.append(Tensor(f"{moe}.gate.weight", (N_EXPERTS, HIDDEN), router_dtype))
        tensors.append(Tensor(f"{moe}.e_score_correction_bias", (N_EXPERTS,), "F32"))
        tensors += experts(moe)
    tensors.append(Tensor(f"{prefix}model.norm.weight", (HIDDEN,)))
    tensors.append(Tensor(f"{prefix}lm_head.weight", (VOCAB, HIDDEN)))
    return tensors


def _with_bias(module: str, *shape: int) -> list[Tensor]:
    return [Tensor(f"{module}.weight", shape), Tensor(f"{module}.bias", shape[:1])]


def vision_model(patch_embedding_dtype: str = "BF16") -> list[Tensor]:
    """In MLX conversions too the patch embedding has this shape: mlx-vlm does not convolve."""
    tower = "vision_tower.vision_model"
    patches = f"{tower}.embeddings.patch_embedding.weight"
    tensors = [Tensor(patches, (VISION_HIDDEN, 3, 2, 14, 14), patch_embedding_dtype)]
    tensors += _with_bias(f"{tower}.pre_layrnorm", VISION_HIDDEN)
    for layer in range(N_VISION_LAYERS):
        base = f"{tower}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            tensors += _with_bias(f"{base}.{norm}", VISION_HIDDEN)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors += _with_bias(f"{base}.self_attn.{projection}", VISION_HIDDEN, VISION_HIDDEN)
        tensors += _with_bias(f"{base}.mlp.fc1", VISION_WIDTH, VISION_HIDDEN)
        tensors += _with_bias(f"{base}.mlp.fc2", VISION_HIDDEN, VISION_WIDTH)
    for base, inputs in (("multi_modal_projector", VISION_HIDDEN), ("patch_merge_mlp", 2 * 2 * HIDDEN)):
        tensors += _with_bias(f"{base}.linear_1", HIDDEN, inputs)
        tensors += _with_bias(f"{base}.linear_2", HIDDEN, HIDDEN)
    return tensors


# --- quantization ---


def _affine(tensor: Tensor, bits: int) -> list[Tensor]:
    *rows, inputs = tensor.shape
    groups = (*rows, inputs // GROUP)
    return [
        Tensor(f"{tensor.module}.weight", (*rows, inputs * bits // 32), "U32"),
        Tensor(f"{tensor.module}.scales", groups),
        Tensor(f"{tensor.module}.biases", groups),
    ]


def in_mxfp8(parameters: list[Tensor]) -> Iterator[Tensor]:
    """As MiniMax publishes it: all matrices but router, embeddings and head."""
    for tensor in parameters:
        cut = tensor.may_be_quantized and not tensor.module.endswith((".gate", "embed_tokens", "lm_head"))
        yield tensor._replace(dtype="F8_E4M3") if cut else tensor
        if cut:
            *rows, inputs = tensor.shape
            yield Tensor(f"{tensor.module}.weight_scale_inv", (*rows, inputs // MXFP8_GROUP), "U8")


def in_nvfp4_and_mxfp8(parameters: list[Tensor]) -> Iterator[Tensor]:
    """As M3.1 is published: routed experts in compressed-tensors' NVFP4, the rest as in :func:`in_mxfp8`."""
    experts = [tensor for tensor in parameters if ".experts." in tensor.name]
    for module, (rows, inputs) in ((tensor.module, tensor.shape) for tensor in experts):
        yield Tensor(f"{module}.weight_packed", (rows, inputs // 2), "U8")
        yield Tensor(f"{module}.weight_scale", (rows, inputs // NVFP4_GROUP), "F8_E4M3")
        yield Tensor(f"{module}.weight_global_scale", (1,), "F32")
    yield from in_mxfp8([tensor for tensor in parameters if ".experts." not in tensor.name])


def _is_router(module: str) -> bool:
    return module.endswith(".gate")


def _layer_of(module: str) -> int:
    """-1 outside the layers."""
    _, found, rest = module.partition("model.layers.")
    return int(rest.partition(".")[0]) if found else -1


def uniform_bits(bits: int, *, shared_expert: int | None = None) -> Bits:
    """One width for all, 8 bits for the router, maybe another one for the shared expert."""

    def bits_of(module: str) -> int | None:
        if _is_router(module):
            return 8
        return shared_expert if shared_expert and ".shared_experts." in module else bits

    return bits_of


def oq4_bits(module: str) -> int | None:
    """A mix by oQ's rules that comes to the 4.59 bits per weight of unigilby's oQ4.

    The public notes give the rules, not the map.  Kept from them: the router is not quantized,
    lm_head and embeddings get 8 bits, routed experts (and the shared one fused with them) the
    base 4, everything else 8 or 5 by position, with the index projections treated as any others.
    """
    if _is_router(module):
        return None
    if "switch_mlp" in module:
        return 4
    return 5 if 14 <= _layer_of(module) < 46 else 8


def config_i_bits(module: str) -> int | None:
    """thetom-ai's policy.  Nothing is known of the shared expert; here it is cut as the routed ones."""
    if _is_router(module) or ".index_" in module:
        return None
    if not 2 <= _layer_of(module) < N_LAYERS - 2:
        return 8
    if ".self_attn." in module:
        return 4
    return 3 if module.endswith(".down_proj") else 2


def quantize(tensors: list[Tensor], bits_of: Bits, default_bits: int) -> tuple[list[Tensor], Config]:
    """The stored tensors, and what the config says of them: what differs from the default, by stored name."""
    stored: list[Tensor] = []
    entry: Config = {"group_size": GROUP, "bits": default_bits, "mode": "affine"}
    for tensor in tensors:
        bits = bits_of(tensor.module) if tensor.may_be_quantized else None
        stored += [tensor] if bits is None else _affine(tensor, bits)
        if bits not in (None, default_bits):
            entry[tensor.module] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
    # Converters write the entry twice.
    return stored, {"quantization": entry, "quantization_config": entry}


# --- configs, in the published spelling ---

_ONLY_SPARSE_LAYERS = [0] * N_DENSE + [1] * (N_LAYERS - N_DENSE)
_IMAGE_SIDES = range(336, 2017, 336)

# fmt: off
_PATCH_MERGE = {
    "image_token_compression_method": "patch_merge", "spatial_merge_size": 2, "temporal_patch_size": 2,
}
SPARSE_ATTENTION_CONFIG: Config = {
    "use_sparse_attention": True, "sparse_attention_freq": _ONLY_SPARSE_LAYERS, "sparse_num_index_heads": 4,
    "sparse_index_dim": HEAD, "sparse_block_size": 128, "sparse_topk_blocks": 16, "sparse_init_block": 0,
    "sparse_local_block": 1, "sparse_score_type": "max", "sparse_disable_index_value": _ONLY_SPARSE_LAYERS,
}
TEXT_CONFIG: Config = {
    "architectures": ["MiniMaxM3SparseForCausalLM"], "dtype": "bfloat16", "hidden_size": HIDDEN,
    "num_hidden_layers": N_LAYERS, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": HEAD,
    "intermediate_size": EXPERT_WIDTH, "dense_intermediate_size": DENSE_WIDTH,
    "shared_intermediate_size": EXPERT_WIDTH, "vocab_size": VOCAB, "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-6, "use_gemma_norm": True, "attention_output_gate": False, "rope_theta": 5000000,
    "rotary_dim": 64, "partial_rotary_factor": 0.5, "hidden_act": "swigluoai", "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0, "num_local_experts": N_EXPERTS, "num_experts_per_tok": 4, "n_shared_experts": 1,
    "scoring_func": "sigmoid", "use_routing_bias": True, "routed_scaling_factor": 2.0,
    "moe_layer_freq": _ONLY_SPARSE_LAYERS, "use_qk_norm": True, "qk_norm_type": "per_head",
    "tie_word_embeddings": False, "num_mtp_modules": 7, "num_nextn_predict_layers": 1,
    "sparse_attention_config": SPARSE_ATTENTION_CONFIG,
}
VISION_CONFIG: Config = {
    "model_type": "clip_vision_model", "hidden_size": VISION_HIDDEN, "intermediate_size": VISION_WIDTH,
    "num_hidden_layers": N_VISION_LAYERS, "num_attention_heads": 16, "num_channels": 3, "patch_size": 14,
    "image_size": 2016, "projection_dim": HIDDEN, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0, "initializer_factor": 1.0, "initializer_range": 0.02, "vocab_size": 32000,
    "position_embedding_type": "rope", "rope_mode": "3d", "rope_theta": 10000.0,
    "img_token_compression_config": _PATCH_MERGE, "vision_segment_max_frames": 4,
}
CONFIG: Config = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"], "model_type": "minimax_m3_vl",
    "auto_map": {"AutoConfig": "configuration_minimax_m3_vl.MiniMaxM3VLConfig"},
    "torch_dtype": "bfloat16", "transformers_version": "4.52.4",
    "image_token_index": 200025, "video_token_index": 200026, "image_seq_length": 576,
    # A string in the published file too.
    "image_grid_pinpoints": str([[height, width] for height in _IMAGE_SIDES for width in _IMAGE_SIDES]),
    "process_image_mode": "dynamic_res", "img_token_compression_config": _PATCH_MERGE,
    "multimodal_projector_bias": True, "projector_hidden_act": "gelu", "projector_hidden_size": HIDDEN,
    "vision_feature_layer": -1, "vision_feature_select_strategy": "full", "num_reward_heads": 0,
    "text_config": TEXT_CONFIG, "vision_config": VISION_CONFIG,
}
MXFP8_CONFIG: Config = {
    **CONFIG,
    "text_config": {**TEXT_CONFIG, "num_mtp_modules": 1},
    "quantization_config": {
        "quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, MXFP8_GROUP],
        "ignored_layers": [
            "lm_head", "model.embed_tokens", "vision_tower", "multi_modal_projector", "patch_merge_mlp",
            *(f"{TEXT}model.layers.{layer}.block_sparse_moe.gate" for layer in range(N_DENSE, N_LAYERS)),
        ],
    },
}
# fmt: on
del MXFP8_CONFIG["text_config"]["num_nextn_predict_layers"]
M31_CONFIG: Config = {
    **CONFIG,
    "text_config": {
        **MXFP8_CONFIG["text_config"],
        "sparse_attention_config": SPARSE_ATTENTION_CONFIG
        | {
            "sparse_attention_freq": [1] * N_LAYERS,
            "sparse_disable_index_value": [1] * N_LAYERS,
            "sparse_init_block": 1,
        },
    },
    "quantization_config": MXFP8_CONFIG["quantization_config"]
    | {"moe_quant_algo": "NVFP4", "moe_quant_format": "nvfp4-pack-quantized"},
}
DSPARK_CONFIG: Config = {
    "architectures": ["DSparkMiniMaxDraftModel"],
    "text_config": {
        "num_hidden_layers": 5,
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": HEAD,
        "dense_intermediate_size": DENSE_WIDTH,
        "sliding_window": 4096,
        "dspark_block_size": 7,
        "dspark_target_layer_ids": [3, 17, 31, 45, 59],
        "dspark_markov_rank": MARKOV_RANK,
        "enable_confidence_head": True,
    },
    "quantization_config": {"quant_method": "mxfp8", "weight_block_size": [1, 32]},
}
# Flat, and sparse layers still announced, though the extraction left their indexers out.
TEXT_ONLY_CONFIG: Config = {**TEXT_CONFIG, "model_type": "minimax_m3"}


# --- files ---


def _write_sparse_shard(path: Path, tensors: list[Tensor]) -> None:
    header: Config = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format asks for data that starts at a multiple of 8.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _cut(tensors: list[Tensor], n_shards: int) -> list[list[Tensor]]:
    """Consecutive shards of about equal bytes."""
    total, before = sum(t.bytes for t in tensors), 0
    shards: list[list[Tensor]] = [[] for _ in range(n_shards)]
    for tensor in tensors:
        shards[before * n_shards // total].append(tensor)
        before += tensor.bytes
    return shards


def write_sparse(
    path: Path, parameters: list[Tensor], stored: list[Tensor], config: Config, n_shards: int | None = None
) -> RealCheckpoint:
    path.mkdir(parents=True, exist_ok=True)
    n_bytes, n_parameters = sum(t.bytes for t in stored), sum(prod(t.shape) for t in parameters)
    n_shards = n_shards or -(-n_bytes // MLX_SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_cut(stored, n_shards), 1):
        name = f"model-{number:05d}-of-{n_shards:05d}.safetensors"
        _write_sparse_shard(path / name, tensors)
        weight_map.update(dict.fromkeys((t.name for t in tensors), name))
    metadata = {"total_size": n_bytes, "total_parameters": n_parameters}
    index = json.dumps({"metadata": metadata, "weight_map": weight_map}, separators=(",", ":"))
    (path / "model.safetensors.index.json").write_text(index)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text('{"bos_token_id": 200019, "eos_token_id": 200020}')
    return RealCheckpoint(path, len(stored), n_parameters, n_bytes)


def write_published(path: Path) -> RealCheckpoint:
    parameters = text_model(experts_one_by_one) + vision_model("F32")
    return write_sparse(path, parameters, parameters, CONFIG, n_shards=59)


def write_mxfp8(path: Path) -> RealCheckpoint:
    parameters = text_model(experts_one_by_one) + vision_model("F32")
    return write_sparse(path, parameters, list(in_mxfp8(parameters)), MXFP8_CONFIG, n_shards=31)


def write_m31(path: Path) -> RealCheckpoint:
    parameters = text_model(experts_one_by_one, first_indexed=0) + vision_model("F32")
    return write_sparse(path, parameters, list(in_nvfp4_and_mxfp8(parameters)), M31_CONFIG, n_shards=48)


def write_dspark(path: Path) -> RealCheckpoint:
    """The draft head of M3.1, in the folder ``path``."""
    prefix = "language_model.model.dspark"
    tensors = [
        Tensor(f"{prefix}.fc.weight", (HIDDEN, 5 * HIDDEN)),
        Tensor(f"{prefix}.hidden_norm.weight", (HIDDEN,)),
        Tensor(f"{prefix}.final_norm.weight", (HIDDEN,)),
        *(Tensor(f"{prefix}.markov_head.markov_w{n}.weight", (VOCAB, MARKOV_RANK)) for n in (1, 2)),
        Tensor(f"{prefix}.confidence_head.proj.weight", (1, HIDDEN + MARKOV_RANK)),
        Tensor(f"{prefix}.confidence_head.proj.bias", (1,)),
    ]
    for layer in range(5):
        base = f"{prefix}.layers.{layer}.decoder_layer"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.append(Tensor(f"{base}.{norm}.weight", (HIDDEN,)))
        for tensor in _attention(f"{base}.self_attn") + _gated_mlp(f"{base}.mlp", DENSE_WIDTH):
            if len(tensor.shape) == 1:
                tensors.append(tensor)
                continue
            rows, inputs = tensor.shape
            tensors.append(tensor._replace(dtype="F8_E4M3"))
            tensors.append(Tensor(f"{tensor.name}_scale_inv", (rows, inputs // MXFP8_GROUP), "U8"))
    return write_sparse(path, [], tensors, DSPARK_CONFIG, n_shards=1)


def _mlx_writer(
    experts: Arrangement, bits_of: Bits, router_dtype: str = "F32", **text_config: Any
) -> Callable[[Path], RealCheckpoint]:
    def write(path: Path) -> RealCheckpoint:
        parameters = text_model(experts, router_dtype=router_dtype) + vision_model()
        stored, quantization = quantize(parameters, bits_of, default_bits=4)
        config = CONFIG | {"text_config": TEXT_CONFIG | text_config}
        return write_sparse(path, parameters, stored, config | quantization)

    return write


def write_text_only_6bit(path: Path) -> RealCheckpoint:
    parameters = text_model(experts_stacked, prefix="", indexer=False)
    stored, quantization = quantize(parameters, uniform_bits(6), default_bits=6)
    return write_sparse(path, parameters, stored, TEXT_ONLY_CONFIG | quantization)


REAL_LAYOUTS: dict[str, Callable[[Path], RealCheckpoint]] = {
    "published": write_published,
    "mxfp8": write_mxfp8,
    "m31": write_m31,
    "unfused_4bit": _mlx_writer(experts_stacked, uniform_bits(4)),
    "fused_4bit": _mlx_writer(experts_fused_with_shared, uniform_bits(4)),
    "oq4": _mlx_writer(experts_fused_with_shared, oq4_bits, "F16"),
    "config_i": _mlx_writer(experts_stacked, config_i_bits, "F16", pack_shared_expert=False),
    "mixed_shared": _mlx_writer(experts_stacked, uniform_bits(4, shared_expert=8), pack_shared_expert=False),
    "text_only_6bit": write_text_only_6bit,
}


@cache
def real(layout: str) -> RealCheckpoint:
    """One of :data:`REAL_LAYOUTS`, written once; not to be changed."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    return REAL_LAYOUTS[layout](directory / "checkpoint")
