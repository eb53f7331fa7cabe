"""``mlx-m3 fit``: whether a checkpoint fits into memory, with how much context, and how fast it can be.

Reads headers alone; :mod:`mlx_m3_plugin.model.memory` has the calculation.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..model.config import TextConfig
from ..model.draft_cost import EXPECTED_ACCEPTANCE, DraftCost, best_length, tokens_per_pass
from ..model.memory import (
    CONTEXT_BESIDE_EXPERTS,
    PREFILL_STEP,
    bisect,
    bytes_per_token,
    context_that_fits,
    is_mac,
    largest_context,
    machine_memory,
    reserve_of,
    room_for_experts,
    stock_transients,
    transient_bytes,
    wired_limit,
)
from ..startup.settings import EXPERT_MEMORY, PIPELINE_SPLIT
from ..weights.check import shorten
from ..weights.dtypes import size_in_bytes
from ..weights.headers import DRAFT_FOLDER
from ..weights.names import is_vision, layer_of
from .checkpoint import Checkpoint, locate, model_name, open_source, read_checkpoint, read_text_config
from .common import Answer, size_in_words, tokens_in_words
from .draft_head import DraftHead, open_draft_head
from .parameters import NOT_IN_THE_TEXT_MODEL, OTHER, bytes_of_components

# Components that a token does not read, or (embeddings, routed experts) reads only a part of.
_NOT_READ_WHOLE = (*NOT_IN_THE_TEXT_MODEL, "routed experts", "embeddings")
# GB/s of machines that people ask about.
BANDWIDTHS = {"M2 Ultra": 800, "M3 Ultra": 819, "M4 Max": 546, "M5 Max": 614}
# GB/s of the SSD in these Macs.
DISK = 7
_LEAST_BANDWIDTH, _MOST_BANDWIDTH = 1, 100_000
# A value of --draft: the head in the checkpoint's own folder.
AUTO = "auto"


@dataclass(frozen=True)
class OnDisk:
    """Experts on disk, if a router chooses all of them equally often; real ones have favourites.

    Attributes:
        in_memory: experts of each layer.  experts: all of them.  memory: bytes for experts.
        context: tokens that there is room for beside them.
        hit_rate: how many of a token's experts are in memory.
        read: bytes that a token reads from the disk.
        ceiling: tokens per second that reading them from an SSD of ``DISK`` GB/s allows.
    """

    in_memory: int
    experts: int
    memory: int
    context: int
    hit_rate: float
    read: int
    ceiling: float


@dataclass(frozen=True)
class DraftLength:
    """Drafting ``drafted`` tokens in each round, and verifying them.

    Attributes:
        tokens_per_pass: of the target.  read: bytes in a round.
        speedup: how many times as fast as without a draft.
    """

    drafted: int
    tokens_per_pass: float
    read: int
    speedup: float


@dataclass(frozen=True)
class Drafting:
    """What a draft head would give, if a router chooses all experts equally often.

    Attributes:
        acceptance: of each token of a block, how often it is accepted if all before it were.
        weights: bytes of the head.  cache: of its K and V, for a full window.
        lengths: from 1 token to all of ``acceptance``.
        best: the fastest of them; None where each is slower than decoding without a draft.
        ceilings: as in :class:`Fit`, with the best length.
    """

    path: str
    acceptance: list[float]
    weights: int
    cache: int
    lengths: list[DraftLength]
    best: DraftLength | None
    ceilings: dict[str, float]

    @property
    def pays(self) -> bool:
        return self.best is not None


@dataclass(frozen=True)
class Fit:
    """What fits one machine, in bytes and tokens.

    Attributes:
        model: which of MiniMax's models it is.
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
        on_disk: what experts on disk would give; None where all fit, or not one of each layer does.
        drafting: with a draft head, which only mlx-vlm runs; its memory and vision are then in ``total``.
    """

    name: str
    model: str
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
    on_disk: OnDisk | None
    drafting: Drafting | None = None


def command(args: Namespace) -> Answer:
    memories = args.memory or [machine_memory()]
    if memories == [None]:
        raise ValueError("the memory of this machine is unknown: give it, as in --memory 256GB")
    options = {"context": args.context, "kv_bits": args.kv_bits, "prefill_step": args.prefill_step}
    if args.acceptance is not None and args.draft is None:
        raise ValueError("--acceptance is for --draft, which is missing")
    if len(memories) > 1:
        for option in ("bandwidth", "draft"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option} is for one machine, but --memory names several")
        split = fit_pipeline(args.checkpoint, memories, **options)
        return Answer(
            {**asdict(split), "fits": split.fits, "split": split.split}, pipeline_lines(split), split.fits
        )
    draft = {"draft": args.draft, "acceptance": args.acceptance or (EXPECTED_ACCEPTANCE,)}
    found = fit(args.checkpoint, memories[0], bandwidth=args.bandwidth, **draft, **options)
    return Answer(asdict(found), fit_lines(found), found.fits)


def fit(
    path_or_repository: str | Path,
    memory: int,
    *,
    context: int | None = None,
    kv_bits: int | None = None,
    prefill_step: int = PREFILL_STEP,
    bandwidth: float | None = None,
    draft: str | Path | None = None,
    acceptance: Sequence[float] = (EXPECTED_ACCEPTANCE,),
) -> Fit:
    """Calculate whether a checkpoint fits into ``memory`` bytes.

    Args:
        context: tokens to plan for; None for the most that fit.
        kv_bits: None keeps K and V in 16 bits.
        bandwidth: of the memory, in GB/s; None for those of some Macs.
        draft: directory of a DSpark draft head, or ``AUTO`` for the checkpoint's own.
        acceptance: of its tokens, see :class:`Drafting`; one number holds for the whole block.

    Raises:
        OSError: there is no checkpoint, or no draft head.
        ValueError: not a MiniMax-M3 checkpoint, a format is unknown, or an option has an invalid value.
    """
    # NaN fails the comparison as well.
    if bandwidth is not None and not _LEAST_BANDWIDTH <= bandwidth <= _MOST_BANDWIDTH:
        raise ValueError(
            f"--bandwidth must be between {_LEAST_BANDWIDTH} and {_MOST_BANDWIDTH:,} GB/s, not {bandwidth}"
        )
    checkpoint = _open_whole(path_or_repository, kv_bits)
    config = checkpoint.text_config
    parts = bytes_of_components(checkpoint.headers, checkpoint.plan)
    weights = sum(size for name, size in parts.items() if name not in NOT_IN_THE_TEXT_MODEL)
    sparse = len(checkpoint.with_indexer)
    per_token = bytes_per_token(config, sparse, kv_bits)
    reserve = reserve_of(memory)
    # Not with draft heads in the shards, which neither loads.
    vision = sum(parts.values()) - weights - parts[OTHER]
    head = None if draft is None else _open_draft(path_or_repository, draft, config)
    held = weights if head is None else weights + vision + head.nbytes + head.cache_bytes()
    largest = context_that_fits(config, per_token, memory - reserve - held, prefill_step)
    asked = (largest or 1) if context is None else context
    planned = min(asked, config.max_position_embeddings)
    cache, transient = per_token * planned, transient_bytes(config, prefill_step, planned)
    total = held + cache + transient
    missing = max(0, total - (memory - reserve))
    cost = _cost(config, parts, sparse, planned, per_token, head)
    return Fit(
        name=checkpoint.name,
        model=model_name(config),
        memory=memory,
        reserve=reserve,
        weights=weights,
        vision=vision,
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
        touched=int(cost.round(0)),
        ceilings=_ceilings(cost.round(0), bandwidth),
        wired_limit_mb=wired_limit(memory, total),
        on_disk=_on_disk(config, memory - reserve, parts, per_token, context) if missing else None,
        drafting=None if head is None else _drafting(head, cost, acceptance, planned, bandwidth),
    )


def _open_whole(path_or_repository: str | Path, kv_bits: int | None) -> Checkpoint:
    """Open a checkpoint of which every part can be counted.

    Missing tensors and damaged shards would count as nothing and fit anywhere.
    """
    if kv_bits not in (None, 4, 8):
        raise ValueError(f"--kv-bits must be 4 or 8, not {kv_bits}")
    source = open_source(path_or_repository)
    checkpoint, problems = None, source.headers.problems
    try:
        checkpoint = read_checkpoint(source, read_text_config(source.config))
    except ValueError as error:
        problems = [str(error), *problems]
    else:
        missing = checkpoint.of_quantization + checkpoint.of_text + checkpoint.of_vision
        # Tensors of damaged files would only be reported twice.
        problems = problems or missing
    if checkpoint is None or problems:
        raise ValueError("\n  ".join([f"{source.name}: its size is unknown:", *shorten(problems)]))
    return checkpoint


# --- how fast ---


def _cost(
    config: TextConfig,
    parts: dict[str, int],
    sparse: int,
    context: int,
    per_token: int,
    head: DraftHead | None,
) -> DraftCost:
    """Bytes that decoding reads: all weights except the embedding and the experts that no token is routed to,
    all K and V of dense layers and index keys, and for each token the K and V of the blocks that it selects.
    """
    index = 2 * config.index_head_dim
    dense = config.num_hidden_layers - sparse
    keys_values = (per_token - sparse * index) // config.num_hidden_layers
    weights = sum(size for name, size in parts.items() if name not in _NOT_READ_WHOLE)
    lm_head = parts.get("embeddings", 0) if config.tie_word_embeddings else parts.get("lm_head", 0)
    return DraftCost(
        shared=weights + (dense * keys_values + sparse * index) * context,
        per_token=keys_values * sparse * min(context, config.budget),
        routed=parts.get("routed experts", 0),
        experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        draft=0 if head is None else head.bytes_per_round + head.cache_bytes(context) + lm_head,
        per_drafted=0 if head is None else head.bytes_per_drafted,
    )


def _ceilings(read: float, bandwidth: float | None, tokens: float = 1) -> dict[str, float]:
    """Tokens per second, if ``tokens`` tokens read so many bytes."""
    rates = BANDWIDTHS if bandwidth is None else {f"{_plain(bandwidth)} GB/s": bandwidth}
    each = {name: rate * 1e9 * tokens / read for name, rate in rates.items()}
    return {name: round(rate, 2 if rate < 1 else 1) for name, rate in each.items()}


def _on_disk(
    config: TextConfig, usable: int, parts: dict[str, int], per_token: int, context: int | None
) -> OnDisk | None:
    routed, experts = parts.get("routed experts", 0), config.num_local_experts
    others = sum(size for name, size in parts.items() if name not in NOT_IN_THE_TEXT_MODEL) - routed
    context = min(context or CONTEXT_BESIDE_EXPERTS, config.max_position_embeddings)
    memory = room_for_experts(config, usable, others, per_token, context)
    in_memory = experts * memory // max(1, routed)
    if not 0 < in_memory < experts:
        return None
    hit_rate = in_memory / experts
    read = int(routed * config.num_experts_per_tok / experts * (1 - hit_rate))
    ceiling = round(DISK * 1e9 / read, 1)
    return OnDisk(in_memory, experts, memory, context, round(hit_rate, 3), read, ceiling)


# --- with a draft head ---


def _open_draft(path_or_repository: str | Path, draft: str | Path, config: TextConfig) -> DraftHead:
    directory = Path(draft).expanduser()
    if draft == AUTO:
        place = locate(path_or_repository)
        if place.directory is None or not (place.directory / DRAFT_FOLDER / "config.json").is_file():
            raise FileNotFoundError(
                f"--draft: {place.name} has no draft head in {DRAFT_FOLDER}/ on disk; name its directory, as "
                "in --draft DIR"
            )
        directory = place.directory / DRAFT_FOLDER
    head = open_draft_head(directory)
    for name in ("hidden_size", "vocab_size"):
        if head.config[name] != getattr(config, name):
            raise ValueError(
                f"--draft: {directory} is for another model: its {name} is {head.config[name]}, the "
                f"checkpoint's {getattr(config, name)}"
            )
    return head


def _drafting(
    head: DraftHead, cost: DraftCost, acceptance: Sequence[float], context: int, bandwidth: float | None
) -> Drafting:
    if len(acceptance) > head.block:
        raise ValueError(
            f"--acceptance has {len(acceptance)} values, but {head.directory} drafts {head.block} tokens"
        )
    each = list(acceptance) * head.block if len(acceptance) == 1 else list(acceptance)
    lengths = [
        DraftLength(
            n, round(tokens_per_pass(each[:n]), 3), int(cost.round(n)), round(cost.speedup(each[:n]), 3)
        )
        for n in range(1, len(each) + 1)
    ]
    length = best_length(cost, each)
    best = lengths[length - 1] if length else None
    return Drafting(
        path=str(head.directory),
        acceptance=each,
        weights=head.nbytes,
        cache=head.cache_bytes(),
        lengths=lengths,
        best=best,
        ceilings={} if best is None else _ceilings(best.read, bandwidth, best.tokens_per_pass),
    )


# --- one machine as text ---


def fit_lines(found: Fit) -> list[str]:
    bits = "" if found.kv_bits is None else f" with --kv-bits {found.kv_bits}"
    vision = f"; {size_in_words(found.vision)} more in mlx-vlm" if found.vision else ""
    rows = [("weights", found.weights, f"in mlx-lm{vision}")]
    if (drafting := found.drafting) is not None:
        rows = [
            ("weights", found.weights + found.vision, "in mlx-vlm"),
            ("draft head", drafting.weights + drafting.cache, f"{drafting.path}, and its K and V"),
        ]
    rows += [
        ("context", found.cache, f"{tokens_in_words(found.context)} of {found.per_token:,} bytes each{bits}"),
        ("a chunk of a prompt", found.transient, f"{found.prefill_step:,} tokens at a time (estimate)"),
        ("total", found.total, _verdict(found)),
    ]
    lines = [
        f"{found.name} ({found.model})",
        *(f"  {name:<20} {size_in_words(size):>11}  {note}" for name, size, note in rows),
    ]
    lines.append(_largest_context(found))
    if any(found.stock.values()):
        stock = " and ".join(f"{size_in_words(size)} in {name}" for name, size in found.stock.items())
        lines.append(f"Without the plugin, a chunk's index scores and masks in one layer take {stock}.")
    ceilings = ", ".join(f"{_plain(rate)} on {name}" for name, rate in found.ceilings.items())
    lines.append(f"A token reads {size_in_words(found.touched)}: at most {ceilings} tokens per second.")
    if drafting is not None:
        lines += _drafting_lines(drafting)
    if found.on_disk is not None:
        lines += _on_disk_lines(found.on_disk)
    if found.wired_limit_mb is not None:
        here = "" if is_mac() else " (on the Mac)"
        lines.append(
            f"To let the GPU use that much{here}: sudo sysctl iogpu.wired_limit_mb={found.wired_limit_mb}"
        )
    return lines


def _on_disk_lines(found: OnDisk) -> list[str]:
    size = int(found.memory / 2**30 * 10) / 10
    return [
        f"With experts on disk it runs: {EXPERT_MEMORY}={size}GB keeps {found.in_memory} of {found.experts} "
        f"experts of each layer in memory, beside {tokens_in_words(found.context)} of context.",
        f"If experts are chosen evenly, a token then reads {size_in_words(found.read)} from the disk: "
        f"at most {found.ceiling} tokens per second at {DISK} GB/s.",
    ]


def _drafting_lines(found: Drafting) -> list[str]:
    fastest = max(found.lengths, key=lambda length: length.speedup)
    percent = ", ".join(f"{100 * each:.3g}" for each in dict.fromkeys(found.acceptance))
    drafts = f"Drafting {tokens_in_words(fastest.drafted)} with {percent} % accepted"
    gives = (
        f"gives {fastest.tokens_per_pass:.2f} tokens per forward pass, and reads "
        f"{size_in_words(fastest.read)} for it"
    )
    if not found.pays:
        return [f"{drafts} {gives}: {fastest.speedup:.2f} times as fast. Drafting does NOT pay."]
    ceilings = ", ".join(f"{_plain(rate)} on {name}" for name, rate in found.ceilings.items())
    return [
        f"{drafts} {gives}: {fastest.speedup:.2f} times as fast, at most {ceilings} tokens per second.",
        f"To draft so many, in mlx-vlm: --draft-model {found.path} --draft-block-size {fastest.drafted + 1}",
    ]


def _verdict(found: Fit) -> str:
    machine = f"{size_in_words(found.memory)} minus {size_in_words(found.reserve)} reserved for the system"
    missing = f"does NOT fit in {machine}: {size_in_words(found.missing)} missing"
    return missing if found.missing else f"fits in {machine}"


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
    return f"{number:,.2f}".rstrip("0").rstrip(".")


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
        return [stage.last - stage.first + 1 for stage in self.stages]


def fit_pipeline(
    path_or_repository: str | Path,
    memories: Sequence[int],
    *,
    context: int | None = None,
    kv_bits: int | None = None,
    prefill_step: int = PREFILL_STEP,
) -> PipelineFit:
    """Split a checkpoint's layers over machines so that the fullest one has as much memory left as possible.

    Like :func:`fit`; ``memories`` are bytes of each machine, by rank.
    """
    checkpoint = _open_whole(path_or_repository, kv_bits)
    layers = _Layers(checkpoint, memories, kv_bits, prefill_step)
    if len(memories) > len(layers.weights):
        raise ValueError(
            f"{checkpoint.name} has {len(layers.weights)} layers, fewer than {len(memories)} machines"
        )
    known = layers.config.max_position_embeddings
    largest = largest_context(layers.config, layers.fit)
    planned = min((largest or 1) if context is None else context, known)
    stages = layers.stages(planned)
    missing = 0 if stages else layers.missing(planned)
    return PipelineFit(checkpoint.name, planned, context, known, largest, stages, missing)


class _Layers:
    """A checkpoint's layers, to be split over machines with these ``memories``.

    In bytes, each layer has ``weights``, and takes ``per_token`` of context; every machine has the
    ``shared`` weights.
    """

    def __init__(self, checkpoint: Checkpoint, memories: Sequence[int], kv_bits: int | None, step: int):
        self.memories, self.step = memories, step
        self.config = config = checkpoint.text_config
        self.shared, self.weights = 0, [0] * config.num_hidden_layers
        for name, tensor in checkpoint.plan.items():
            if is_vision(name):
                continue
            size = size_in_bytes(tensor.shape, tensor.dtype)
            layer = layer_of(name)
            if layer is None:
                self.shared += size
            elif layer < len(self.weights):
                self.weights[layer] += size
        keys_values = bytes_per_token(config, 0, kv_bits) // config.num_hidden_layers
        self.per_token = [keys_values] * config.num_hidden_layers
        for layer in checkpoint.with_indexer:
            self.per_token[layer] += 2 * config.index_head_dim

    def fit(self, context: int, slack: int = 0) -> bool:
        return self._split(context, slack) is not None

    def _split(self, context: int, slack: int) -> list[int] | None:
        """How many layers each rank takes if every machine keeps ``slack`` bytes free; None if impossible.

        The highest rank takes as many of the first layers as it can, and so on.
        """
        counts, number, n_layers = [], 0, len(self.weights)
        for rank in reversed(range(len(self.memories))):
            memory = self.memories[rank]
            free = memory - reserve_of(memory) - self._on_every_machine(context) - slack
            first = number
            while number < n_layers - rank:
                free -= self.weights[number] + context * self.per_token[number]
                if free < 0:
                    break
                number += 1
            if number == first:
                return None
            counts.append(number - first)
        return counts[::-1] if number == n_layers else None

    def _on_every_machine(self, context: int) -> int:
        return self.shared + transient_bytes(self.config, self.step, context)

    def missing(self, context: int) -> int:
        """Bytes, to a MiB, that each machine needs in addition to hold its layers."""
        most = max(map(reserve_of, self.memories)) + self._on_every_machine(context)
        most += sum(self.weights) + context * sum(self.per_token)
        return bisect(most, lambda more: not self.fit(context, -more), 1 << 20)[1]

    def stages(self, context: int) -> tuple[Stage, ...]:
        """The split that leaves the fullest machine the most memory, to a MiB; empty if none fits."""
        slack, _ = bisect(max(self.memories), lambda free: self.fit(context, free), 1 << 20)
        counts = self._split(context, slack) or []
        transient = transient_bytes(self.config, self.step, context)
        stages = []
        for rank, (count, memory) in enumerate(zip(counts, self.memories, strict=False)):
            first = sum(counts[rank + 1 :])
            held = slice(first, first + count)
            weights, cache = self.shared + sum(self.weights[held]), context * sum(self.per_token[held])
            last = first + count - 1
            stages.append(Stage(rank, memory, reserve_of(memory), first, last, weights, cache, transient))
        return tuple(stages)


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
        cells = [size_in_words(stage.memory), f"{stage.first}-{stage.last}", *map(size_in_words, sizes)]
        widths = (8, 9, 14, 12, 9, 13)
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{stage.rank:>4} {' '.join(aligned)}")
    lines.append(
        f"The largest context that fits is {tokens_in_words(found.largest_context)}."
        if found.fits
        else _too_much_context(found.model_context, found.largest_context)
    )
    lines += [
        f"To let the GPU of rank {stage.rank} use that much, on its Mac: "
        f"sudo sysctl iogpu.wired_limit_mb={limit}"
        for stage in found.stages
        if (limit := wired_limit(stage.memory, stage.total)) is not None
    ]
    split = ",".join(map(str, found.split))
    return [
        *lines,
        "On the machine of rank 0, with all of them in hosts.json in this order:",
        f"  mlx.launch --hostfile hosts.json --backend ring --env {PIPELINE_SPLIT}={split} \\",
        f"    $(which mlx_lm.server) --model {found.name} --pipeline",
    ]
