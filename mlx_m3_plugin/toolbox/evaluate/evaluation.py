"""``mlx-m3 evaluate``: how good a checkpoint is, with one layer of it in memory at a time."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, open_checkpoint
from ..forward_pass import Progress, Walk, walk, walk_key
from ..new_directory import LOCK, locked, replace_text
from ..shards import TensorReader
from ..streaming import Head
from ..texts import Texts
from .metrics import Distributions, LayerComparison, compare_distributions, compare_layers, perplexity

# Given a title and how many layers there are: what is told of each.
Watch = Callable[[str, int], Any]


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        bytes: of the whole checkpoint on disk.
        distributions, layers: beside the reference, if there is one.
    """

    checkpoint: str
    tokens: int
    windows: int
    context: int
    bytes: int
    perplexity: float
    reference: str | None = None
    reference_perplexity: float | None = None
    distributions: Distributions | None = None
    layers: list[LayerComparison] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    path: str | Path,
    texts: Texts,
    *,
    reference: str | Path | None = None,
    cache: Path | None = None,
    memory: int = 2 << 30,
    step: int = 512,
    watch: Watch | None = None,
) -> Evaluation:
    """Measure a checkpoint on ``texts``, and compare it with another.

    Args:
        reference: a checkpoint of the same model, usually the one in float.
        cache: where walks are kept, to be gone on with and to be used again.
        memory: bytes that tokens may take in a layer.
        step: tokens of a window that attend at a time; the result does not depend on it.
        watch: makes a :data:`~.walk.Progress` for each walk.

    Raises:
        BlockingIOError: another process evaluates the same.
        OSError: a checkpoint or the cache cannot be read or written.
        ValueError: a checkpoint is no whole MiniMax-M3, or the two are not of the same shape.
    """
    cache = cache or default_cache()
    ours = open_checkpoint(path)
    theirs = None if reference is None else open_checkpoint(reference)
    if theirs is not None:
        _check_alike(ours, theirs)
    _check_tokens(ours, texts)

    def walk_through(checkpoint: Checkpoint, directory: Path) -> Walk:
        progress = _progress(watch, checkpoint)
        return walk(checkpoint, texts, directory, memory=memory, step=step, progress=progress)

    our_directory = cache / walk_key(ours, texts)
    # Both locks before anything is computed; the reference's for its own walk alone, others may need it.
    with _locked(our_directory, ours):
        if theirs is not None:
            their_directory = cache / walk_key(theirs, texts)
            is_same = their_directory == our_directory
            with nullcontext() if is_same else _locked(their_directory, theirs):
                their_walk = walk_through(theirs, their_directory)
                reference_perplexity = _kept_perplexity(theirs, their_walk, texts)
        our_walk = walk_through(ours, our_directory)
    found = _measured(ours, our_walk, texts)
    if theirs is not None:
        found.reference, found.reference_perplexity = theirs.name, reference_perplexity
        _compare(found, ours, our_walk, theirs, their_walk, texts)
    return found


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx-m3" / "walks"


def _measured(checkpoint: Checkpoint, walked: Walk, texts: Texts) -> Evaluation:
    with _head(checkpoint) as head:
        value = perplexity(walked.states(), head, texts)
    return Evaluation(
        checkpoint.name,
        len(texts.tokens),
        len(texts.windows),
        max(map(len, texts.windows)),
        sum(tensor.nbytes for tensor in checkpoint.headers.tensors.values()),
        value,
    )


def _compare(
    found: Evaluation, ours: Checkpoint, our_walk: Walk, theirs: Checkpoint, their_walk: Walk, texts: Texts
) -> None:
    with _head(theirs) as their_head, _head(ours) as our_head:
        found.distributions = compare_distributions(
            (our_walk.states(), our_head), (their_walk.states(), their_head), texts
        )
    found.layers = list(compare_layers(our_walk, their_walk))


def _kept_perplexity(checkpoint: Checkpoint, walked: Walk, texts: Texts) -> float:
    """Of a walk that is locked: computed once, and kept with it."""
    kept = walked.directory / "perplexity.json"
    if not kept.exists():
        with _head(checkpoint) as head:
            replace_text(kept, json.dumps(perplexity(walked.states(), head, texts)))
    return float(json.loads(kept.read_text(encoding="utf-8")))


@contextmanager
def _head(checkpoint: Checkpoint) -> Any:
    with TensorReader(checkpoint.directory, checkpoint.headers.tensors) as reader:
        yield Head(checkpoint, reader)


def _check_alike(ours: Checkpoint, theirs: Checkpoint) -> None:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_local_experts", "index_block_size")
    for name in names:
        mine, other = getattr(ours.text_config, name), getattr(theirs.text_config, name)
        if mine != other:
            raise ValueError(
                f"{theirs.name} is no reference for {ours.name}: {name} is {other} there and {mine} here"
            )


def _check_tokens(checkpoint: Checkpoint, texts: Texts) -> None:
    largest = max(texts.tokens)
    if largest >= checkpoint.text_config.vocab_size:
        raise ValueError(f"the text has token {largest}, and the model a vocabulary of "
                         f"{checkpoint.text_config.vocab_size}")  # fmt: skip


def _progress(watch: Watch | None, checkpoint: Checkpoint) -> Progress:
    if watch is None:
        return lambda layer, count: None
    return watch(checkpoint.title, checkpoint.text_config.num_hidden_layers)  # type: ignore[no-any-return]


def _locked(directory: Path, checkpoint: Checkpoint) -> AbstractContextManager[int]:
    """One walk at a time in a directory: two would write over each other's states."""
    doing = f"`mlx-m3 evaluate` is evaluating {checkpoint.directory} in {directory}"
    return locked(directory / LOCK, doing, "choose another --cache")
