"""``mlx-m3 evaluate``: how good a checkpoint is, with one layer of it in memory at a time.

Sums are in float64.
"""

import json
import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from ..model.memory import default_memory
from .checkpoint import Checkpoint, open_checkpoint
from .common import Answer, Watch, layers_bar, size_in_words, text_of
from .forward_pass import (
    ForwardPass,
    Texts,
    default_cache,
    forward_pass,
    pass_key,
    read_texts,
)
from .new_directory import LOCK, check_can_write, locked, replace_text
from .streaming import Head

# Of float64 logits at a time, in some copies; with a vocabulary of 200,000 they take 1.6 MB a token.
_BYTES_OF_LOGITS = 256 << 20
_WORST = 5
# What is plotted of each layer.
_PANELS = {
    "hidden_error": "error of hidden states",
    "router_overlap": "experts in common",
    "block_overlap": "blocks in common",
}


def command(args: Namespace) -> Answer:
    picture = None if args.plot is None else Path(args.plot).expanduser()
    if picture is not None:
        if args.reference is None:
            raise ValueError("--plot compares layers; it needs --reference")
        check_can_draw(picture)
    ours = open_checkpoint(args.checkpoint)
    texts = read_texts(ours.directory, text_of(args.text), args.tokens, args.context)
    found = evaluate(
        ours,
        texts,
        reference=None if args.reference is None else open_checkpoint(args.reference),
        cache=None if args.cache is None else Path(args.cache).expanduser(),
        memory=(args.memory or default_memory()) // 2,
        watch=layers_bar,
    )
    if picture is not None:
        draw(found, picture)
    return Answer(found, report_lines(found))


class Evaluation(SimpleNamespace):
    """What was measured.

    Attributes:
        bytes: of the whole checkpoint on disk.
        context: the length of the longest window.
        reference, reference_perplexity: None if there is none.
        distributions, layers: compared with the reference: see :func:`compare_distributions`, None without
            one, and :func:`compare_layers`.
    """


def evaluate(
    ours: Checkpoint,
    texts: Texts,
    *,
    reference: Checkpoint | None = None,
    cache: Path | None = None,
    memory: int = 2 << 30,
    step: int = 512,
    watch: Watch = lambda title, layers: lambda *_: None,
) -> Evaluation:
    """Measure a checkpoint on ``texts``, and compare it with another.

    Args:
        reference: of the same model, usually the unquantized one.
        cache: where forward passes are kept, to be resumed and used again.
        memory: bytes that tokens may take in a layer.
        step: tokens of a window that attend at a time; the result does not depend on it.
        watch: makes a progress bar for each forward pass.

    Raises:
        BlockingIOError: another process evaluates the same.
        OSError: a checkpoint or the cache cannot be read or written.
        ValueError: the two have different shapes, or a hidden state is not a number.
    """
    cache = cache or default_cache()
    if reference is not None:
        _check_alike(ours, reference)
    largest, vocabulary = max(texts.tokens), ours.text_config.vocab_size
    if largest >= vocabulary:
        raise ValueError(
            f"{ours.directory}: the text has token {largest}, but the vocabulary has {vocabulary}"
        )

    def run(checkpoint: Checkpoint, directory: Path) -> ForwardPass:
        progress = watch(checkpoint.title, checkpoint.text_config.num_hidden_layers)
        return forward_pass(checkpoint, texts, directory, memory=memory, step=step, progress=progress)

    our_directory = cache / pass_key(ours, texts)
    # Both locks before anything is computed; the reference's only during its own pass, others may need it.
    with _locked(our_directory, ours):
        if reference is not None:
            their_directory = cache / pass_key(reference, texts)
            is_same = their_directory == our_directory
            with nullcontext() if is_same else _locked(their_directory, reference):
                their_pass = run(reference, their_directory)
                their_perplexity = _cached_perplexity(their_pass)
        our_pass = run(ours, our_directory)
    return Evaluation(
        checkpoint=ours.name,
        tokens=len(texts.tokens),
        windows=len(texts.windows),
        context=max(map(len, texts.windows)),
        bytes=ours.headers.nbytes,
        perplexity=perplexity(our_pass),
        reference=reference and reference.name,
        reference_perplexity=reference and their_perplexity,
        distributions=reference and compare_distributions(our_pass, their_pass),
        layers=list(compare_layers(our_pass, their_pass)) if reference else [],
    )


def _cached_perplexity(made: ForwardPass) -> float:
    """Computed once, and kept with the forward pass, which this process has locked."""
    file = made.directory / "perplexity.json"
    if not file.exists():
        replace_text(file, json.dumps(perplexity(made)))
    return float(json.loads(file.read_text(encoding="utf-8")))


def _check_alike(ours: Checkpoint, theirs: Checkpoint) -> None:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_local_experts", "index_block_size")
    for name in names:
        mine, other = getattr(ours.text_config, name), getattr(theirs.text_config, name)
        if mine != other:
            raise ValueError(
                f"--reference {theirs.name}: its {name} is {other}, and that of {ours.name} is {mine}; "
                "choose a checkpoint of the same model"
            )


def _locked(directory: Path, checkpoint: Checkpoint) -> AbstractContextManager[int]:
    """One forward pass at a time in a directory: two would write over each other's hidden states."""
    doing = f"`mlx-m3 evaluate` is evaluating {checkpoint.directory} in {directory}"
    return locked(directory / LOCK, doing, "choose another --cache")


# --- comparisons ---


def perplexity(made: ForwardPass) -> float:
    """``exp`` of the mean negative log-likelihood of each window's tokens after its first."""
    positions, targets = made.texts.predictions()
    total, rest = 0.0, iter(targets)
    for log_p in _log_probabilities(made, positions):
        total -= log_p[np.arange(len(log_p)), [*islice(rest, len(log_p))]].sum()
    return math.exp(total / len(positions))


def compare_distributions(ours: ForwardPass, reference: ForwardPass) -> SimpleNamespace:
    """How the next-token distributions of a checkpoint differ from a reference's.

    Returns:
        kl_mean, kl_95: of KL(reference || this), in nats, over the positions that predict a token.
        top_1: fraction of positions where both have the same most likely token.
        ear: expected acceptance rate, the mean over positions of ``sum_v min(p_ref(v), p(v))``
            (arXiv 2605.02404): how often speculative sampling would accept this one's tokens.
    """
    positions, _ = ours.texts.predictions()
    kl, top_1, ear = [], 0, 0.0
    both = (_log_probabilities(made, positions) for made in (reference, ours))
    for log_p, log_q in zip(*both, strict=True):
        p = np.exp(log_p)
        kl.append((p * (log_p - log_q)).sum(axis=1))
        top_1 += int((log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum())
        ear += np.minimum(p, np.exp(log_q)).sum()
    every = np.concatenate(kl)
    return SimpleNamespace(
        kl_mean=float(every.mean()),
        kl_95=float(np.percentile(every, 95)),
        top_1=top_1 / len(every),
        ear=float(ear) / len(every),
    )


def compare_layers(ours: ForwardPass, reference: ForwardPass) -> Iterator[SimpleNamespace]:
    """How each layer's output and choices differ from the reference's.

    Yields:
        hidden_error: squared error of hidden states, relative to the reference's squares.
        router_overlap: fraction of the reference's experts that are chosen here too; None without a router.
        block_overlap: the same of key blocks, over the queries that could not attend all.
    """
    for number in range(ours.checkpoint.text_config.num_hidden_layers):
        found, expected = ours.layer(number), reference.layer(number)
        difference = found["sample"].astype(np.float64) - expected["sample"]
        error = (difference**2).mean() / max((expected["sample"].astype(np.float64) ** 2).mean(), 1e-30)
        router, block = (_overlap(found.get(ids), expected.get(ids)) for ids in ("experts", "blocks"))
        yield SimpleNamespace(
            layer=number, hidden_error=float(error), router_overlap=router, block_overlap=block
        )


def _overlap(found: np.ndarray | None, expected: np.ndarray | None) -> float | None:
    """Fraction of the ids in the last axis of ``expected`` that are in ``found``'s; -1 is none."""
    if found is None or expected is None:
        return None
    found, expected = (a.reshape(-1, a.shape[-1]).astype(np.int64) for a in (found, expected))
    chosen = ((found >= 0).any(axis=1)) & ((expected >= 0).any(axis=1))
    found, expected = found[chosen], expected[chosen]
    there = (expected >= 0).sum()
    if not there:
        return None
    common = sum(((found == ids[:, None]).any(axis=1) & (ids >= 0)).sum() for ids in expected.T)
    return float(common / there)


def _log_probabilities(made: ForwardPass, positions: list[int]) -> Iterator[np.ndarray]:
    """Float64 ``[n, V]``, of consecutive parts of ``positions``."""
    head, hidden = Head(made.checkpoint), made.hidden_states()
    step, at = 1, 0
    while at < len(positions):
        part = positions[at : at + step]
        h = hidden.read(part[0], part[-1] + 1)[mx.array([p - part[0] for p in part])]
        logits = np.array(head(h).astype(mx.float32)).astype(np.float64)
        largest = logits.max(axis=1, keepdims=True)
        yield logits - (largest + np.log(np.exp(logits - largest).sum(axis=1, keepdims=True)))
        at += len(part)
        step = max(1, _BYTES_OF_LOGITS // logits[0].nbytes // 4)


# --- output ---


def report_lines(found: Evaluation) -> list[str]:
    lines = [
        f"{found.checkpoint}: {size_in_words(found.bytes)}",
        f"{found.tokens:,} tokens in {found.windows} windows of {found.context:,}",
        f"  perplexity  {found.perplexity:.4f}",
    ]
    if (different := found.distributions) is None:
        return lines
    lines[-1] += f", {found.perplexity / found.reference_perplexity - 1:+.2%} of the reference's"
    return [
        *lines,
        f"Against {found.reference} (perplexity {found.reference_perplexity:.4f})",
        f"  KL divergence  {different.kl_mean:.5f} on average, {different.kl_95:.5f} at the 95th percentile",
        f"  same top token {different.top_1:.2%}",
        f"  EAR            {different.ear:.4f} (1 is the reference itself, 0.99 is called lossless)",
        "",
        *_layer_lines(found.layers),
    ]


def _layer_lines(layers: list[SimpleNamespace]) -> list[str]:
    """All of few layers; of many those that differ most, the first and the last."""
    title = "Layer  hidden error  experts in common  blocks in common"
    if len(layers) > 2 * _WORST:
        by_router = sorted(layers, key=lambda layer: layer.router_overlap or 1)
        by_block = sorted(layers, key=lambda layer: layer.block_overlap or 1)
        shown = [*by_router[:_WORST], *by_block[:_WORST], layers[0], layers[-1]]
        layers = [layer for layer in layers if layer in shown]
        title += "   (those that differ most; --json has all)"
    cells = [
        f"{layer.layer:>5}  {layer.hidden_error:>12.6f}  {_percent(layer.router_overlap):>17}  "
        f"{_percent(layer.block_overlap):>16}"
        for layer in layers
    ]
    return [title, *cells]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def check_can_draw(path: Path) -> None:
    """See, before anything is computed, that a plot can be drawn and written to ``path``.

    Raises:
        ValueError: matplotlib is not installed, or cannot write such a file.
        OSError: the file cannot be written.
    """
    kinds = _figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot {path}: the name must end in .{', .'.join(kinds)}")
    check_can_write(path)


def _figure(**options: Any) -> Any:
    try:
        import matplotlib.figure
    except ModuleNotFoundError:
        raise ValueError('--plot needs matplotlib: pip install "mlx-m3-plugin[plot]"') from None
    return matplotlib.figure.Figure(**options)


def draw(found: Evaluation, path: Path) -> None:
    """Draw the error and the choices of each layer of an evaluation with a reference."""
    figure = _figure(figsize=(9, 9), layout="constrained")
    panels = figure.subplots(len(_PANELS), sharex=True)
    for axes, (name, title) in zip(panels, _PANELS.items(), strict=True):
        points = {layer.layer: getattr(layer, name) for layer in found.layers}
        points = {layer: value for layer, value in points.items() if value is not None}
        axes.plot([*points], [*points.values()], marker="o", markersize=3)
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[-1].set_xlabel("layer")
    figure.suptitle(
        f"{Path(found.checkpoint).name} against {Path(found.reference).name}: perplexity "
        f"{found.perplexity:.3f} ({found.reference_perplexity:.3f}), KL {found.distributions.kl_mean:.4f}, "
        f"EAR {found.distributions.ear:.4f}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
