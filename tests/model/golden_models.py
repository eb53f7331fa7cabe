"""The golden models of ``tests/golden``, loaded with stock mlx-lm, and how to compare with them."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, CacheList
from mlx_lm.utils import load_model

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = (
    "as_published",
    "published_spelling",
    "no_local_block",
    "two_local_blocks",
    "all_dense",
    "yarn",
)
TOLERANCE = 1e-4


@dataclass
class Golden:
    """One model and what transformers answers: ``logits[p]`` after ``tokens[: p + 1]``.

    Attributes:
        ties: positions at which the choice of blocks is a tie that nothing orders.
    """

    name: str
    model: Any
    tokens: np.ndarray
    logits: np.ndarray
    ties: list[int]

    def run(self, tokens: Any, cache: Any = None) -> np.ndarray:
        """Logits ``[L, vocab]`` of one row."""
        return np.array(self.model(mx.array(tokens)[None], cache)[0])

    def tokens_at(self, *positions: int) -> mx.array:
        """``[len(positions), 1]``: the next token of one row each."""
        return mx.array(self.tokens[list(positions)])[:, None]

    def check(self, logits: np.ndarray, start: int, *, stop: int | None = None) -> None:
        """``logits`` are those of the positions from ``start`` on, all of them."""
        expected = self.logits[start:stop]
        assert logits.shape == expected.shape
        difference = np.abs(logits - expected).max(axis=-1)
        difference[[p - start for p in self.ties if start <= p < start + len(difference)]] = 0
        worst = int(difference.argmax())
        assert difference[worst] < TOLERANCE, f"{difference[worst]:.2e} at position {start + worst}"


def files_of(name: str, directory: Path) -> Path:
    """A folder with the model's ``config.json`` and ``model.safetensors``."""
    weights = "as_published" if name == "published_spelling" else name
    shutil.copy(GOLDEN / name / "config.json", directory)
    shutil.copy(GOLDEN / weights / "model.safetensors", directory)
    return directory


def load_golden(name: str, directory: Path) -> Golden:
    model, _ = load_model(files_of(name, directory))
    answers = "as_published" if name == "published_spelling" else name
    golden = mx.load(str(GOLDEN / answers / "golden.safetensors"))
    tokens, logits, ties = (np.array(golden[key]) for key in ("tokens", "logits", "ties"))
    return Golden(name, model, tokens, logits, ties.tolist())


def batch_cache(model: Any, left_padding: list[int]) -> list[CacheList]:
    """An empty prompt cache for rows that are padded on the left."""
    return [CacheList(*(BatchKVCache(left_padding) for _ in layer.caches)) for layer in model.make_cache()]
