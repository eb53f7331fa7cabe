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
from PIL import Image

# How many of a hundred conversations are of each kind.
SHARES = {"facts": 25, "sums": 15, "tools": 18, "needles": 25, "figures": 17}
QUESTIONS = {"facts": 8, "sums": 6, "tools": 4, "needles": 6, "figures": 3}
DRAW = {"facts": facts.draw, "sums": sums.draw, "tools": tools.draw, "figures": figures.draw}


@dataclass(frozen=True)
class Encoded:
    """``ids`` of a conversation and, for each, whether it is the model's to say.

    ``pictures`` has what the processor made of images or of a video: pixel values and grids, by name.
    """

    task: str
    ids: np.ndarray
    said: np.ndarray
    pictures: dict[str, np.ndarray]


class Encoder:
    """Conversations by a tokenizer with M3's chat template, and pictures by mlx-vlm's processor."""

    def __init__(self, tokenizer: Any, processor: Any = None):
        self.tokenizer = tokenizer
        self.processor = processor
        self._begins = tokenizer.encode("]~b]ai\n", add_special_tokens=False)
        self._ends = tokenizer.convert_tokens_to_ids("[e~[")

    def text(self, cases: Sequence[Case]) -> str:
        messages = [message for case in cases for message in (*case.messages, case.reply)]
        return self.tokenizer.apply_chat_template(messages, tools=cases[0].tools, tokenize=False)

    def encode(self, cases: Sequence[Case]) -> Encoded:
        """All that the model says is to be learned: replies, and calls before a result."""
        text, first = self.text(cases), cases[0]
        if not first.pictures:
            ids = np.array(self.tokenizer.encode(text, add_special_tokens=False))
            return Encoded(first.task, ids, self._said(ids), {})
        if first.is_video:
            given = {"videos": [np.stack(case.pictures) for case in cases]}
        else:
            given = {"images": [Image.fromarray(picture) for case in cases for picture in case.pictures]}
        made = {name: np.array(array) for name, array in self.processor(text=text, **given).items()}
        ids = made.pop("input_ids")[0]
        del made["attention_mask"]
        return Encoded(first.task, ids, self._said(ids), made)

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
    """One conversation of several questions; that of needles has up to ``longest`` tokens of hay.

    The template begins each with two hundred tokens that teach nothing: the more questions, the less waste.
    """
    (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
    if kind == "needles":
        return needles.draw(rng, rng.randrange(20, longest), count, QUESTIONS[kind])
    return DRAW[kind](rng, QUESTIONS[kind])
