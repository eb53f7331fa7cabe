"""How many forward passes M3-nano's draft head saves, in stock mlx-vlm, greedily.

    python examples/nano/draft_scores.py [MODEL] [--draft DIR] [--cases 20] [--drafted 2 7] [--output FILE]

The exercises are the held-out ones of ``score.py``.  Answers with drafts must be those without.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needles
from answers import MOST_TOKENS, prompt_of
from case import Case, media
from mlx_vlm import load, stream_generate
from mlx_vlm.speculative.drafters import load_drafter
from score import held_out

from mlx_m3_plugin.toolbox.demo import NANO

PAGE = """# Forward passes with M3-nano's draft head

`python examples/nano/draft_scores.py`: {cases} held-out exercises of each task in stock mlx-vlm with the
plugin, greedily. Every answer is the one without a draft. Tokens and passes are means of an answer; the pass
that reads the prompt counts, so without a draft there are as many passes as tokens.

{table}
"""


@dataclass
class Count:
    """Of some answers: tokens, and forward passes of the model, with that of the prompt."""

    answers: int = 0
    tokens: int = 0
    passes: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.answers + other.answers, self.tokens + other.tokens, self.passes + other.passes)

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes


class Drafts:
    """A model in mlx-vlm with its draft head."""

    def __init__(self, model: Path, head: Path):
        self.model, self.processor = load(str(model))
        self.head, self._kind = load_drafter(str(head))

    def answer(self, case: Case, drafted: int = 0) -> tuple[list[int], int]:
        """Token ids, and how many forward passes they took; ``drafted`` tokens in each round, or none."""
        given = media([case])
        shown: dict[str, Any] = {"image": given.get("images")}
        if case.is_video:
            shown = {"video": [video.transpose(0, 3, 1, 2) for video in given["videos"]]}
        if drafted:
            shown |= {"draft_model": self.head, "draft_kind": self._kind, "draft_block_size": drafted + 1}
        prompt = prompt_of(self.processor.tokenizer, case)
        said = {
            result.generation_tokens: int(result.token)
            for result in stream_generate(
                self.model, self.processor, prompt, max_tokens=MOST_TOKENS, temperature=0.0, **shown
            )
        }
        return list(said.values()), 1 + (len(self.head.accept_lens) if drafted else len(said) - 1)

    def count(self, cases: Sequence[Case], drafted: Sequence[int]) -> list[Count]:
        """For each of these numbers of drafted tokens.

        Raises:
            AssertionError: an answer is not that without a draft.
        """
        totals = [Count() for _ in drafted]
        for case in cases:
            expected, _ = self.answer(case)
            for number, each in enumerate(drafted):
                tokens, passes = self.answer(case, each)
                assert tokens == expected, case
                totals[number] += Count(1, len(tokens), passes)
        return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=NANO)
    parser.add_argument("--draft", type=Path, help="default: dspark/ of the model")
    parser.add_argument("--cases", type=int, default=20, help="of each task")
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--drafted", type=int, nargs="+", default=[2, 7], help="tokens in each round")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    drafts = Drafts(arguments.model, arguments.draft or arguments.model / "dspark")
    each = [f"passes, {n} drafted | tokens per pass" for n in arguments.drafted]
    lines = [
        f"| task | tokens | {' | '.join(each)} |",
        "|---|--:|" + "--:|" * 2 * len(arguments.drafted),
    ]
    total = [Count() for _ in arguments.drafted]
    for task, cases in held_out(
        arguments.cases, arguments.seed, needles.token_counter(arguments.model)
    ).items():
        counts = drafts.count(cases, arguments.drafted)
        lines.append(_line(task, counts))
        print(lines[-1], flush=True)
        total = [before + count for before, count in zip(total, counts, strict=True)]
    lines.append(_line("all", total))
    if arguments.output:
        arguments.output.write_text(PAGE.format(cases=arguments.cases, table="\n".join(lines)))
    print("", *lines, sep="\n")


def _line(task: str, counts: Sequence[Count]) -> str:
    """Of an answer on average."""
    first = counts[0]
    cells = [f"{c.passes / c.answers:.1f} | {c.tokens_per_pass:.2f}" for c in counts]
    return f"| {task} | {first.tokens / first.answers:.1f} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
