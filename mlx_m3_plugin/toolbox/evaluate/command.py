"""``mlx-m3 evaluate``: from its arguments to what it prints."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, open_checkpoint
from ..common import layers_bar, read_text
from ..forward_pass import (
    ForwardPass,
    Texts,
    Watch,
    built_in_text,
    default_cache,
    forward_pass,
    pass_key,
    read_texts,
)
from ..memory import default_memory
from ..new_directory import LOCK, locked, replace_text
from ..shards import TensorReader
from ..streaming import Head
from .metrics import Evaluation, compare_distributions, compare_layers, perplexity
from .report import check_can_draw, draw, report_lines


def evaluate_command(
    checkpoint: str,
    reference: str | None = None,
    *,
    text_file: str | None = None,
    tokens: int | None = None,
    context: int = 4096,
    cache: str | None = None,
    memory: int | None = None,
    plot: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """What was found, as JSON and as lines.

    Raises:
        OSError, ValueError: see :func:`evaluate`.
    """
    picture = None if plot is None else Path(plot).expanduser()
    if picture is not None:
        if reference is None:
            raise ValueError("--plot compares layers; it needs --reference")
        check_can_draw(picture)
    path = open_checkpoint(checkpoint).directory
    text = built_in_text() if text_file is None else read_text(Path(text_file).expanduser())
    texts = read_texts(path, text, tokens, context)
    found = evaluate(
        checkpoint,
        texts,
        reference=reference,
        cache=None if cache is None else Path(cache).expanduser(),
        memory=(memory or default_memory()) // 2,
        watch=layers_bar,
    )
    if picture is not None:
        draw(found, picture)
    return asdict(found), report_lines(found)


def evaluate(
    path: str | Path,
    texts: Texts,
    *,
    reference: str | Path | None = None,
    cache: Path | None = None,
    memory: int = 2 << 30,
    step: int = 512,
    watch: Watch = lambda title, layers: lambda layer, count: None,
) -> Evaluation:
    """Measure a checkpoint on ``texts``, and compare it with another.

    Args:
        reference: a checkpoint of the same model, usually the unquantized one.
        cache: where forward passes are kept, to be resumed and used again.
        memory: bytes that tokens may take in a layer.
        step: tokens of a window that attend at a time; the result does not depend on it.
        watch: makes a progress bar for each forward pass.

    Raises:
        BlockingIOError: another process evaluates the same.
        OSError: a checkpoint or the cache cannot be read or written.
        ValueError: a checkpoint is not a whole MiniMax-M3, or the two have different shapes.
    """
    cache = cache or default_cache()
    ours = open_checkpoint(path)
    theirs = None if reference is None else open_checkpoint(reference)
    if theirs is not None:
        _check_alike(ours, theirs)
    _check_tokens(ours, texts)

    def run(checkpoint: Checkpoint, directory: Path) -> ForwardPass:
        progress = watch(checkpoint.title, checkpoint.text_config.num_hidden_layers)
        return forward_pass(checkpoint, texts, directory, memory=memory, step=step, progress=progress)

    our_directory = cache / pass_key(ours, texts)
    # Both locks before anything is computed; the reference's only during its own pass, others may need it.
    with _locked(our_directory, ours):
        if theirs is not None:
            their_directory = cache / pass_key(theirs, texts)
            is_same = their_directory == our_directory
            with nullcontext() if is_same else _locked(their_directory, theirs):
                their_pass = run(theirs, their_directory)
                their_perplexity = _cached_perplexity(theirs, their_pass, texts)
        our_pass = run(ours, our_directory)
    with _head(ours) as head:
        found = Evaluation(
            ours.name,
            len(texts.tokens),
            len(texts.windows),
            max(map(len, texts.windows)),
            sum(tensor.nbytes for tensor in ours.headers.tensors.values()),
            perplexity(our_pass.hidden_states(), head, texts),
        )
    if theirs is not None:
        found.reference, found.reference_perplexity = theirs.name, their_perplexity
        with _head(theirs) as their_head, _head(ours) as our_head:
            found.distributions = compare_distributions(
                (our_pass.hidden_states(), our_head), (their_pass.hidden_states(), their_head), texts
            )
        found.layers = list(compare_layers(our_pass, their_pass))
    return found


def _cached_perplexity(checkpoint: Checkpoint, made: ForwardPass, texts: Texts) -> float:
    """Computed once, and kept with the forward pass, which this process has locked."""
    file = made.directory / "perplexity.json"
    if not file.exists():
        with _head(checkpoint) as head:
            replace_text(file, json.dumps(perplexity(made.hidden_states(), head, texts)))
    return float(json.loads(file.read_text(encoding="utf-8")))


@contextmanager
def _head(checkpoint: Checkpoint) -> Iterator[Head]:
    with TensorReader(checkpoint.directory, checkpoint.headers.tensors) as reader:
        yield Head(checkpoint, reader)


def _check_alike(ours: Checkpoint, theirs: Checkpoint) -> None:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_local_experts", "index_block_size")
    for name in names:
        mine, other = getattr(ours.text_config, name), getattr(theirs.text_config, name)
        if mine != other:
            raise ValueError(
                f"--reference {theirs.name}: its {name} is {other}, and that of {ours.name} is {mine}; "
                "choose a checkpoint of the same model"
            )


def _check_tokens(checkpoint: Checkpoint, texts: Texts) -> None:
    largest, vocabulary = max(texts.tokens), checkpoint.text_config.vocab_size
    if largest >= vocabulary:
        raise ValueError(
            f"{checkpoint.directory}: the text has token {largest}, but the vocabulary has {vocabulary}"
        )


def _locked(directory: Path, checkpoint: Checkpoint) -> AbstractContextManager[int]:
    """One forward pass at a time in a directory: two would write over each other's hidden states."""
    doing = f"`mlx-m3 evaluate` is evaluating {checkpoint.directory} in {directory}"
    return locked(directory / LOCK, doing, "choose another --cache")
