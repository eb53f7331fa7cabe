"""``mlx-m3 fit``: whether a checkpoint fits into memory, with how much context, and how fast it can be.

Reads headers alone; :mod:`mlx_m3_plugin.model.memory` has the calculation.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

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

# GB/s of machines that people ask about.
BANDWIDTHS: Mapping[str, float] = {"M2 Ultra": 800, "M3 Ultra": 819, "M4 Max": 546, "M5 Max": 614}
# GB/s of the SSD in these Macs.
DISK = 7
# A value of --draft: the head in the checkpoint's own folder.
AUTO = "auto"


class Fit(SimpleNamespace):
    """What fits one machine, in bytes and tokens.

    Attributes:
        model: which of MiniMax's models it is.
        memory: of the machine, of which ``reserve`` is for the system.
        weights: what mlx-lm loads.  vision: what mlx-vlm loads in addition.
        per_token: of context, with ``kv_bits`` for K and V.  cache: of ``context`` tokens.
        context: tokens planned for: the requested number, at most ``model_context``; if none was
            requested ``largest_context``, or 1 if nothing fits.
        model_context: the most tokens that the model supports.
        transient: memory of computing a chunk of ``prefill_step`` tokens of a prompt at that context.
            stock: what index scores and masks of one layer take there in mlx-lm's and mlx-vlm's own classes.
        total: of weights, cache and transient.
        fits: the requested context fits into ``memory`` and is supported by the model.
        missing: bytes of memory that ``context`` needs and the machine does not have.
        largest_context: the most tokens that fit, at most ``model_context``; 0 if nothing fits.
        touched: bytes that decoding one token reads at that context.
        ceilings: machine or bandwidth -> tokens per second that reading these bytes allows.
        wired_limit_mb: the value that ``iogpu.wired_limit_mb`` needs on a Mac, if its default is too low.
        on_disk: what experts on disk would give; None where all fit, or not one of each layer does.
        drafting: with a draft head, which only mlx-vlm runs; its memory and vision are then in ``total``.
    """


class OnDisk(SimpleNamespace):
    """Experts on disk, if a router chooses all of them equally often; real ones have favourites.

    Attributes:
        in_memory: experts of each layer.  experts: all of them.  memory: bytes for experts.
        context: tokens that there is room for beside them.
        hit_rate: how many of a token's experts are in memory.
        read: bytes that a token reads from the disk.
        ceiling: tokens per second that reading them from an SSD of ``DISK`` GB/s allows.
    """


class Drafting(SimpleNamespace):
    """What a draft head would give, if a router chooses all experts equally often.

    Attributes:
        path: of the head.
        acceptance: of each token of a block, how often it is accepted if all before it were.
        weights: bytes of the head.  cache: of its K and V, for a full window.
        lengths: for each number of ``drafted`` tokens, from 1 to all of ``acceptance``: ``tokens_per_pass``
            of the target, bytes ``read`` in a round, and ``speedup``: how many times as fast as without a
            draft.
        best: the fastest of them; None where each is slower than decoding without a draft.
        ceilings: as in :class:`Fit`, with the best length.
    """


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
        return Answer(split, pipeline_lines(split), split.fits)
    options |= {"bandwidth": args.bandwidth, "draft": args.draft}
    acceptance = args.acceptance or (EXPECTED_ACCEPTANCE,)
    found = fit(args.checkpoint, memories[0], acceptance=acceptance, **options)
    return Answer(found, fit_lines(found), found.fits)


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
    if bandwidth is not None and not 1 <= bandwidth <= 100_000:
        raise ValueError(f"--bandwidth must be between 1 and 100,000 GB/s, not {bandwidth}")
    rates = BANDWIDTHS if bandwidth is None else {f"{_plain(bandwidth)} GB/s": bandwidth}
    checkpoint = _open_whole(path_or_repository, kv_bits)
    config = checkpoint.text_config
    head = None if draft is None else _open_draft(path_or_repository, draft, config)
    parts = bytes_of_components(checkpoint.headers, checkpoint.plan)
    text = {name: size for name, size in parts.items() if name not in NOT_IN_THE_TEXT_MODEL}

    found = Fit(name=checkpoint.name, model=model_name(config), memory=memory, reserve=reserve_of(memory))
    found.weights = sum(text.values())
    # Not with draft heads in the shards, which neither loads.
    found.vision = sum(parts.values()) - found.weights - parts[OTHER]
    found.per_token = bytes_per_token(config, len(checkpoint.with_indexer), kv_bits)
    found.kv_bits = kv_bits
    usable, held = memory - found.reserve, found.weights
    if head is not None:
        held += found.vision + head.nbytes + head.cache_bytes()
    largest = context_that_fits(config, found.per_token, usable - held, prefill_step)
    asked = (largest or 1) if context is None else context
    found.context = planned = min(asked, config.max_position_embeddings)
    found.model_context = config.max_position_embeddings
    found.cache = found.per_token * planned
    found.prefill_step = prefill_step
    found.transient = transient_bytes(config, prefill_step, planned)
    found.stock = stock_transients(config, prefill_step, planned)
    found.total = held + found.cache + found.transient
    missing = max(0, found.total - usable)
    found.fits = not missing and planned == asked
    found.missing = missing
    found.largest_context = largest
    cost = _cost(checkpoint, text, planned, found.per_token, head)
    found.touched = int(cost.round(0))
    found.ceilings = _ceilings(cost.round(0), rates)
    found.wired_limit_mb = wired_limit(memory, found.total)
    found.on_disk = _on_disk(config, text, usable, found.per_token, context) if missing else None
    found.drafting = None if head is None else _drafting(head, cost, acceptance, rates)
    return found


def _open_whole(path_or_repository: str | Path, kv_bits: int | None) -> Checkpoint:
    """Open a checkpoint of which every part can be counted.

    Missing tensors and damaged shards would count as nothing and fit anywhere.
    """
    if kv_bits not in (None, 4, 8):
        raise ValueError(f"--kv-bits must be 4 or 8, not {kv_bits}")
    source = open_source(path_or_repository)
    problems = source.headers.problems
    try:
        checkpoint = read_checkpoint(source, read_text_config(source.config))
        # Tensors of damaged files would only be reported twice.
        problems = problems or checkpoint.of_quantization + checkpoint.of_text + checkpoint.of_vision
    except ValueError as error:
        problems = [str(error), *problems]
    if problems:
        raise ValueError("\n  ".join([f"{source.name}: its size is unknown:", *shorten(problems)]))
    return checkpoint


# --- how fast ---


def _cost(
    checkpoint: Checkpoint, parts: Mapping[str, int], context: int, per_token: int, head: DraftHead | None
) -> DraftCost:
    """Bytes that decoding reads: all weights except the embedding and the experts that no token is routed to,
    all K and V of dense layers and index keys, and for each token the K and V of the blocks that it selects.
    """
    config, sparse = checkpoint.text_config, len(checkpoint.with_indexer)
    index, dense = 2 * config.index_head_dim, config.num_hidden_layers - sparse
    keys_values = (per_token - sparse * index) // config.num_hidden_layers
    embeddings, routed = parts["embeddings"], parts["routed experts"]
    lm_head = embeddings if config.tie_word_embeddings else parts["lm_head"]
    cached = (dense * keys_values + sparse * index) * context
    return DraftCost(
        shared=sum(parts.values()) - embeddings - routed + cached,
        per_token=keys_values * sparse * min(context, config.budget),
        routed=routed,
        experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        draft=0 if head is None else head.bytes_per_round + head.cache_bytes(context) + lm_head,
        per_drafted=0 if head is None else head.bytes_per_drafted,
    )


def _ceilings(read: float, rates: Mapping[str, float], tokens: float = 1) -> dict[str, float]:
    """Tokens per second at these GB/s, if ``tokens`` tokens read so many bytes."""
    each = {name: rate * 1e9 * tokens / read for name, rate in rates.items()}
    return {name: round(rate, 2 if rate < 1 else 1) for name, rate in each.items()}


def _on_disk(
    config: TextConfig, parts: Mapping[str, int], usable: int, per_token: int, context: int | None
) -> OnDisk | None:
    routed, experts = parts["routed experts"], config.num_local_experts
    context = min(context or CONTEXT_BESIDE_EXPERTS, config.max_position_embeddings)
    memory = room_for_experts(config, usable, sum(parts.values()) - routed, per_token, context)
    in_memory = experts * memory // max(1, routed)
    if not 0 < in_memory < experts:
        return None
    hit_rate = in_memory / experts
    read = int(routed * config.num_experts_per_tok / experts * (1 - hit_rate))
    return OnDisk(
        in_memory=in_memory,
        experts=experts,
        memory=memory,
        context=context,
        hit_rate=round(hit_rate, 3),
        read=read,
        ceiling=round(DISK * 1e9 / read, 1),
    )


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
    head: DraftHead, cost: DraftCost, acceptance: Sequence[float], rates: Mapping[str, float]
) -> Drafting:
    if len(acceptance) > head.block:
        raise ValueError(
            f"--acceptance has {len(acceptance)} values, but {head.directory} drafts {head.block} tokens"
        )
    each = list(acceptance) * (head.block if len(acceptance) == 1 else 1)
    lengths = [
        SimpleNamespace(
            drafted=n,
            tokens_per_pass=round(tokens_per_pass(each[:n]), 3),
            read=int(cost.round(n)),
            speedup=round(cost.speedup(each[:n]), 3),
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
        ceilings={} if best is None else _ceilings(best.read, rates, best.tokens_per_pass),
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
    machine = f"{size_in_words(found.memory)} minus {size_in_words(found.reserve)} reserved for the system"
    missing = f"does NOT fit in {machine}: {size_in_words(found.missing)} missing"
    rows += [
        ("context", found.cache, f"{tokens_in_words(found.context)} of {found.per_token:,} bytes each{bits}"),
        ("a chunk of a prompt", found.transient, f"{found.prefill_step:,} tokens at a time (estimate)"),
        ("total", found.total, missing if found.missing else f"fits in {machine}"),
    ]
    lines = [f"{found.name} ({found.model})"]
    lines += [f"  {name:<20} {size_in_words(size):>11}  {note}" for name, size, note in rows]
    lines.append(_largest_context(found))
    if any(found.stock.values()):
        stock = " and ".join(f"{size_in_words(size)} in {name}" for name, size in found.stock.items())
        lines.append(f"Without the plugin, a chunk's index scores and masks in one layer take {stock}.")
    lines.append(f"A token reads {size_in_words(found.touched)}: {_at_most_per_second(found.ceilings)}.")
    if drafting is not None:
        lines += _drafting_lines(drafting)
    if (on_disk := found.on_disk) is not None:
        lines += [
            f"With experts on disk it runs: {EXPERT_MEMORY}={int(on_disk.memory / 2**30 * 10) / 10}GB keeps "
            f"{on_disk.in_memory} of {on_disk.experts} experts of each layer in memory, beside "
            f"{tokens_in_words(on_disk.context)} of context.",
            f"If experts are chosen evenly, a token then reads {size_in_words(on_disk.read)} from the disk: "
            f"at most {on_disk.ceiling} tokens per second at {DISK} GB/s.",
        ]
    if found.wired_limit_mb is not None:
        here = "" if is_mac() else " (on the Mac)"
        lines.append(
            f"To let the GPU use that much{here}: sudo sysctl iogpu.wired_limit_mb={found.wired_limit_mb}"
        )
    return lines


def _drafting_lines(found: Drafting) -> list[str]:
    fastest = max(found.lengths, key=lambda length: length.speedup)
    percent = ", ".join(f"{100 * each:.3g}" for each in dict.fromkeys(found.acceptance))
    gives = (
        f"Drafting {tokens_in_words(fastest.drafted)} with {percent} % accepted gives "
        f"{fastest.tokens_per_pass:.2f} tokens per forward pass, and reads {size_in_words(fastest.read)} "
        f"for it: {fastest.speedup:.2f} times as fast"
    )
    if found.best is None:
        return [f"{gives}. Drafting does NOT pay."]
    return [
        f"{gives}, {_at_most_per_second(found.ceilings)}.",
        f"To draft so many, in mlx-vlm: --draft-model {found.path} --draft-block-size {fastest.drafted + 1}",
    ]


def _at_most_per_second(ceilings: Mapping[str, float]) -> str:
    each = ", ".join(f"{_plain(rate)} on {name}" for name, rate in ceilings.items())
    return f"at most {each} tokens per second"


def _largest_context(found: Fit) -> str:
    if not found.missing and not found.fits:
        return _too_much_context(found)
    if found.largest_context == found.model_context:
        return f"The model's full context of {tokens_in_words(found.model_context)} fits."
    if found.largest_context:
        return f"The largest context that fits is {tokens_in_words(found.largest_context)}."
    too_much = found.weights > found.memory - found.reserve
    return "No context fits: the weights alone are too large." if too_much else "No context fits."


def _too_much_context(found: "Fit | PipelineFit") -> str:
    supported = f"The model supports only {found.model_context:,} tokens of context, fewer than requested"
    return f"{supported}; {_at_most(found.largest_context)}."


def _at_most(largest: int) -> str:
    return f"at most {tokens_in_words(largest)} fit" if largest else "no context fits"


def _plain(number: float) -> str:
    """Without an exponent, however large: ``819``, ``51.5``, ``1,038,590.4``."""
    return f"{number:,.2f}".rstrip("0").rstrip(".")


# --- several machines ---


class PipelineFit(SimpleNamespace):
    """A split that fits, or none.

    Attributes:
        context, model_context: as in :class:`Fit`.  asked_context: the requested one, if any.
        largest_context: the most tokens that fit with any split.
        stages: what each machine holds, in bytes, by rank, of which 0 holds the last layers; empty if nothing
            fits.  first, last: numbers of its layers, inclusive.  weights: of these layers, and of what every
            machine holds: embedding, final norm and head.
        missing: bytes that each machine needs in addition, if nothing fits.
        fits: as in :class:`Fit`.  split: how many layers each rank holds.
    """


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
    config = checkpoint.text_config
    if len(memories) > config.num_hidden_layers:
        raise ValueError(
            f"{checkpoint.name} has {config.num_hidden_layers} layers, fewer than {len(memories)} machines"
        )
    layers = _Layers(checkpoint, memories, kv_bits, prefill_step)
    known = config.max_position_embeddings
    largest = largest_context(config, layers.fit)
    planned = min((largest or 1) if context is None else context, known)
    stages = layers.stages(planned)
    return PipelineFit(
        name=checkpoint.name,
        context=planned,
        asked_context=context,
        model_context=known,
        largest_context=largest,
        stages=stages,
        missing=0 if stages else layers.missing(planned),
        fits=bool(stages) and context in (None, planned),
        split=[stage.last - stage.first + 1 for stage in stages],
    )


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
            size, layer = size_in_bytes(tensor.shape, tensor.dtype), layer_of(name)
            if is_vision(name):
                continue
            if layer is None:
                self.shared += size
            elif layer < len(self.weights):
                self.weights[layer] += size
        keys_values = bytes_per_token(config, 0, kv_bits) // config.num_hidden_layers
        self.per_token = [keys_values] * config.num_hidden_layers
        for layer in checkpoint.with_indexer:
            self.per_token[layer] += 2 * config.index_head_dim

    def fit(self, context: int, slack: int = 0) -> bool:
        return bool(self.split(context, slack))

    def split(self, context: int, slack: int) -> list[int]:
        """How many layers each rank takes if every machine keeps ``slack`` bytes free; empty if impossible.

        The highest rank takes as many of the first layers as it can, and so on.
        """
        sizes = [held + context * each for held, each in zip(self.weights, self.per_token, strict=True)]
        counts, number = [], 0
        for lower_ranks, memory in reversed([*enumerate(self.memories)]):
            free = memory - reserve_of(memory) - self.shared - self.transient(context) - slack
            first = number
            while number < len(sizes) - lower_ranks and sizes[number] <= free:
                free -= sizes[number]
                number += 1
            counts.append(number - first)
        return counts[::-1] if all(counts) and number == len(sizes) else []

    def transient(self, context: int) -> int:
        return transient_bytes(self.config, self.step, context)

    def missing(self, context: int) -> int:
        """Bytes, to a MiB, that each machine needs in addition to hold its layers."""
        most = max(map(reserve_of, self.memories)) + self.shared + self.transient(context)
        most += sum(self.weights) + context * sum(self.per_token)
        return bisect(most, lambda more: not self.fit(context, -more), 1 << 20)[1]

    def stages(self, context: int) -> list[SimpleNamespace]:
        """The split that leaves the fullest machine the most memory, to a MiB; empty if none fits."""
        slack, _ = bisect(max(self.memories), lambda free: self.fit(context, free), 1 << 20)
        counts, stages = self.split(context, slack), []
        for rank, count in enumerate(counts):
            first = sum(counts[rank + 1 :])
            held = slice(first, first + count)
            stage = SimpleNamespace(
                rank=rank,
                memory=self.memories[rank],
                reserve=reserve_of(self.memories[rank]),
                first=first,
                last=first + count - 1,
                weights=self.shared + sum(self.weights[held]),
                cache=context * sum(self.per_token[held]),
                transient=self.transient(context),
            )
            stages.append(stage)
        return stages


def pipeline_lines(found: PipelineFit) -> list[str]:
    if not found.stages:
        context = f"a context of {tokens_in_words(found.context)}"
        missing = f"each machine needs {size_in_words(found.missing)} more"
        return [found.name, f"does NOT fit with {context}: {missing}; {_at_most(found.largest_context)}."]
    lines = [f"{found.name}, {tokens_in_words(found.context)} of context"]
    lines.append("rank   memory      layers      weights      context   a chunk     left over")
    limits = []
    for stage in found.stages:
        total = stage.weights + stage.cache + stage.transient
        left = stage.memory - stage.reserve - total
        sizes = (stage.memory, stage.weights, stage.cache, stage.transient, left)
        memory, *others = map(size_in_words, sizes)
        cells = (stage.rank, memory, f"{stage.first}-{stage.last}", *others)
        lines.append("{:>4} {:>8} {:>9} {:>14} {:>12} {:>9} {:>13}".format(*cells))
        if (limit := wired_limit(stage.memory, total)) is not None:
            advice = f"To let the GPU of rank {stage.rank} use that much, on its Mac: "
            limits.append(f"{advice}sudo sysctl iogpu.wired_limit_mb={limit}")
    largest = f"The largest context that fits is {tokens_in_words(found.largest_context)}."
    split = ",".join(map(str, found.split))
    return [
        *lines,
        largest if found.fits else _too_much_context(found),
        *limits,
        "On the machine of rank 0, with all of them in hosts.json in this order:",
        f"  mlx.launch --hostfile hosts.json --backend ring --env {PIPELINE_SPLIT}={split} \\",
        f"    $(which mlx_lm.server) --model {found.name} --pipeline",
    ]
