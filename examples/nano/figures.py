"""Pictures of one or two coloured figures, and videos of one that moves."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from case import Case, says, user

# Whole cells of merged patches: 28 pixels each way.
CELL = 28
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 220),
    "yellow": (235, 215, 50),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
BACKGROUND = (128, 128, 128)
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
FRAMES = 4


def draw(rng: random.Random, questions: int = 1) -> list[Case]:
    """All about pictures or, one time in two, all about videos; one of its own for each question."""
    kind = _picture if rng.random() < 0.5 else _video
    return [kind(rng) for _ in range(questions)]


def _picture(rng: random.Random) -> Case:
    """Two cells high, and two wide for each figure."""
    named, places = [], []
    for _ in range(rng.randrange(1, 3)):
        named.append((rng.choice(list(COLOURS)), rng.choice(SHAPES)))
        places.append((rng.randrange(18, 24), *(CELL + rng.randrange(-3, 4) for _ in "yx")))
    answer = " and ".join(f"a {colour} {shape}" for colour, shape in named)
    return Case(
        "picture",
        [_shown("image", "What is in the picture?")],
        says(f"{answer.capitalize()}."),
        pictures=[picture(named, places)],
    )


def picture(
    named: Sequence[tuple[str, str]], places: Sequence[tuple[int, int, int]] | None = None
) -> np.ndarray:
    """``[56, 56 * n, 3]``: colours and shapes side by side, each with its radius and middle in its cell."""
    painted = _blank(2 * CELL, 2 * CELL * len(named))
    for number, (colour, shape) in enumerate(named):
        radius, y, x = places[number] if places else (20, CELL, CELL)
        cell = painted[:, 2 * CELL * number : 2 * CELL * (number + 1)]
        _paint(cell, shape, (y, x), radius, COLOURS[colour])
    return painted


def _video(rng: random.Random) -> Case:
    """Two cells square; the figure crosses the middle, a third of the way in each frame."""
    direction, (down, right) = rng.choice(list(DIRECTIONS.items()))
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    middle, radius = CELL, rng.randrange(10, 14)
    aside = rng.randrange(-4, 5)
    frames = []
    for number in range(FRAMES):
        along = round((number / (FRAMES - 1) - 0.5) * 44)
        frame = _blank(2 * CELL, 2 * CELL)
        at = middle + down * along + abs(right) * aside, middle + right * along + abs(down) * aside
        _paint(frame, shape, at, radius, COLOURS[colour])
        frames.append(frame)
    return Case(
        "video",
        [_shown("video", "What moves where?")],
        says(f"Something {colour} moves {direction}."),
        pictures=frames,
        is_video=True,
    )


def _shown(kind: str, question: str) -> dict[str, Any]:
    return user([{"type": kind}, {"type": "text", "text": question}])


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def _paint(
    picture: np.ndarray, shape: str, middle: tuple[int, int], radius: int, colour: tuple[int, ...]
) -> None:
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    y, x = (y - middle[0]) / radius, (x - middle[1]) / radius
    inside = {
        "circle": x**2 + y**2 <= 1,
        "square": np.maximum(abs(x), abs(y)) <= 0.85,
        "triangle": (y <= 0.8) & (abs(x) <= (y + 1) / 1.8),
        "cross": (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
    }[shape]
    picture[inside] = colour
