"""One decoder layer of MiniMax-M3 at its real sizes, ours or stock's, with lazily made weights and caches.

4-bit matrices and experts in groups of 64, a float32 router, bf16 activations. Which class it is follows from
the process: with ``MLX_M3_PLUGIN=off`` both libraries serve their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import mlx.core as mx
from graph_cost import EXPERTS_PER_TOKEN, distinct

HIDDEN, HEADS, GROUPS, HEAD_DIM, BLOCK, TOPK = 6144, 64, 4, 128, 128, 16
BUDGET = BLOCK * TOPK
EXPERTS, EXPERT, DENSE = 128, 3072, 12288
KV_GROUP_SIZE = 64
# Tokens that row ``r`` of a padded batch is shorter than row 0.
PADDING_STEP = 37


@dataclass(frozen=True)
class Sizes:
    """M3's, which a smoke test makes smaller."""

    hidden: int = HIDDEN
    heads: int = HEADS
    groups: int = GROUPS
    experts: int = EXPERTS
    expert: int = EXPERT
    dense: int = DENSE
    quantized: bool = True


M3 = Sizes()


@dataclass(frozen=True)
class Case:
    """``queries`` new tokens after ``context`` tokens in the cache, in each of ``rows``.

    ``padded`` rows are in a batch cache with left padding, as a server's always are.
    """

    queries: int
    context: int
    rows: int = 1
    padded: bool = False
    kv_bits: int = 16
    layer: str = "sparse"

    def __str__(self) -> str:
        parts = [f"{self.queries:,} at {length_name(self.context)}"]
        rows = f"{self.rows} row{'s' * (self.rows > 1)}{' padded' * self.padded}"
        parts += [rows] if self.rows > 1 or self.padded else []
        parts += ["8-bit K/V"] if self.kv_bits == 8 else []
        parts += ["dense layer"] if self.layer == "dense" else []
        return ", ".join(parts)

    @property
    def drops_blocks(self) -> bool:
        return self.layer == "sparse" and self.context + self.queries > BUDGET


def length_name(length: int) -> str:
    if length >= 1 << 20:
        return f"{length >> 20}M"
    return f"{length // 1000}K" if length >= 1024 and length % 1024 == 0 else str(length)


@dataclass
class Layer:
    """A decoder layer of a library with what it needs to be called.

    Attributes:
        module: ``(x [B, L, hidden], mask, cache entry)`` -> ``[B, L, hidden]``.
        new_entry: ``(left paddings or None)`` -> an empty entry of the prompt cache.
        make_mask: ``(x, entry)`` -> what the model passes to each layer.
        fill: appends K, V and index keys (or None) to an entry.
    """

    module: Any
    new_entry: Callable[[list[int] | None], Any]
    make_mask: Callable[[mx.array, Any], Any]
    fill: Callable[[Any, mx.array, mx.array, mx.array | None], None]


def make_layers(
    host: str, kind: str, number: int, sizes: Sizes = M3, module: ModuleType | None = None
) -> list[Layer]:
    """``number`` layers of ``module`` or this process's M3 class in ``host``; no weight was evaluated."""
    import mlx.nn as nn

    module = module or import_module(f"{host}.models.minimax_m3_vl")
    arguments = module.ModelArgs if host == "mlx_lm" else module.ModelConfig
    model = module.Model(arguments.from_dict(config(kind, number, sizes)))
    model.set_dtype(mx.bfloat16)
    if sizes.quantized:
        nn.quantize(
            model,
            64,
            4,
            class_predicate=lambda path, m: hasattr(m, "to_quantized") and not path.endswith(".gate"),
        )
    for part in model.modules():
        if "e_score_correction_bias" in part:
            # As the checkpoints store the router.
            part.gate.weight = part.gate.weight.astype(mx.float32)
            part.e_score_correction_bias = part.e_score_correction_bias.astype(mx.float32)
    text = model if host == "mlx_lm" else model.language_model
    decoder = text.layers if host == "mlx_lm" else text.model.layers
    connect = connect_mlx_lm if host == "mlx_lm" else connect_mlx_vlm
    return [connect(layer, text.make_cache, kind == "sparse") for layer in decoder]


def connect_mlx_lm(layer: Any, make_cache: Callable[[], Any], sparse: bool) -> Layer:
    from mlx_lm.models.base import create_attention_mask
    from mlx_lm.models.cache import BatchKVCache, KVCache

    # Nothing reads them; a cache with a meta_state cannot be without.  until: mlx-lm 0.32
    value_width = 1 if hasattr(KVCache, "meta_state") else 0

    def new_entry(paddings: list[int] | None) -> Any:
        entry = make_cache()[0]
        return entry if paddings is None else type(entry)(*(BatchKVCache(paddings) for _ in entry.caches))

    def fill(entry: Any, keys: mx.array, values: mx.array, index_keys: mx.array | None) -> None:
        entry[0].update_and_fetch(keys, values)
        if index_keys is not None:
            entry[1].update_and_fetch(
                index_keys, mx.zeros((*index_keys.shape[:-1], value_width), index_keys.dtype)
            )

    return Layer(layer, new_entry, lambda x, entry: create_attention_mask(x, entry[0]), fill)


def connect_mlx_vlm(layer: Any, make_cache: Callable[[], Any], sparse: bool) -> Layer:
    language = import_module("mlx_vlm.models.minimax_m3_vl.language")
    from mlx_vlm.models.base import create_attention_mask

    def new_entry(paddings: list[int] | None) -> Any:
        if paddings is None:
            return make_cache()[0]
        return language.MiniMaxM3BatchKVCache(paddings) if sparse else language.BatchKVCache(paddings)

    def fill(entry: Any, keys: mx.array, values: mx.array, index_keys: mx.array | None) -> None:
        entry.update_and_fetch(keys, values)
        if index_keys is not None:
            entry.update_index_and_fetch(index_keys)

    def mask(x: mx.array, entry: Any) -> Any:
        skipped = getattr(entry, "can_skip_decode_mask", lambda length: False)(x.shape[1])
        return None if skipped else create_attention_mask(x, entry)

    return Layer(layer, new_entry, mask, fill)


def filled_entry(layer: Layer, case: Case, make: Callable[..., mx.array], sizes: Sizes = M3) -> Any:
    """A cache entry of ``case.context`` tokens, whose arrays come from ``make(shape, dtype)``.

    Raises:
        NotImplementedError: the library cannot quantize K and V of this layer.
    """
    paddings = [row * PADDING_STEP for row in range(case.rows)] if case.padded else None
    entry = layer.new_entry(paddings)
    arrays = [
        make((case.rows, heads, case.context, HEAD_DIM), mx.bfloat16)
        for heads in (sizes.groups, sizes.groups, *([1] if case.layer == "sparse" else []))
    ]
    layer.fill(entry, *arrays, *([None] if case.layer == "dense" else []))
    if case.kv_bits != 16:
        if case.padded or not hasattr(entry, "to_quantized"):
            raise NotImplementedError(f"{type(entry).__name__} has no quantized K and V")
        entry = entry.to_quantized(group_size=KV_GROUP_SIZE, bits=case.kv_bits)
    return entry


def holders(entry: Any) -> list[Any]:
    """The objects of an entry that hold arrays in ``keys``, ``values`` and ``index_keys``."""
    parts = [entry, getattr(entry, "kv_cache", None), *getattr(entry, "caches", ())]
    return [part for part in parts if part is not None and not hasattr(part, "caches")]


def config(kind: str, layers: int, sizes: Sizes) -> dict[str, Any]:
    sparse = [int(kind == "sparse")] * layers
    text = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.expert,
        "dense_intermediate_size": sizes.dense,
        "shared_intermediate_size": sizes.expert,
        "num_hidden_layers": layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "head_dim": HEAD_DIM,
        "vocab_size": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "rotary_dim": 64,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 1 << 20,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.0,
        "use_qk_norm": True,
        "use_gemma_norm": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "moe_layer_freq": sparse,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": HEAD_DIM,
            "sparse_num_index_heads": sizes.groups,
            "sparse_topk_blocks": TOPK,
            "sparse_block_size": BLOCK,
            "sparse_local_block": 1,
            "sparse_init_block": 0,
            "sparse_score_type": "max",
            "sparse_attention_freq": sparse,
            "sparse_disable_index_value": sparse,
        },
    }
    return {
        "model_type": "minimax_m3_vl",
        "text_config": text,
        "vision_config": {},
        "tie_word_embeddings": False,
    }


# --- what must move and be multiplied, in the best of forms ---


def matrices(case: Case) -> int:
    """Parameters of the 4-bit matrices that every token meets; routed experts are apart."""
    attention = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * GROUPS)
    if case.layer == "dense":
        return attention + 3 * HIDDEN * DENSE
    index = HIDDEN * HEAD_DIM * (GROUPS + 1) if case.drops_blocks else HIDDEN * HEAD_DIM
    return attention + index + 3 * HIDDEN * EXPERT


def routed_experts(case: Case) -> float:
    """Different experts that the tokens of a step are expected to meet."""
    tokens = case.rows * case.queries
    return 0 if case.layer == "dense" else distinct(EXPERTS, EXPERTS_PER_TOKEN * tokens)


FOUR_BITS = 0.5 + 4 / 64
EXPERT_BYTES = 3 * HIDDEN * EXPERT * FOUR_BITS


def attended(case: Case) -> int:
    """Pairs of a query and a key that attention must multiply, of one row and head."""
    last = [case.context + i + 1 for i in range(case.queries)]
    if case.layer == "dense":
        return sum(last)
    return sum(n if n <= BUDGET else BUDGET - BLOCK + (n - 1) % BLOCK + 1 for n in last)


def attention_flops(case: Case) -> int:
    return 4 * case.rows * HEADS * HEAD_DIM * attended(case)


def bound(case: Case) -> tuple[dict[str, float], float]:
    """Bytes by what they are, and operations: nothing read twice, nothing kept between."""
    tokens = case.rows * case.queries
    keys = case.context + case.queries
    read = keys if case.layer == "dense" else min(keys, case.queries * BUDGET)
    router = 4 * HIDDEN * EXPERTS if case.layer == "sparse" else 0
    kv_element = 2 if case.kv_bits == 16 else case.kv_bits / 8 + 4 / KV_GROUP_SIZE
    moved = {
        "weights": matrices(case) * FOUR_BITS + router,
        "experts": routed_experts(case) * EXPERT_BYTES,
        "index keys": case.rows * keys * HEAD_DIM * 2 if case.drops_blocks else 0,
        "K and V": case.rows * 2 * GROUPS * HEAD_DIM * read * kv_element,
        "activations": 2 * 2 * tokens * HIDDEN,
    }
    experts = EXPERTS_PER_TOKEN * 3 * HIDDEN * EXPERT + HIDDEN * EXPERTS if case.layer == "sparse" else 0
    visible = sum(case.context + i + 1 for i in range(case.queries))
    index = 2 * case.rows * GROUPS * HEAD_DIM * visible if case.drops_blocks else 0
    return moved, 2 * tokens * (matrices(case) + experts) + index + attention_flops(case)
