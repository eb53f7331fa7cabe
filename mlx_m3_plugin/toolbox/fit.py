"""``mlx-m3 fit``: whether a checkpoint fits a machine, at what context, and how fast it can be there.

From headers alone; :mod:`.memory` has the calculation.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..model.config import TextConfig, text_config_of
from .inspect.inspection import Inspection, inspect_source
from .inspect.source import Source, open_source
from .machine import is_mac
from .memory import (
    PREFILL_STEP,
    bytes_per_token,
    context_that_fits,
    reserve_of,
    stock_transients,
    transient_bytes,
    wired_limit,
)
from .parameters import OTHER
from .sizes import size_in_words, tokens_in_words

# Components that no token reads, or (embeddings, routed experts) reads only a part of.
_UNREAD = ("vision tower", "projector", "patch merge", OTHER, "routed experts", "embeddings")
# GB/s of the machines that people ask about.
BANDWIDTHS = {"M2 Ultra": 800, "M3 Ultra": 819, "M4 Max": 546, "M5 Max": 614}
_LEAST_BANDWIDTH, _MOST_BANDWIDTH = 1, 100_000


@dataclass(frozen=True)
class Fit:
    """What fits, in bytes and tokens.

    Attributes:
        weights: that mlx-lm loads; ``vision``: what mlx-vlm loads besides.
        per_token: of context.  cache: of ``context`` tokens.
        context: tokens planned for: those asked for, at most as many as the model knows; without a
            question ``largest_context``, or 1 if none fits.
        model_context: tokens that the model knows.
        transient: what a prompt's chunk takes at that context, with ours; ``stock``: in the index
            scores and masks of mlx-lm's and mlx-vlm's own classes, one layer.
        fits: the context that was asked for, into ``memory`` and into the model.
        missing: bytes of memory that ``context`` takes and are not there.
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
    model_context: int
    cache: int
    prefill_step: int
    transient: int
    stock: dict[str, int]
    total: int
    fits: bool
    missing: int
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
    prefill_step: int = PREFILL_STEP,
    bandwidth: float | None = None,
) -> Fit:
    """See whether a checkpoint fits into ``memory`` bytes.

    Args:
        context: tokens to plan for; None for the most that fit.
        kv_bits: as ``--kv-bits``; None keeps K and V in 16 bits.
        prefill_step: tokens of a prompt that are computed at a time.
        bandwidth: of the memory, in GB/s; None for those of some Macs.

    Raises:
        OSError: there is no checkpoint.  ValueError: it is not one, its formats are not known, or an
            option has a value that cannot be.
    """
    check_kv_bits(kv_bits)
    _check_bandwidth(bandwidth)
    source, found = open_whole(path_or_repository)
    assert found.components is not None
    assert found.attention is not None
    assert found.memory is not None
    config = text_config_of(source.config)
    parts = {component.name: component.bytes for component in found.components}
    weights = found.memory.weights
    sparse = len(found.attention.with_indexer)
    per_token = bytes_per_token(config, sparse, kv_bits)
    reserve = reserve_of(memory)
    largest = context_that_fits(config, per_token, memory - reserve - weights, prefill_step)
    asked = (largest or 1) if context is None else context
    planned = min(asked, config.max_position_embeddings)
    cache, transient = per_token * planned, transient_bytes(config, prefill_step, planned)
    total = weights + cache + transient
    missing = max(0, total - (memory - reserve))
    touched = _touched(config, parts, sparse, planned, per_token)
    return Fit(
        name=source.name,
        memory=memory,
        reserve=reserve,
        weights=weights,
        vision=sum(parts.values()) - weights,
        per_token=per_token,
        kv_bits=kv_bits,
        context=planned,
        model_context=config.max_position_embeddings,
        cache=cache,
        prefill_step=prefill_step,
        transient=transient,
        stock=stock_transients(config, prefill_step, planned),
        total=total,
        fits=not missing and planned == asked,
        missing=missing,
        largest_context=largest,
        touched=touched,
        ceilings=_ceilings(touched, bandwidth),
        wired_limit_mb=wired_limit(memory, total),
    )


def open_whole(path_or_repository: str | Path) -> tuple[Source, Inspection]:
    """A checkpoint of which every part can be counted.

    Raises:
        OSError: there is no checkpoint.  ValueError: it is not one, its formats are not known, or
            shards are missing or damaged: they would count as nothing, and fit anywhere.
    """
    source = open_source(path_or_repository)
    found = inspect_source(source)
    problems = found.problems if found.components is None else source.headers.problems
    if problems:
        raise ValueError("\n  ".join([f"{source.name} cannot be planned for:", *problems[:10]]))
    return source, found


def check_kv_bits(kv_bits: int | None) -> None:
    if kv_bits not in (None, 4, 8):
        raise ValueError(f"--kv-bits is 4 or 8, not {kv_bits}")


def _check_bandwidth(bandwidth: float | None) -> None:
    # Not a number fails the comparison, too.
    if bandwidth is not None and not _LEAST_BANDWIDTH <= bandwidth <= _MOST_BANDWIDTH:
        raise ValueError(
            f"--bandwidth is in GB/s, between {_LEAST_BANDWIDTH} and {_MOST_BANDWIDTH:,}, not {bandwidth}"
        )


# --- how fast ---


def _touched(config: TextConfig, parts: dict[str, int], sparse: int, context: int, per_token: int) -> int:
    """Bytes that one token reads: all weights but the embedding and the experts it does not go to."""
    routed = parts.get("routed experts", 0)
    weights = sum(size for name, size in parts.items() if name not in _UNREAD)
    weights += routed * config.num_experts_per_tok // config.num_local_experts
    index = 2 * config.index_head_dim
    dense = config.num_hidden_layers - sparse
    keys_values = (per_token - sparse * index) // config.num_hidden_layers
    read = dense * context + sparse * min(context, config.budget)
    return weights + keys_values * read + sparse * index * context


def _ceilings(touched: int, bandwidth: float | None) -> dict[str, float]:
    rates = BANDWIDTHS if bandwidth is None else {f"{_plain(bandwidth)} GB/s": bandwidth}
    return {
        name: round(rate * 1e9 / touched, 2 if rate * 1e9 < touched else 1) for name, rate in rates.items()
    }


# --- in words ---


def fit_lines(found: Fit) -> list[str]:
    bits = "" if found.kv_bits is None else f" with --kv-bits {found.kv_bits}"
    vision = f"; mlx-vlm reads {size_in_words(found.vision)} more" if found.vision else ""
    rows = [
        ("weights", found.weights, f"read by mlx-lm{vision}"),
        ("context", found.cache, f"{tokens_in_words(found.context)} of {found.per_token:,} bytes{bits}"),
        ("a chunk of a prompt", found.transient, f"{found.prefill_step:,} tokens at a time (forecast)"),
        ("together", found.total, _verdict(found)),
    ]
    lines = [found.name, *(f"  {name:<20} {size_in_words(size):>11}  {note}" for name, size, note in rows)]
    lines.append(_largest_context(found))
    if any(found.stock.values()):
        stock = " and ".join(f"{size_in_words(size)} in {name}" for name, size in found.stock.items())
        lines.append(f"Without the plugin index scores and masks of one layer take {stock} for such a chunk.")
    ceilings = ", ".join(f"{_plain(rate)} on {name}" for name, rate in found.ceilings.items())
    lines.append(f"A token reads {size_in_words(found.touched)}: at most {ceilings} tokens per second.")
    if found.wired_limit_mb is not None:
        here = "" if is_mac() else " (on the Mac)"
        lines.append(
            f"For the GPU to keep it all{here}: sudo sysctl iogpu.wired_limit_mb={found.wired_limit_mb}"
        )
    return lines


def _verdict(found: Fit) -> str:
    machine = f"{size_in_words(found.memory)} with {size_in_words(found.reserve)} left to the rest"
    if found.missing:
        return f"does NOT fit into {machine}: {size_in_words(found.missing)} are missing"
    return f"fits into {machine}"


def _largest_context(found: Fit) -> str:
    most = tokens_in_words(found.largest_context)
    if not found.missing and not found.fits:
        return f"The model knows {found.model_context:,} tokens of context, fewer than asked for. {most} fit."
    if found.largest_context == found.model_context:
        return f"All {most} of context that the model knows fit."
    if found.largest_context:
        return f"The largest context that fits is {most}."
    too_much = found.weights > found.memory - found.reserve
    return "No context fits: the weights alone are too much." if too_much else "No context fits."


def _plain(number: float) -> str:
    """Without an exponent, however large: ``819``, ``51.5``, ``1,038,590.4``."""
    text = f"{number:,.2f}"
    return text.rstrip("0").rstrip(".")
