"""``mlx-m3 fit``: whether a checkpoint fits a machine, at what context, and how fast it can be there.

From headers alone.  Weights and caches are counted to the byte; what a prompt's chunk takes while it
is computed is a forecast, checked against ``benchmarks/msa.py`` on the CPU.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..model.config import TextConfig, text_config_of
from .inspect.inspection import inspect_source
from .inspect.running import bytes_per_token
from .inspect.source import open_source
from .sizes import size_in_words

_GIB = 1 << 30
# For the system and everything else that runs.
_LEAST_RESERVE, _RESERVED_SHARE = 8 * _GIB, 1 / 16
# What macOS lets the GPU keep in memory, unless it is told otherwise.
_WIRED_SHARE = 0.75
_VISION = ("vision tower", "projector", "patch merge", "other")
# GB/s of the machines that people ask about.
BANDWIDTHS = {"M2 Ultra": 800, "M3 Ultra": 819, "M4 Max": 546, "M5 Max": 614}
# Of an attention layer's prefill, in arrays of the queries' size: the queries before and after norm
# and rotation, what each group puts out and all of it together; and while groups are computed.
_ARRAYS_AT_ITS_END, _ARRAYS_IN_GROUPS = 4.25, 3
# The share of a tile's memory budget that is in use at once.
_SHARE_OF_TILE = 0.75


@dataclass(frozen=True)
class Fit:
    """What fits, in bytes and tokens.

    Attributes:
        weights: that mlx-lm loads; ``vision``: what mlx-vlm loads besides.
        per_token: of context.  cache: of ``context`` tokens.
        transient: what a prompt's chunk takes at that context, with ours; ``stock``: in the index
            scores and masks of mlx-lm's and mlx-vlm's own classes, one layer.
        largest_context: that fits, at most as many tokens as the model knows; 0 if none does.
        touched: bytes that decoding one token reads at that context.
        ceilings: tokens per second that reading them allows, by machine or bandwidth.
        wired_limit_mb: what ``iogpu.wired_limit_mb`` has to be on a Mac, if its default is too low.
    """

    name: str
    memory: int
    reserve: int
    weights: int
    vision: int
    per_token: int
    kv_bits: int | None
    context: int
    cache: int
    prefill_step: int
    transient: int
    stock: dict[str, int]
    total: int
    fits: bool
    largest_context: int
    touched: int
    ceilings: dict[str, float]
    wired_limit_mb: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit(
    path_or_repository: str | Path,
    memory: int,
    *,
    context: int | None = None,
    kv_bits: int | None = None,
    prefill_step: int = 2048,
    bandwidth: float | None = None,
) -> Fit:
    """See whether a checkpoint fits into ``memory`` bytes.

    Args:
        context: tokens to plan for; None for the most that fit.
        kv_bits: as ``--kv-bits``; None keeps K and V in 16 bits.
        prefill_step: tokens of a prompt that are computed at a time.
        bandwidth: of the memory, in GB/s; None for those of some Macs.

    Raises:
        OSError: there is no checkpoint.  ValueError: it is not one, or its formats are not known.
    """
    source = open_source(path_or_repository)
    found = inspect_source(source)
    if found.components is None or found.attention is None:
        raise ValueError("\n  ".join([f"{source.name} cannot be planned for:", *found.problems]))
    config = text_config_of(source.config)
    parts = {component.name: component.bytes for component in found.components}
    sparse = len(found.attention.with_indexer)
    vision = sum(parts.get(name, 0) for name in _VISION)
    weights = sum(parts.values()) - vision
    per_token = bytes_per_token(config, sparse, checked_kv_bits(kv_bits))
    reserve = reserve_of(memory)
    free = memory - reserve - weights
    largest = largest_context(
        config, lambda tokens: per_token * tokens + transient_bytes(config, prefill_step, tokens) <= free
    )
    planned = largest if context is None else context
    cache, transient = per_token * planned, transient_bytes(config, prefill_step, planned)
    touched = _touched(config, parts, sparse, planned, per_token)
    total = weights + cache + transient
    return Fit(
        name=source.name,
        memory=memory,
        reserve=reserve,
        weights=weights,
        vision=vision,
        per_token=per_token,
        kv_bits=kv_bits,
        context=planned,
        cache=cache,
        prefill_step=prefill_step,
        transient=transient,
        stock=stock_transients(config, prefill_step, planned),
        total=total,
        fits=planned > 0 and total <= memory - reserve,
        largest_context=largest,
        touched=touched,
        ceilings=_ceilings(touched, bandwidth),
        wired_limit_mb=wired_limit(memory, reserve, total),
    )


def reserve_of(memory: int) -> int:
    """What is left to the system and everything else that runs."""
    return max(_LEAST_RESERVE, int(memory * _RESERVED_SHARE))


def checked_kv_bits(kv_bits: int | None) -> int | None:
    if kv_bits not in (None, 4, 8):
        raise ValueError(f"--kv-bits is 4 or 8, not {kv_bits}")
    return kv_bits


def largest_context(config: TextConfig, fits: Callable[[int], bool]) -> int:
    """The most tokens that the model knows and that fit; what fits with more does with less."""
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


# --- how fast ---


def _touched(config: TextConfig, parts: dict[str, int], sparse: int, context: int, per_token: int) -> int:
    """Bytes that one token reads: all weights but the embedding and the experts it does not go to."""
    routed = parts.get("routed experts", 0)
    unread = (*_VISION, "routed experts", "embeddings")
    weights = sum(size for name, size in parts.items() if name not in unread)
    weights += routed * config.num_experts_per_tok // config.num_local_experts
    index = 2 * config.index_head_dim
    dense = config.num_hidden_layers - sparse
    keys_values = (per_token - sparse * index) // config.num_hidden_layers
    read = dense * context + sparse * min(context, config.budget)
    return weights + keys_values * read + sparse * index * context


def _ceilings(touched: int, bandwidth: float | None) -> dict[str, float]:
    rates = BANDWIDTHS if bandwidth is None else {f"{bandwidth:g} GB/s": bandwidth}
    return {name: round(rate * 1e9 / touched, 1) for name, rate in rates.items()}


def wired_limit(memory: int, reserve: int, total: int) -> int | None:
    return (memory - reserve) >> 20 if total > _WIRED_SHARE * memory else None


# --- in words ---


def fit_lines(found: Fit) -> list[str]:
    bits = "" if found.kv_bits is None else f" with --kv-bits {found.kv_bits}"
    verdict = "fits" if found.fits else "does NOT fit"
    vision = f"; mlx-vlm reads {size_in_words(found.vision)} more" if found.vision else ""
    left = f"{size_in_words(found.reserve)} left to the rest"
    rows = [
        ("weights", found.weights, f"read by mlx-lm{vision}"),
        ("context", found.cache, f"{found.context:,} tokens of {found.per_token:,} bytes{bits}"),
        ("a chunk of a prompt", found.transient, f"{found.prefill_step:,} tokens at a time (forecast)"),
        ("together", found.total, f"{verdict} into {size_in_words(found.memory)} with {left}"),
    ]
    lines = [found.name, *(f"  {name:<20} {size_in_words(size):>11}  {note}" for name, size, note in rows)]
    if found.largest_context:
        lines.append(f"The largest context that fits is {found.largest_context:,} tokens.")
    else:
        lines.append("No context fits: the weights alone are too much.")
    if any(found.stock.values()):
        stock = " and ".join(f"{size_in_words(size)} in {name}" for name, size in found.stock.items())
        lines.append(f"Without the plugin index scores and masks of one layer take {stock} for such a chunk.")
    ceilings = ", ".join(f"{rate:g} on {name}" for name, rate in found.ceilings.items())
    lines.append(f"A token reads {size_in_words(found.touched)}: at most {ceilings} tokens per second.")
    if found.wired_limit_mb is not None:
        here = "" if sys.platform == "darwin" else " (on the Mac)"
        lines.append(
            f"For the GPU to keep it all{here}: sudo sysctl iogpu.wired_limit_mb={found.wired_limit_mb}"
        )
    return lines
