"""Cases as token ids, with what is to be learned marked; several cases make one conversation."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import echo
import facts
import figures
import needles
import numpy as np
import sums
import tools
from case import Case, media
from sizes import BUDGET

# How many of a hundred conversations are of each kind, at full difficulty; there are more of echo before.
SHARES = {"echo": 6, "facts": 19, "sums": 13, "tools": 26, "needles": 18, "figures": 18}
MORE_ECHO = 60
QUESTIONS = {"echo": 6, "facts": 8, "sums": 12, "tools": 4, "needles": 6, "figures": 8}
# Of hay, in tokens.
SHORTEST, LONGEST = 16, round(8.5 * BUDGET)
# So many conversations are without the template's own two hundred tokens; before full difficulty, more are.
WITHOUT_PREAMBLE = 0.25


@dataclass(frozen=True)
class Encoded:
    """``ids`` of a conversation and, for each, whether it is the model's to say.

    ``pictures`` has what the processor made of images or of a video: pixel values and grids, by name.
    """

    task: str
    ids: np.ndarray
    said: np.ndarray
    pictures: dict[str, np.ndarray]


USER = "]~b]user\n"


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

    def encode(self, cases: Sequence[Case], preamble: bool = True) -> Encoded:
        """All that the model says is to be learned: replies, and calls before a result.

        Args:
            preamble: with all that the template says before the user's first word, tools among it.
        """
        text, first = self.text(cases), cases[0]
        if not preamble and first.tools is None:
            text = text[text.index(USER) :]
        if not first.pictures:
            ids = np.array(self.tokenizer.encode(text, add_special_tokens=False))
            return Encoded(first.task, ids, self._said(ids), {})
        made = {name: np.array(array) for name, array in self.processor(text=text, **media(cases)).items()}
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


def draw(rng: random.Random, difficulty: float, count: Callable[[str], int]) -> list[Case]:
    """One conversation of several questions.

    Copying is learned from short texts first: among few tokens it is found sooner that one is the answer.

    Args:
        difficulty: 0 is for beginners, 1 is what is to be reached.
        count: tokens of a text.
    """
    shares = SHARES | {"echo": SHARES["echo"] + MORE_ECHO * (1 - difficulty)}
    (kind,) = rng.choices(list(shares), list(shares.values()))
    questions = QUESTIONS[kind]
    if kind == "echo":
        return echo.draw(rng, questions, longest=round(7 + 17 * difficulty))
    if kind == "facts":
        return facts.draw(rng, questions, count=rng.randint(1, facts.PEOPLE))
    if kind == "needles":
        longest = SHORTEST + difficulty * (LONGEST - SHORTEST)
        return needles.draw(rng, round(rng.uniform(SHORTEST, longest)), count, questions)
    return {"sums": sums.draw, "tools": tools.draw, "figures": figures.draw}[kind](rng, questions)


def leaves_out_preamble(rng: random.Random, difficulty: float) -> bool:
    return rng.random() > difficulty * (1 - WITHOUT_PREAMBLE)
