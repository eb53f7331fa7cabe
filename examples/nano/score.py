"""How many of the exercises a checkpoint does right, greedily, through stock mlx-lm and mlx-vlm.

    python examples/nano/score.py build/nano/8bit [--cases 200] [--seed 1000000] [--json FILE]

Held out: the exercises come from another seed than those of training.  A reply is right when its text, or its
calls with all their arguments, are exactly the expected ones.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import facts
import needles
import net
import sums
import tools
from case import Case

from mlx_m3_plugin.chat.reply import Reply, ReplyParser

BUDGET = net.BLOCK * net.TOP_K
LENGTHS = (1, 2, 4, 8)
MOST_TOKENS = 160

Answer = Callable[[Case], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--cases", type=int, default=200, help="of each task")
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    answer, count = with_mlx_lm(arguments.model)
    scores = {}
    for task, cases in held_out(arguments.cases, arguments.seed, count).items():
        scores[task] = sum(is_right(case, answer(case)) for case in cases) / len(cases)
        print(f"{task:>12}  {scores[task]:6.1%}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(scores, indent=1))


def held_out(cases: int, seed: int, count: Callable[[str], int]) -> dict[str, list[Case]]:
    """By task; needles by the prompt's length in block budgets."""
    rng = random.Random(seed)
    drawn = {
        "facts": [facts.draw(rng)[0] for _ in range(cases)],
        "sums": [sums.draw(rng)[0] for _ in range(cases)],
    }
    for task in ("call", "no call", "result"):
        of_task = (case for case in _endless(tools.draw, rng) if case.task == task)
        drawn[task] = [next(of_task) for _ in range(cases)]
    for times in LENGTHS:
        of_length = [needles.draw(rng, times * BUDGET, count)[0] for _ in range(cases)]
        drawn[f"needles {times}x"] = of_length
    return drawn


def _endless(draw: Callable[[random.Random], list[Case]], rng: random.Random) -> Iterator[Case]:
    while True:
        yield from draw(rng)


def is_right(case: Case, text: str) -> bool:
    reply = read(text, case.tools)
    calls = [{"name": call.name, "arguments": call.arguments} for call in reply.calls]
    wanted = [call["function"] for call in case.reply.get("tool_calls", ())]
    return calls == wanted and reply.content.strip() == case.reply["content"]


def read(text: str, offered: Any) -> Reply:
    parser, reply = ReplyParser(offered), Reply()
    for event in (*parser.feed(text), *parser.finish()):
        reply.add(event)
    return reply


def with_mlx_lm(model: Path) -> tuple[Answer, Callable[[str], int]]:
    from mlx_lm import generate, load

    loaded, tokenizer = load(str(model))[:2]

    def answer(case: Case) -> str:
        prompt = tokenizer.apply_chat_template(case.messages, tools=case.tools, add_generation_prompt=True)
        return generate(loaded, tokenizer, prompt, max_tokens=MOST_TOKENS)

    return answer, lambda text: len(tokenizer.encode(text, add_special_tokens=False))


if __name__ == "__main__":
    sys.exit(main())
