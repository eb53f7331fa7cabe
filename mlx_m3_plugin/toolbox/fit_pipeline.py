"""``mlx-m3 fit --memory 256GB,128GB``: how many layers to give each machine of a pipeline."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..model.config import TextConfig, text_config_of
from ..startup.settings import PIPELINE_SPLIT
from ..weights import lacks_indexers, plan_layout
from ..weights.dtypes import size_in_bytes
from ..weights.names import layer_of
from .fit import check_kv_bits, open_whole
from .inspect.source import Source
from .memory import PREFILL_STEP, bytes_per_token, largest_context, reserve_of, transient_bytes, wired_limit
from .sizes import size_in_words, tokens_in_words


@dataclass(frozen=True)
class Stage:
    """What one machine holds, in bytes.

    Attributes:
        first, last: numbers of its layers, both included.
        weights: of its layers, and what every machine holds: embeddings, final norm and head.
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
        context: tokens planned for: those asked for, at most as many as the model knows; without a
            question ``largest_context``, or 1 if none fits.
        asked_context: tokens asked for, if any were.  model_context: tokens that the model knows.
        largest_context: that fit with any split.
        stages: by rank, of which 0 holds the last layers; empty if nothing fits.
        missing: bytes that each machine would need more, if nothing fits.
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
    """Split a checkpoint's layers over machines so that the fullest has the most memory left.

    Args:
        memories: bytes of each machine, by rank.
        context: tokens to plan for; None for the most that fit.

    Raises:
        OSError: there is no checkpoint.  ValueError: it is not one, or its formats are not known.
    """
    check_kv_bits(kv_bits)
    source, _ = open_whole(path_or_repository)
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
    """Bytes that a layer takes: ``weights`` and ``per_token`` of context; ``shared`` are every machine's."""

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

    def beside_layers(self, context: int) -> int:
        return self.shared + transient_bytes(self.config, self.step, context)


def _assigned(costs: _Costs, memories: Sequence[int], context: int, slack: int) -> list[int] | None:
    """Layers by rank that leave every machine ``slack`` bytes; None where that cannot be.

    The highest rank takes as many of the first layers as it can, and so on.
    """
    counts, number, n_layers = [], 0, len(costs.weights)
    for rank in reversed(range(len(memories))):
        memory = memories[rank]
        free = memory - reserve_of(memory) - costs.beside_layers(context) - slack
        first = number
        while number < n_layers - rank and (cost := costs.layer(number, context)) <= free:
            free -= cost
            number += 1
        if number == first:
            return None
        counts.append(number - first)
    return counts[::-1] if number == n_layers else None


def _balanced(costs: _Costs, memories: Sequence[int], context: int) -> list[int] | None:
    if _assigned(costs, memories, context, 0) is None:
        return None
    low, high = 0, max(memories)
    while high - low > 1 << 20:
        middle = (low + high) // 2
        low, high = (middle, high) if _assigned(costs, memories, context, middle) else (low, middle)
    return _assigned(costs, memories, context, low)


def _missing(costs: _Costs, memories: Sequence[int], context: int) -> int:
    """Bytes, to a MiB, that each machine needs more for the layers to be assigned."""
    low, high = 0, max(map(reserve_of, memories)) + sum(costs.weights) + costs.beside_layers(context)
    high += context * sum(costs.per_token)
    while high - low > 1 << 20:
        middle = (low + high) // 2
        low, high = (low, middle) if _assigned(costs, memories, context, -middle) else (middle, high)
    return high


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
    most = f"at most {found.largest_context:,} tokens fit" if found.largest_context else "no context fits"
    if not found.stages:
        missing = f"each machine needs {size_in_words(found.missing)} more"
        return [
            found.name,
            f"does NOT fit with a context of {tokens_in_words(found.context)}: {missing}; {most}.",
        ]
    lines = [f"{found.name}, {found.context:,} tokens of context"]
    lines.append("rank   memory      layers      weights      context   a chunk    left besides")
    for stage in found.stages:
        left = stage.memory - stage.reserve - stage.total
        sizes = (stage.weights, stage.cache, stage.transient, left)
        weights, cache, transient, spare = (size_in_words(size) for size in sizes)
        held = f"{stage.first}-{stage.last}"
        lines.append(
            f"{stage.rank:>4} {size_in_words(stage.memory):>8} {held:>9} {weights:>14} {cache:>12} "
            f"{transient:>9} {spare:>15}"
        )
    if not found.fits:
        lines.append(
            f"The model knows {found.model_context:,} tokens of context, fewer than asked for; {most}."
        )
    else:
        lines.append(f"The largest context that fits is {found.largest_context:,} tokens.")
    for stage in found.stages:
        limit = wired_limit(stage.memory, stage.total)
        if limit is not None:
            lines.append(f"For the GPU of rank {stage.rank}'s Mac: sudo sysctl iogpu.wired_limit_mb={limit}")
    split = ",".join(map(str, found.split))
    lines += [
        "On the machine of rank 0, with both in hosts.json in this order:",
        f"  mlx.launch --hostfile hosts.json --backend ring --env {PIPELINE_SPLIT}={split} \\",
        f"    $(which mlx_lm.server) --model {found.name} --pipeline",
    ]
    return lines
