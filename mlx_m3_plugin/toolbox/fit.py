"""``mlx-m3 fit``: whether a checkpoint fits into memory, with how much context, and how fast it can be.

Reads headers alone; :mod:`.memory` has the calculation.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..model.config import TextConfig, text_config_of
from ..startup.settings import PIPELINE_SPLIT
from ..weights import lacks_indexers, plan_layout
from ..weights.dtypes import size_in_bytes
from ..weights.names import layer_of
from .common import size_in_words, tokens_in_words
from .inspect import Inspection, inspect_source
from .memory import (
    PREFILL_STEP,
    bisect,
    bytes_per_token,
    context_that_fits,
    is_mac,
    largest_context,
    reserve_of,
    stock_transients,
    transient_bytes,
    wired_limit,
)
from .parameters import NOT_IN_THE_TEXT_MODEL
from .source import Source, open_source

# Components that a token does not read, or (embeddings, routed experts) reads only a part of.
_NOT_READ_WHOLE = (*NOT_IN_THE_TEXT_MODEL, "routed experts", "embeddings")
# GB/s of machines that people ask about.
BANDWIDTHS = {"M2 Ultra": 800, "M3 Ultra": 819, "M4 Max": 546, "M5 Max": 614}
_LEAST_BANDWIDTH, _MOST_BANDWIDTH = 1, 100_000


@dataclass(frozen=True)
class Fit:
    """What fits one machine, in bytes and tokens.

    Attributes:
        weights: what mlx-lm loads.  vision: what mlx-vlm loads in addition.
        per_token: of context.  cache: of ``context`` tokens.
        context: tokens planned for: the requested number, at most ``model_context``; if none was
            requested ``largest_context``, or 1 if nothing fits.
        model_context: the most tokens that the model supports.
        transient: memory of computing a chunk of a prompt at that context.  stock: what index scores and
            masks of one layer take there in mlx-lm's and mlx-vlm's own classes.
        fits: the requested context fits into ``memory`` and is supported by the model.
        missing: bytes of memory that ``context`` needs and the machine does not have.
        largest_context: the most tokens that fit, at most ``model_context``; 0 if nothing fits.
        touched: bytes that decoding one token reads at that context.
        ceilings: machine or bandwidth -> tokens per second that reading these bytes allows.
        wired_limit_mb: the value that ``iogpu.wired_limit_mb`` needs on a Mac, if its default is too low.
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
    """Calculate whether a checkpoint fits into ``memory`` bytes.

    Args:
        context: tokens to plan for; None for the most that fit.
        kv_bits: of ``--kv-bits``; None keeps K and V in 16 bits.
        prefill_step: tokens of a prompt that are computed at a time.
        bandwidth: of the memory, in GB/s; None for those of some Macs.

    Raises:
        OSError: there is no checkpoint.
        ValueError: not a MiniMax-M3 checkpoint, a format is unknown, or an option has an invalid value.
    """
    _check_kv_bits(kv_bits)
    _check_bandwidth(bandwidth)
    source, found = _open_whole(path_or_repository)
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


def _open_whole(path_or_repository: str | Path) -> tuple[Source, Inspection]:
    """Open a checkpoint of which every part can be counted.

    Raises:
        OSError: there is no checkpoint.
        ValueError: not a MiniMax-M3 checkpoint, a format is unknown, or shards are missing or damaged,
            which would count as nothing and fit anywhere.
    """
    source = open_source(path_or_repository)
    found = inspect_source(source)
    problems = found.problems if found.components is None else source.headers.problems
    if problems:
        raise ValueError("\n  ".join([f"{source.name}: its size is unknown:", *problems[:10]]))
    return source, found


def _check_kv_bits(kv_bits: int | None) -> None:
    if kv_bits not in (None, 4, 8):
        raise ValueError(f"--kv-bits must be 4 or 8, not {kv_bits}")


def _check_bandwidth(bandwidth: float | None) -> None:
    # NaN fails the comparison as well.
    if bandwidth is not None and not _LEAST_BANDWIDTH <= bandwidth <= _MOST_BANDWIDTH:
        raise ValueError(
            f"--bandwidth must be between {_LEAST_BANDWIDTH} and {_MOST_BANDWIDTH:,} GB/s, not {bandwidth}"
        )


# --- how fast ---


def _touched(config: TextConfig, parts: dict[str, int], sparse: int, context: int, per_token: int) -> int:
    """Bytes that one token reads: all weights except the embedding and the experts it is not routed to."""
    routed = parts.get("routed experts", 0)
    weights = sum(size for name, size in parts.items() if name not in _NOT_READ_WHOLE)
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


# --- one machine as text ---


def fit_lines(found: Fit) -> list[str]:
    bits = "" if found.kv_bits is None else f" with --kv-bits {found.kv_bits}"
    vision = f"; {size_in_words(found.vision)} more in mlx-vlm" if found.vision else ""
    rows = [
        ("weights", found.weights, f"in mlx-lm{vision}"),
        ("context", found.cache, f"{tokens_in_words(found.context)} of {found.per_token:,} bytes each{bits}"),
        ("a chunk of a prompt", found.transient, f"{found.prefill_step:,} tokens at a time (estimate)"),
        ("total", found.total, _verdict(found)),
    ]
    lines = [found.name, *(f"  {name:<20} {size_in_words(size):>11}  {note}" for name, size, note in rows)]
    lines.append(_largest_context(found))
    if any(found.stock.values()):
        stock = " and ".join(f"{size_in_words(size)} in {name}" for name, size in found.stock.items())
        lines.append(f"Without the plugin, a chunk's index scores and masks in one layer take {stock}.")
    ceilings = ", ".join(f"{_plain(rate)} on {name}" for name, rate in found.ceilings.items())
    lines.append(f"A token reads {size_in_words(found.touched)}: at most {ceilings} tokens per second.")
    if found.wired_limit_mb is not None:
        here = "" if is_mac() else " (on the Mac)"
        lines.append(
            f"To let the GPU use that much{here}: sudo sysctl iogpu.wired_limit_mb={found.wired_limit_mb}"
        )
    return lines


def _verdict(found: Fit) -> str:
    machine = f"{size_in_words(found.memory)} minus {size_in_words(found.reserve)} reserved for the system"
    if found.missing:
        return f"does NOT fit in {machine}: {size_in_words(found.missing)} missing"
    return f"fits in {machine}"


def _largest_context(found: Fit) -> str:
    if not found.missing and not found.fits:
        return _too_much_context(found.model_context, found.largest_context)
    if found.largest_context == found.model_context:
        return f"The model's full context of {tokens_in_words(found.model_context)} fits."
    if found.largest_context:
        return f"The largest context that fits is {tokens_in_words(found.largest_context)}."
    too_much = found.weights > found.memory - found.reserve
    return "No context fits: the weights alone are too large." if too_much else "No context fits."


def _too_much_context(known: int, largest: int) -> str:
    return f"The model supports only {known:,} tokens of context, fewer than requested; {_at_most(largest)}."


def _at_most(largest: int) -> str:
    return f"at most {tokens_in_words(largest)} fit" if largest else "no context fits"


def _plain(number: float) -> str:
    """Without an exponent, however large: ``819``, ``51.5``, ``1,038,590.4``."""
    text = f"{number:,.2f}"
    return text.rstrip("0").rstrip(".")


# --- several machines ---


@dataclass(frozen=True)
class Stage:
    """What one machine holds, in bytes.

    Attributes:
        first, last: numbers of its layers, inclusive.
        weights: of its layers, and of what every machine holds: embedding, final norm and head.
    """

    rank: int
    memory: int
    reserve: int
    first: int
    last: int
    weights: int
    cache: int
    transient: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.transient

    @property
    def layers(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class PipelineFit:
    """A split that fits, or none.

    Attributes:
        context, model_context: as in :class:`Fit`.  asked_context: the requested one, if any.
        largest_context: the most tokens that fit with any split.
        stages: by rank, of which 0 holds the last layers; empty if nothing fits.
        missing: bytes that each machine needs in addition, if nothing fits.
    """

    name: str
    context: int
    asked_context: int | None
    model_context: int
    largest_context: int
    stages: tuple[Stage, ...]
    missing: int

    @property
    def fits(self) -> bool:
        return bool(self.stages) and self.asked_context in (None, self.context)

    @property
    def split(self) -> list[int]:
        return [stage.layers for stage in self.stages]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fits": self.fits, "split": self.split}


def fit_pipeline(
    path_or_repository: str | Path,
    memories: Sequence[int],
    *,
    context: int | None = None,
    kv_bits: int | None = None,
    prefill_step: int = PREFILL_STEP,
) -> PipelineFit:
    """Split a checkpoint's layers over machines so that the fullest one has as much memory left as possible.

    Args:
        memories: bytes of each machine, by rank.  The others are those of :func:`fit`.

    Raises:
        OSError, ValueError: see :func:`fit`.
    """
    _check_kv_bits(kv_bits)
    source, _ = _open_whole(path_or_repository)
    costs = _Costs.of(source, kv_bits, prefill_step)
    if len(memories) > len(costs.weights):
        raise ValueError(
            f"{source.name} has {len(costs.weights)} layers, fewer than {len(memories)} machines"
        )
    known = costs.config.max_position_embeddings
    largest = largest_context(costs.config, lambda tokens: _assigned(costs, memories, tokens, 0) is not None)
    planned = min((largest or 1) if context is None else context, known)
    counts = _balanced(costs, memories, planned)
    stages = () if counts is None else tuple(_stages(costs, memories, planned, counts))
    missing = 0 if stages else _missing(costs, memories, planned)
    return PipelineFit(source.name, planned, context, known, largest, stages, missing)


@dataclass(frozen=True)
class _Costs:
    """Bytes of each layer: ``weights``, and ``per_token`` of context; ``shared`` are on every machine."""

    config: TextConfig
    step: int
    shared: int
    weights: list[int]
    per_token: list[int]

    @classmethod
    def of(cls, source: Source, kv_bits: int | None, step: int) -> "_Costs":
        config = text_config_of(source.config)
        shared, weights = 0, [0] * config.num_hidden_layers
        plan = plan_layout(source.headers.tensors, config, "")
        for name, tensor in plan.items():
            size = size_in_bytes(tensor.shape, tensor.dtype)
            layer = layer_of(name)
            if layer is None:
                shared += size
            elif layer < len(weights):
                weights[layer] += size
        keys_values = bytes_per_token(config, 0, kv_bits) // config.num_hidden_layers
        index = 0 if lacks_indexers(plan, config) else 2 * config.index_head_dim
        layers = range(config.num_hidden_layers)
        per_token = [keys_values + index * config.is_sparse_attention(layer) for layer in layers]
        return cls(config, step, shared, weights, per_token)

    def layer(self, number: int, context: int) -> int:
        return self.weights[number] + context * self.per_token[number]

    def without_layers(self, context: int) -> int:
        return self.shared + transient_bytes(self.config, self.step, context)


def _assigned(costs: _Costs, memories: Sequence[int], context: int, slack: int) -> list[int] | None:
    """How many layers each rank takes so that every machine has ``slack`` bytes left; None if impossible.

    The highest rank takes as many of the first layers as it can, and so on.
    """
    counts, number, n_layers = [], 0, len(costs.weights)
    for rank in reversed(range(len(memories))):
        memory = memories[rank]
        free = memory - reserve_of(memory) - costs.without_layers(context) - slack
        first = number
        while number < n_layers - rank and (cost := costs.layer(number, context)) <= free:
            free -= cost
            number += 1
        if number == first:
            return None
        counts.append(number - first)
    return counts[::-1] if number == n_layers else None


def _balanced(costs: _Costs, memories: Sequence[int], context: int) -> list[int] | None:
    slack, _ = bisect(max(memories), lambda n: _assigned(costs, memories, context, n) is not None, 1 << 20)
    return _assigned(costs, memories, context, slack)


def _missing(costs: _Costs, memories: Sequence[int], context: int) -> int:
    """Bytes, to a MiB, that each machine needs in addition to hold its layers."""
    most = max(map(reserve_of, memories)) + sum(costs.weights) + costs.without_layers(context)
    most += context * sum(costs.per_token)
    return bisect(most, lambda n: _assigned(costs, memories, context, -n) is None, 1 << 20)[1]


def _stages(costs: _Costs, memories: Sequence[int], context: int, counts: list[int]) -> list[Stage]:
    stages = []
    for rank, memory in enumerate(memories):
        first = sum(counts[rank + 1 :])
        held = range(first, first + counts[rank])
        stages.append(
            Stage(
                rank=rank,
                memory=memory,
                reserve=reserve_of(memory),
                first=held[0],
                last=held[-1],
                weights=costs.shared + sum(costs.weights[layer] for layer in held),
                cache=context * sum(costs.per_token[layer] for layer in held),
                transient=transient_bytes(costs.config, costs.step, context),
            )
        )
    return stages


def pipeline_lines(found: PipelineFit) -> list[str]:
    if not found.stages:
        context = f"a context of {tokens_in_words(found.context)}"
        missing = f"each machine needs {size_in_words(found.missing)} more"
        return [found.name, f"does NOT fit with {context}: {missing}; {_at_most(found.largest_context)}."]
    lines = [f"{found.name}, {tokens_in_words(found.context)} of context"]
    lines.append("rank   memory      layers      weights      context   a chunk     left over")
    for stage in found.stages:
        left = stage.memory - stage.reserve - stage.total
        sizes = (stage.weights, stage.cache, stage.transient, left)
        weights, cache, transient, spare = (size_in_words(size) for size in sizes)
        held = f"{stage.first}-{stage.last}"
        lines.append(
            f"{stage.rank:>4} {size_in_words(stage.memory):>8} {held:>9} {weights:>14} {cache:>12} "
            f"{transient:>9} {spare:>13}"
        )
    lines.append(
        f"The largest context that fits is {tokens_in_words(found.largest_context)}."
        if found.fits
        else _too_much_context(found.model_context, found.largest_context)
    )
    limits = {stage.rank: wired_limit(stage.memory, stage.total) for stage in found.stages}
    lines += [
        f"To let the GPU of rank {rank} use that much, on its Mac: sudo sysctl iogpu.wired_limit_mb={limit}"
        for rank, limit in limits.items()
        if limit is not None
    ]
    split = ",".join(map(str, found.split))
    return [
        *lines,
        "On the machine of rank 0, with all of them in hosts.json in this order:",
        f"  mlx.launch --hostfile hosts.json --backend ring --env {PIPELINE_SPLIT}={split} \\",
        f"    $(which mlx_lm.server) --model {found.name} --pipeline",
    ]
