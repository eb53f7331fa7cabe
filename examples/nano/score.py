"""How many of the exercises a checkpoint does right, greedily.

    python examples/nano/score.py build/nano/8bit                       # text by mlx-lm, pictures by mlx-vlm
    python examples/nano/score.py build/nano/float --by transformers    # all of it by one
        [--cases 200] [--seed 1000000] [--tasks facts sums] [--lengths 1 2 4 8]
        [--text-by mlx_lm_in_batches] [--json FILE]

Held out: the exercises come from another seed than those of training.  A reply is right when its text, or its
calls with all their arguments, are exactly the expected ones.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import facts
import figures
import needles
import sizes
import sums
import tools
from answers import WAYS, Answer
from case import Case

from mlx_m3_plugin.chat.reply import ReplyParser

# Of needles' prompts, in block budgets.
LENGTHS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--by", choices=WAYS, help="default: mlx_lm, and mlx_vlm for what has pictures")
    parser.add_argument("--text-by", choices=WAYS, default="mlx_lm", help="where --by is not given")
    parser.add_argument("--cases", type=int, default=200, help="of each task")
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only those that begin so")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=LENGTHS, help="of needles, in block budgets"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    count = needles.token_counter(arguments.model)
    drawn = held_out(arguments.cases, arguments.seed, count, arguments.lengths)
    with_pictures, text = arguments.by or "mlx_vlm", arguments.by or arguments.text_by
    answers = Answers(arguments.model, text, with_pictures)
    scores = {}
    for task, cases in drawn.items():
        if arguments.tasks and not task.startswith(tuple(arguments.tasks)):
            continue
        right = [is_right(case, text) for case, text in zip(cases, answers(cases), strict=True)]
        scores[task] = sum(right) / len(right)
        print(f"{task:>12}  {scores[task]:6.1%}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(scores, indent=1) + "\n")


class Answers:
    """Loads what cases need when they first need it."""

    def __init__(self, model: Path, text: str, with_pictures: str):
        self._model, self._text, self._with_pictures = model, text, with_pictures
        self._loaded: dict[str, Answer] = {}

    def __call__(self, cases: Sequence[Case]) -> list[str]:
        by = self._with_pictures if cases[0].pictures else self._text
        if by not in self._loaded:
            self._loaded[by] = WAYS[by](self._model)
        return self._loaded[by](cases)


def held_out(
    cases: int, seed: int, count: Callable[[str], int], lengths: Sequence[int] = LENGTHS
) -> dict[str, list[Case]]:
    """By task; needles by the prompt's length in block budgets.  Each task is drawn by a seed of its own."""
    drawn = {
        "facts": [facts.draw(rng)[0] for rng in _seeds("facts", seed, cases)],
        "sums": [sums.draw(rng)[0] for rng in _seeds("sums", seed, cases)],
    }
    for draw, tasks in ((tools.draw, ("call", "no call", "result")), (figures.draw, ("picture", "video"))):
        for task in tasks:
            drawn[task] = [_first(draw, rng, task) for rng in _seeds(task, seed, cases)]
    for times in lengths:
        task = f"needles {times}x"
        seeds = _seeds(task, seed, cases)
        drawn[task] = [needles.draw(rng, times * sizes.BUDGET, count)[0] for rng in seeds]
    return drawn


def _seeds(task: str, seed: int, cases: int) -> Iterator[random.Random]:
    return (random.Random(f"{task} {seed} {number}") for number in range(cases))


def _first(draw: Callable[[random.Random], list[Case]], rng: random.Random, task: str) -> Case:
    while True:
        (case,) = draw(rng)
        if case.task == task:
            return case


def is_right(case: Case, text: str) -> bool:
    parser = ReplyParser(case.tools)
    events = [*parser.feed(text), *parser.finish()]
    content = "".join(event.text for event in events if event.kind == "content")
    calls = [{"name": e.call.name, "arguments": e.call.arguments} for e in events if e.call]
    wanted = [call["function"] for call in case.reply.get("tool_calls", ())]
    return calls == wanted and content.strip() == case.reply["content"]


if __name__ == "__main__":
    sys.exit(main())
