"""Saying again what was said: of little use, but from it attention learns to copy, which all else needs.

Of every other exercise only a token or two tell whether the model has looked into the prompt; here all do.
"""

import random

from case import Case, says, user
from facts import NAMES, THINGS

WORDS = (*NAMES, *(thing for things in THINGS.values() for thing in things))


def draw(rng: random.Random, questions: int = 1, longest: int = 24) -> list[Case]:
    """Of up to ``longest`` words and numbers each."""
    return [_one(rng, longest) for _ in range(questions)]


def _one(rng: random.Random, longest: int) -> Case:
    said = " ".join(_item(rng) for _ in range(rng.randrange(1, longest + 1)))
    return Case("echo", [user(f"Say this again: {said}")], says(said))


def _item(rng: random.Random) -> str:
    return rng.choice(WORDS) if rng.random() < 0.7 else str(rng.randrange(1000))
