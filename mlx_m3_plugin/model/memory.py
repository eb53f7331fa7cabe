"""How much memory this machine has, and how much of it a context takes.

This is the one calculation behind ``inspect`` and ``fit``.  Weights and caches are counted to the byte.
What a chunk of a prompt takes while it is computed is an estimate, checked against ``benchmarks/msa.py``
on the CPU.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from ..msa.common import GPU_TILE_BYTES
from ..msa.engine import PARTIAL_BYTES
from .config import TextConfig

_GIB = 1 << 30
# For the system and everything else that runs.
_LEAST_RESERVE, _RESERVED_FRACTION = 8 * _GIB, 1 / 16
# What macOS lets the GPU keep in memory, unless ``iogpu.wired_limit_mb`` says otherwise.
_WIRED_FRACTION = 0.75
# Tokens of a prompt that mlx-lm computes at a time by default.
PREFILL_STEP = 2048
# Tokens of context that there is room for beside experts, unless someone says otherwise.
CONTEXT_BESIDE_EXPERTS = 32_768
# Memory of an attention layer's prefill, in arrays of the queries' size.  At its end there are the queries
# before and after norm and rotation, the output of each group and all outputs together; then, while groups
# are computed, the queries and outputs, and the queries in float32.
_ARRAYS_AT_ITS_END, _ARRAYS_IN_GROUPS = 4.25, 2
# The fraction of a tile's memory budget that is in use at once, and what of the next group's transposed keys
# is there already.
_FRACTION_OF_TILE, _OF_NEXT_GROUP = 0.7, 0.25


# --- this machine ---


def machine_memory() -> int | None:
    """Bytes of physical memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def default_memory() -> int:
    """Bytes that ``convert`` and ``evaluate`` take by default: a quarter of the machine's."""
    return max(_GIB, (machine_memory() or 4 * _GIB) // 4)


def is_mac() -> bool:
    return sys.platform == "darwin"


def reserve_of(memory: int) -> int:
    """Bytes of ``memory`` that are reserved for the system and everything else that runs."""
    return max(_LEAST_RESERVE, int(memory * _RESERVED_FRACTION))


def wired_limit(memory: int, total: int) -> int | None:
    """The value of ``iogpu.wired_limit_mb`` with which a Mac's GPU keeps ``total`` bytes in memory.

    None if macOS's default is enough, or if ``total`` does not fit with any limit.
    """
    most = memory - reserve_of(memory)
    return most >> 20 if _WIRED_FRACTION * memory < total <= most else None


# --- context ---


@dataclass(frozen=True)
class Memory:
    """What a context costs, and what this machine has, in bytes.

    Attributes:
        weights: what mlx-lm loads, which is all but vision.
        per_token, per_token_kv_8: of context with K and V in 16 bits, and in 8 bits.
        kv_group_size: of ``--kv-bits``; the head size has to be a multiple of it.
        machine: None if unknown.
        context, context_kv_8: tokens that fit, at most as many as the model supports; 0 if the weights
            alone do not fit.
        wired_limit_mb: see :func:`wired_limit`; for ``context`` tokens.
    """

    weights: int
    per_token: int
    per_token_kv_8: int
    kv_group_size: int
    machine: int | None
    reserve: int
    context: int
    context_kv_8: int
    wired_limit_mb: int | None


def memory_for(config: TextConfig, weights: int, sparse_layers: int, machine: int | None) -> Memory:
    """``sparse_layers``: how many layers keep index keys in addition to K and V."""
    kv_16, kv_8 = bytes_per_token(config, sparse_layers), bytes_per_token(config, sparse_layers, 8)
    memory = machine or 0
    reserve = reserve_of(memory)
    context, context_kv_8 = (
        context_that_fits(config, kv, memory - reserve - weights) for kv in (kv_16, kv_8)
    )
    total = weights + kv_16 * context + transient_bytes(config, PREFILL_STEP, context)
    limit = wired_limit(memory, total) if context else None
    group_size = kv_group_size(config)
    return Memory(weights, kv_16, kv_8, group_size, machine, reserve, context, context_kv_8, limit)


def room_for_experts(
    config: TextConfig, usable: int, others: int, per_token: int, context: int = CONTEXT_BESIDE_EXPERTS
) -> int:
    """Bytes of ``usable`` memory that are left for routed experts; below 0 if the rest does not fit.

    Args:
        others: bytes of all other weights.  per_token: bytes of context.
    """
    context = min(context, config.max_position_embeddings)
    return usable - others - per_token * context - transient_bytes(config, PREFILL_STEP, context)


def bytes_per_token(config: TextConfig, sparse_layers: int, kv_bits: int | None = None) -> int:
    """Bytes in the KV cache per token; ``sparse_layers`` as in :func:`memory_for`; None means 16 bits."""
    keys_values = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    # Never quantized.
    index_keys = 2 * sparse_layers * config.index_head_dim
    if kv_bits is None:
        return 2 * keys_values + index_keys
    # A scale and a bias of 16 bits for each group.
    return keys_values * kv_bits // 8 + keys_values // kv_group_size(config) * 4 + index_keys


def kv_group_size(config: TextConfig) -> int:
    """Of ``--kv-bits``; the head size has to be a multiple of it."""
    return 64 if config.head_dim % 64 == 0 else 32


def context_that_fits(config: TextConfig, per_token: int, free: int, prefill_step: int = PREFILL_STEP) -> int:
    """The most tokens whose KV cache fits into ``free`` bytes along with a chunk of the prompt."""
    return largest_context(
        config, lambda tokens: per_token * tokens + transient_bytes(config, prefill_step, tokens) <= free
    )


def largest_context(config: TextConfig, fits: Callable[[int], bool]) -> int:
    """The most tokens that fit, up to the model's own limit; if more tokens fit, fewer must fit as well."""
    return bisect(config.max_position_embeddings + 1, fits)[0]


def bisect(high: int, fits: Callable[[int], bool], step: int = 1) -> tuple[int, int]:
    """The largest number that fits and the smallest that does not, at most ``step`` apart.

    0 counts as fitting, ``high`` as not.
    """
    low = 0
    while high - low > step:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


# --- computing a chunk of a prompt ---


def transient_bytes(config: TextConfig, step: int, context: int) -> int:
    """Memory of computing a chunk in 16 bits on a GPU: that of attention or of experts, the larger one."""
    step = min(step, context)
    attention = attention_transient(config, step, context, itemsize=2, tile=GPU_TILE_BYTES, copies_keys=False)
    attention = max(attention, kernel_transient(config, step, context))
    # Tokens sorted by expert, gate, up and their product, then the output, sorted back and weighted.
    wide, hidden = config.intermediate_size, config.hidden_size
    return max(attention, step * config.num_experts_per_tok * (2 * (3 * hidden + 3 * wide) + 4 * hidden))


def kernel_transient(config: TextConfig, queries: int, context: int) -> int:
    """Peak memory of attention by the Metal kernels: partial outputs of a tile, and all outputs."""
    if context <= config.budget:
        return 0
    heads = queries * config.num_attention_heads
    partials = 4 * heads * config.index_topk_blocks * (config.head_dim + 1)
    return min(PARTIAL_BYTES, partials) + 2 * heads * config.head_dim


def attention_transient(
    config: TextConfig, queries: int, context: int, *, itemsize: int, tile: int, copies_keys: bool
) -> int:
    """Peak memory of our attention layer for ``queries`` tokens, without inputs and caches.

    Args:
        itemsize: bytes of an activation.  tile: ``msa``'s memory budget.
        copies_keys: whether K and V of a group are copied beside the tile, as on the CPU: K is transposed,
            and both are cast to float32.  On a GPU the casts are part of the tile.
    """
    one = queries * config.num_attention_heads * config.head_dim * itemsize
    bytes_of_a_key = itemsize * (1 + _OF_NEXT_GROUP) if itemsize == 4 else itemsize + 4 + 4
    copies = int(bytes_of_a_key * context * config.head_dim) if copies_keys else 0
    at_its_end = int(_ARRAYS_AT_ITS_END * one)
    if context <= config.budget:
        return at_its_end
    # The last group's transposed keys are still there.
    at_its_end += 4 * context * config.head_dim if copies_keys else 0
    in_groups = _ARRAYS_IN_GROUPS * one + one * 4 // itemsize + copies + int(_FRACTION_OF_TILE * tile)
    return max(at_its_end, in_groups)


def stock_transients(config: TextConfig, step: int, context: int) -> dict[str, int]:
    """What upstream's own classes take: index scores in float32 for every index head, and a mask, which
    mlx-lm makes for each head and mlx-vlm once.
    """
    pairs = min(step, context) * context if context > config.budget else 0
    scores = 4 * config.index_n_heads * pairs
    return {"mlx-lm": scores + config.num_attention_heads * pairs, "mlx-vlm": scores + pairs}
