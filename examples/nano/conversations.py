"""Cases as token ids, with what is to be learned marked; several cases make one conversation."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import facts
import figures
import needles
import numpy as np
import sums
import tools
from case import Case

# How many of a hundred conversations are of each kind.
SHARES = {"facts": 25, "sums": 15, "tools": 25, "needles": 20, "figures": 15}


@dataclass(frozen=True)
class Encoded:
    """``ids`` of a conversation and, for each, whether it is the model's to say; its pictures, if any."""

    task: str
    ids: np.ndarray
    said: np.ndarray
    pictures: Sequence[np.ndarray] = ()
    is_video: bool = False


class Encoder:
    """Conversations by a tokenizer with M3's chat template."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._begins = tokenizer.encode("]~b]ai\n", add_special_tokens=False)
        self._ends = tokenizer.convert_tokens_to_ids("[e~[")

    def text(self, cases: Sequence[Case]) -> str:
        messages = [message for case in cases for message in (*case.messages, case.reply)]
        return self.tokenizer.apply_chat_template(messages, tools=cases[0].tools, tokenize=False)

    def encode(self, cases: Sequence[Case]) -> Encoded:
        """The last message of a tool's conversation is learned, and its calls before it."""
        ids = np.array(self.tokenizer.encode(self.text(cases), add_special_tokens=False))
        return Encoded(cases[0].task, ids, self._said(ids), cases[0].pictures, cases[0].is_video)

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def _said(self, ids: np.ndarray) -> np.ndarray:
        said, length = np.zeros(len(ids), bool), len(self._begins)
        for start in range(len(ids) - length):
            if list(ids[start : start + length]) == self._begins:
                end = start + length
                while end < len(ids) and ids[end] != self._ends:
                    end += 1
                said[start + length : end + 1] = True
        return said


def draw(rng: random.Random, longest: int, count: Callable[[str], int]) -> list[Case]:
    """One conversation of several questions; that of needles has up to ``longest`` tokens of hay."""
    (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
    if kind == "needles":
        return needles.draw(rng, rng.randrange(20, longest), count, questions=4)
    if kind == "figures":
        return figures.draw(rng)
    return {"facts": facts.draw, "sums": sums.draw, "tools": tools.draw}[kind](rng, questions=4)
