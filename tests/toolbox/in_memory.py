"""What evaluation finds, computed with the whole model in memory."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

from mlx_m3_plugin.toolbox.checkpoint import open_checkpoint
from mlx_m3_plugin.toolbox.evaluate import Evaluation
from mlx_m3_plugin.toolbox.evaluate import evaluate as evaluate_checkpoints
from mlx_m3_plugin.toolbox.forward_pass import Texts

# As in the comparison with transformers.
TIE = 1e-5


def evaluate(path: Path, texts: Texts, reference: Path | None = None, **options: Any) -> Evaluation:
    theirs = None if reference is None else open_checkpoint(reference)
    return evaluate_checkpoints(open_checkpoint(path), texts, reference=theirs, **options)


def log_probabilities(directory: Path, texts: Texts) -> np.ndarray:
    """Of every prediction, by the model in memory, in float32 as the CPU needs it; float64."""
    model, _ = load_model(directory)
    model.set_dtype(mx.float32)
    logits = [
        np.array(model(mx.array([list(window)]), cache=model.make_cache())[0, :-1].astype(mx.float32))
        for window in texts.windows
    ]
    rows = np.concatenate(logits).astype(np.float64)
    largest = rows.max(axis=1, keepdims=True)
    return rows - largest - np.log(np.exp(rows - largest).sum(axis=1, keepdims=True))


def directly(directory: Path, reference: Path, texts: Texts) -> dict[str, float]:
    return compared(log_probabilities(directory, texts), log_probabilities(reference, texts), texts)


def share_of_ties(directory: Path, reference: Path, texts: Texts) -> float:
    """Of positions where rounding decides which of two tokens is the likeliest, in either of them."""
    twos = [np.sort(log_probabilities(d, texts), axis=1)[:, -2:] for d in (directory, reference)]
    closest = np.minimum(*(two[:, 1] - two[:, 0] for two in twos))
    return float((closest < TIE).mean())


def compared(log_q: np.ndarray, log_p: np.ndarray, texts: Texts) -> dict[str, float]:
    """``log_q`` beside the reference's ``log_p``."""
    targets = [token for window in texts.windows for token in window[1:]]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return {
        "perplexity": math.exp(-log_q[np.arange(len(targets)), targets].mean()),
        "kl_mean": float(kl.mean()),
        "kl_95": float(np.percentile(kl, 95)),
        "top_1": (log_p.argmax(axis=1) == log_q.argmax(axis=1)).mean(),
        "ear": np.minimum(np.exp(log_p), np.exp(log_q)).sum(axis=1).mean(),
    }
