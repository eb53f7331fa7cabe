"""How much memory a context takes, and how much of a machine's memory there is for it.

The one calculation behind ``inspect`` and ``fit``.  Weights and caches are counted to the byte; what a
prompt's chunk takes while it is computed is a forecast, checked against ``benchmarks/msa.py`` on the CPU.
"""

from collections.abc import Callable

from ..model.config import TextConfig

_GIB = 1 << 30
# For the system and everything else that runs.
_LEAST_RESERVE, _RESERVED_SHARE = 8 * _GIB, 1 / 16
# What macOS lets the GPU keep in memory, unless ``iogpu.wired_limit_mb`` says otherwise.
_WIRED_SHARE = 0.75
# Tokens of a prompt that mlx-lm computes at a time, unless asked otherwise.
PREFILL_STEP = 2048
# Of an attention layer's prefill, in arrays of the queries' size: the queries before and after norm
# and rotation, what each group puts out and all of it together; and while groups are computed.
_ARRAYS_AT_ITS_END, _ARRAYS_IN_GROUPS = 4.25, 3
# The share of a tile's memory budget that is in use at once.
_SHARE_OF_TILE = 0.75


def reserve_of(memory: int) -> int:
    """Bytes of ``memory`` that are left to the system and everything else that runs."""
    return max(_LEAST_RESERVE, int(memory * _RESERVED_SHARE))


def wired_limit(memory: int, total: int) -> int | None:
    """What ``iogpu.wired_limit_mb`` has to be for a Mac's GPU to keep ``total`` bytes in memory.

    None where macOS's own limit is enough, and where no limit helps because ``total`` does not fit.
    """
    most = memory - reserve_of(memory)
    return most >> 20 if _WIRED_SHARE * memory < total <= most else None


def bytes_per_token(config: TextConfig, sparse_layers: int, kv_bits: int | None = None) -> int:
    """What a token of context takes in the cache; ``kv_bits`` None is 16 bits.

    ``sparse_layers``: how many layers keep index keys beside K and V.
    """
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
    """The most tokens whose cache, and the chunk of a prompt that is computed, fit into ``free`` bytes."""
    return largest_context(
        config, lambda tokens: per_token * tokens + transient_bytes(config, prefill_step, tokens) <= free
    )


def largest_context(config: TextConfig, fits: Callable[[int], bool]) -> int:
    """The most tokens that the model knows and that fit; what fits with more must fit with less."""
    low, high = 0, config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# --- what a chunk takes ---


def transient_bytes(config: TextConfig, step: int, context: int) -> int:
    """Of a chunk's computation in 16 bits on a GPU: its attention or its experts, whichever is more."""
    step = min(step, context)
    attention = attention_transient(config, step, context, itemsize=2, tile=512 << 20, copies_keys=False)
    return max(attention, _experts_transient(config, step))


def attention_transient(
    config: TextConfig, queries: int, context: int, *, itemsize: int, tile: int, copies_keys: bool
) -> int:
    """Peak above inputs and caches while our attention layer takes ``queries`` tokens.

    Args:
        itemsize: bytes of an activation.  tile: ``msa``'s memory budget.
        copies_keys: whether the keys of a group are transposed into a copy, as on the CPU.
    """
    one = queries * config.num_attention_heads * config.head_dim * itemsize
    keys = 4 * context * config.head_dim if copies_keys else 0
    if context <= config.budget:
        return int(_ARRAYS_AT_ITS_END * one)
    in_groups = _ARRAYS_IN_GROUPS * one + keys + int(_SHARE_OF_TILE * tile)
    return max(int(_ARRAYS_AT_ITS_END * one), in_groups)


def _experts_transient(config: TextConfig, step: int) -> int:
    """Rows sorted by expert, gate, up and their product, what comes out, sorted back, and weighted."""
    rows = step * config.num_experts_per_tok
    return rows * (2 * (3 * config.hidden_size + 3 * config.intermediate_size) + 4 * config.hidden_size)


def stock_transients(config: TextConfig, step: int, context: int) -> dict[str, int]:
    """Index scores in float32 for every index head, and a mask: for each head in mlx-lm, one in mlx-vlm."""
    pairs = min(step, context) * context
    if context <= config.budget:
        return {"mlx-lm": 0, "mlx-vlm": 0}
    scores = 4 * config.index_n_heads * pairs
    return {"mlx-lm": scores + config.num_attention_heads * pairs, "mlx-vlm": scores + pairs}
