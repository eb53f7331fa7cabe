"""What a forward pass says of its text, and how it differs from a reference.  Sums are in float64."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..forward_pass import ForwardPass, HiddenStates, Texts
from ..streaming import Head

# Of float64 logits at a time, in some copies; with a vocabulary of 200,000 they take 1.6 MB a token.
_BYTES_OF_LOGITS = 256 << 20


@dataclass(frozen=True)
class Distributions:
    """How the next-token distributions of a checkpoint differ from a reference's.

    Attributes:
        kl_mean, kl_95: of KL(reference || this), in nats, over the positions that predict a token.
        top_1: fraction of positions where both have the same most likely token.
        ear: expected acceptance rate, the mean over positions of ``sum_v min(p_ref(v), p(v))``
            (arXiv 2605.02404): how often speculative sampling would accept this one's tokens.
    """

    kl_mean: float
    kl_95: float
    top_1: float
    ear: float


@dataclass(frozen=True)
class LayerComparison:
    """How a layer's output and choices differ from the reference's.

    Attributes:
        hidden_error: squared error of hidden states, relative to the reference's squares.
        router_overlap: fraction of the reference's experts that are chosen here too; None without a router.
        block_overlap: the same of key blocks, over the queries that could not attend all.
    """

    layer: int
    hidden_error: float
    router_overlap: float | None = None
    block_overlap: float | None = None


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        bytes: of the whole checkpoint on disk.
        distributions, layers: compared with the reference, if there is one.
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


def perplexity(hidden: HiddenStates, head: Head, texts: Texts) -> float:
    """``exp`` of the mean negative log-likelihood of each window's tokens after its first."""
    total = 0.0
    positions, targets = texts.predictions()
    for at, logits in _logits(hidden, head, positions):
        each = np.arange(len(logits))
        total += (_log_sums(logits) - logits[each, targets[at : at + len(logits)]]).sum()
    return math.exp(total / len(positions))


def compare_distributions(
    ours: tuple[HiddenStates, Head], reference: tuple[HiddenStates, Head], texts: Texts
) -> Distributions:
    positions, _ = texts.predictions()
    kl, top_1, ear = [], 0, 0.0
    pairs = zip(_logits(*reference, positions), _logits(*ours, positions), strict=True)
    for (_, expected), (_, found) in pairs:
        log_p = expected - _log_sums(expected)[:, None]
        log_q = found - _log_sums(found)[:, None]
        p = np.exp(log_p)
        kl.append((p * (log_p - log_q)).sum(axis=1))
        top_1 += int((expected.argmax(axis=1) == found.argmax(axis=1)).sum())
        ear += np.minimum(p, np.exp(log_q)).sum()
    every = np.concatenate(kl)
    return Distributions(
        float(every.mean()), float(np.percentile(every, 95)), top_1 / len(every), float(ear) / len(every)
    )


def compare_layers(ours: ForwardPass, reference: ForwardPass) -> Iterator[LayerComparison]:
    for number in range(ours.layers):
        found, expected = ours.layer(number), reference.layer(number)
        difference = found["sample"].astype(np.float64) - expected["sample"]
        error = (difference**2).mean() / max((expected["sample"].astype(np.float64) ** 2).mean(), 1e-30)
        router = _overlap(found.get("experts"), expected.get("experts"))
        yield LayerComparison(
            number, float(error), router, _overlap(found.get("blocks"), expected.get("blocks"))
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
    common = sum(((found == expected[:, i : i + 1]).any(axis=1) & (expected[:, i] >= 0)).sum()
                 for i in range(expected.shape[1]))  # fmt: skip
    return float(common / there)


def _logits(hidden: HiddenStates, head: Head, positions: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Float64 logits of consecutive parts of ``positions``, with the index of the first."""
    step, at = 1, 0
    while at < len(positions):
        part = positions[at : at + step]
        h = hidden.read(part[0], part[-1] + 1)[mx.array([p - part[0] for p in part])]
        logits = np.array(head(h).astype(mx.float32)).astype(np.float64)
        yield at, logits
        at += len(part)
        step = max(1, _BYTES_OF_LOGITS // logits[0].nbytes // 4)


def _log_sums(logits: np.ndarray) -> np.ndarray:
    largest = logits.max(axis=1)
    return largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
