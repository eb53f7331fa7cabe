"""Adding and subtracting numbers of two digits, worked out in the reasoning."""

import random

from case import Case, says, user


def draw(rng: random.Random, questions: int = 1) -> list[Case]:
    return [_one(rng) for _ in range(questions)]


def _one(rng: random.Random) -> Case:
    first, second = sorted((rng.randrange(10, 100), rng.randrange(10, 100)), reverse=True)
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            first, second = second, first
        return _case(f"What is {first} + {second}?", *_added(first, second))
    return _case(f"What is {first} - {second}?", *_subtracted(first, second))


def _case(question: str, working: str, result: int) -> Case:
    return Case("sums", [user(question)], says(f"{result}", reasoning_content=working))


def _added(first: int, second: int) -> tuple[str, int]:
    """Units, the carry, tens: each step needs no more than two digits."""
    units = first % 10 + second % 10
    tens = first // 10 + second // 10
    steps = [f"{first % 10} + {second % 10} = {units}", f"{first // 10} + {second // 10} = {tens}"]
    if units >= 10:
        steps.append(f"{tens} + 1 = {tens + 1}")
    return ", ".join(steps), first + second


def _subtracted(first: int, second: int) -> tuple[str, int]:
    units, tens = first % 10, first // 10
    steps = []
    if units < second % 10:
        steps.append(f"{tens} - 1 = {tens - 1}")
        units, tens = units + 10, tens - 1
    steps += [
        f"{units} - {second % 10} = {units - second % 10}",
        f"{tens} - {second // 10} = {tens - second // 10}",
    ]
    return ", ".join(steps), first - second
