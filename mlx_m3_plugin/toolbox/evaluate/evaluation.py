"""``mlx-m3 evaluate``: how good a checkpoint is, with one layer of it in memory at a time."""

import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...weights.reading import TensorReader
from ..checkpoint import Checkpoint, open_checkpoint
from ..streaming import Head
from .metrics import Distributions, LayerComparison, compare_distributions, compare_layers, perplexity
from .texts import Texts
from .walk import Progress, Walk, walk, walk_key

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
        OSError: a checkpoint or the cache cannot be read or written.
        ValueError: a checkpoint is no whole MiniMax-M3, or the two are not of the same shape.
    """
    cache = cache or default_cache()
    ours = open_checkpoint(path)
    theirs = None if reference is None else open_checkpoint(reference)
    if theirs is not None:
        _check_alike(ours, theirs)
    _check_tokens(ours, texts)
    walks = {}
    for checkpoint in filter(None, (theirs, ours)):
        directory = cache / walk_key(checkpoint, texts)
        progress = _progress(watch, checkpoint)
        with _locked(directory):
            walks[id(checkpoint)] = walk(
                checkpoint, texts, directory, memory=memory, step=step, progress=progress
            )
    found = _measured(ours, walks[id(ours)], texts)
    if theirs is not None:
        _compare(found, ours, walks[id(ours)], theirs, walks[id(theirs)], texts)
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
    kept = their_walk.directory / "perplexity.json"
    with _head(theirs) as their_head:
        if not kept.exists():
            kept.write_text(json.dumps(perplexity(their_walk.states(), their_head, texts)), encoding="utf-8")
        with _head(ours) as our_head:
            found.distributions = compare_distributions(
                (our_walk.states(), our_head), (their_walk.states(), their_head), texts
            )
    found.reference = theirs.name
    found.reference_perplexity = json.loads(kept.read_text(encoding="utf-8"))
    found.layers = list(compare_layers(our_walk, their_walk))


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


@contextmanager
def _locked(directory: Path) -> Any:
    """One walk at a time in a directory: two would write over each other's states."""
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / "lock").open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        file.close()
        raise OSError(f"another process is evaluating the same in {directory}") from None
    try:
        yield
    finally:
        file.close()
