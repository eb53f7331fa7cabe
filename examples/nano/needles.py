"""One or several facts in a text of many times the block budget, and a question for one of them."""

import random
from collections.abc import Callable

from case import Case, says, user
from facts import NAMES

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
MOST_NEEDLES = 4


def draw(rng: random.Random, tokens: int, count: Callable[[str], int], questions: int = 1) -> list[Case]:
    """A prompt of about ``tokens`` tokens, by ``count`` of a text; needles are anywhere in it."""
    codes = {
        name: f"{rng.randrange(100, 1000)}" for name in rng.sample(NAMES, rng.randrange(1, MOST_NEEDLES + 1))
    }
    needles = [f"The code of {name} is {code}." for name, code in codes.items()]
    sentences: list[str] = []
    room = tokens - count(" ".join(needles))
    while room > 0:
        sentences.append(f"{rng.choice(HAY).capitalize()}.")
        room -= count(sentences[-1])
    for needle in needles:
        sentences.insert(rng.randrange(len(sentences) + 1), needle)
    cases = [_question(rng, codes) for _ in range(questions)]
    cases[0].messages[0]["content"] = f"{' '.join(sentences)} {cases[0].messages[0]['content']}"
    return cases


def _question(rng: random.Random, codes: dict[str, str]) -> Case:
    """For one code, or for two."""
    asked = rng.sample(list(codes), min(len(codes), rng.randrange(1, 3)))
    answer = " and ".join(codes[name] for name in asked)
    return Case("needles", [user(f"What is the code of {' and '.join(asked)}?")], says(f"{answer}."))
