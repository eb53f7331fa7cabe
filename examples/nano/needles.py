"""One or several facts in a text of many times the block budget, and a question for one of them."""

import random
from collections.abc import Callable
from pathlib import Path

from case import Case, says, user
from facts import NAMES
from tokenizers import Tokenizer

HAY = (
    "the river is long",
    "the road goes to the hill",
    "a bird sits on the roof",
    "the rain came in the night",
    "the wind is cold",
    "some boats are on the lake",
    "the shop opens at noon",
    "the garden is green",
    "the old bridge was closed",
    "two trees stand by the gate",
)
MOST_NEEDLES = 6


def token_counter(model: Path) -> Callable[[str], int]:
    """For :func:`draw`: the tokens of a text by a checkpoint's tokenizer."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text).ids)


def draw(rng: random.Random, tokens: int, count: Callable[[str], int], questions: int = 1) -> list[Case]:
    """A prompt of about ``tokens`` tokens, by ``count`` of a text; needles are anywhere in it.

    None is asked for twice, so there may be fewer questions: the second answer could be had from the first.
    """
    codes = {
        name: f"{rng.randrange(100, 1000)}" for name in rng.sample(NAMES, rng.randrange(1, MOST_NEEDLES + 1))
    }
    needles = [f"The {_told(name, codes)}." for name in codes]
    sentences: list[str] = []
    room = tokens - count(" ".join(needles))
    while room > 0:
        sentences.append(f"{rng.choice(HAY).capitalize()}.")
        room -= count(sentences[-1])
    for needle in needles:
        sentences.insert(rng.randrange(len(sentences) + 1), needle)
    cases = _questions(rng, codes, questions)
    cases[0].messages[0]["content"] = f"{' '.join(sentences)} {cases[0].messages[0]['content']}"
    return cases


def _questions(rng: random.Random, codes: dict[str, str], most: int) -> list[Case]:
    """Each for one code, or for two."""
    left, cases = rng.sample(list(codes), len(codes)), []
    while left and len(cases) < most:
        count = rng.randrange(1, 3)
        asked, left = left[:count], left[count:]
        answer = " and the ".join(_told(name, codes) for name in asked)
        question = f"What is the code of {' and '.join(asked)}?"
        cases.append(Case("needles", [user(question)], says(f"The {answer}.")))
    return cases


def _told(name: str, codes: dict[str, str]) -> str:
    return f"code of {name} is {codes[name]}"
