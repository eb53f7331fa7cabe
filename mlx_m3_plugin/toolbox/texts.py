"""The text that a checkpoint is judged or measured by, as windows of tokens."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Texts:
    """Windows of tokens, each read from its own beginning.

    Attributes:
        windows: token ids; all of one length but the last.
    """

    windows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> list[int]:
        return [token for window in self.windows for token in window]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each window begins and ends among all tokens."""
        ends = np.cumsum([len(window) for window in self.windows]).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def predictions(self) -> tuple[list[int], list[int]]:
        """Positions that predict a token of their window, and those tokens."""
        positions = [p for first, last in self.spans for p in range(first, last - 1)]
        tokens = self.tokens
        return positions, [tokens[position + 1] for position in positions]

    def key(self) -> str:
        return hashlib.sha256(repr(self.windows).encode()).hexdigest()


def built_in_text() -> str:
    """Prose in several languages, code and tool calls, written for this purpose."""
    return (files(__package__) / "calibration.txt").read_text(encoding="utf-8")


def read_texts(checkpoint: Path, text: str, tokens: int | None, context: int) -> Texts:
    """Cut ``text`` into windows of ``context`` tokens, ``tokens`` of them in all.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the text has too few tokens, or the checkpoint no tokenizer.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is no directory")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # The readers of its files have exceptions of all kinds.
    except Exception as error:
        raise ValueError(f"{checkpoint} has no tokenizer that can be read: {error}") from error
    # Not verbose: it would warn that the text is longer than the model's context, which it is cut for.
    return cut(tokenizer.encode(text, add_special_tokens=False, verbose=False), tokens, context)


def cut(ids: list[int], tokens: int | None, context: int) -> Texts:
    if context < 2:
        raise ValueError("a window has to have two tokens at least")
    if tokens is not None and len(ids) < tokens:
        raise ValueError(f"the text has {len(ids):,} tokens, fewer than the {tokens:,} that are asked for")
    ids = ids[:tokens]
    windows = [tuple(ids[start : start + context]) for start in range(0, len(ids), context)]
    # One token predicts nothing.
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError("the text has less than two tokens")
    return Texts(tuple(windows))
