"""The training's log as a plot.

python examples/nano/plot_log.py build/nano        # writes docs/nano/training.jsonl and training.png
"""

import argparse
import json
import shutil
from pathlib import Path

from plots import OUTPUT, plot

# One line of the log is noisy: so many of them make a point.
LINES = 5
NOT_TASKS = ("step", "seconds", "tokens", "index", "prompt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.directory / "log.jsonl", OUTPUT / "training.jsonl")
    log = [json.loads(line) for line in (OUTPUT / "training.jsonl").read_text().splitlines()]
    draw(log)


def draw(log: list[dict[str, float]]) -> None:
    with plot("training.png", 2, figsize=(10, 3.8), width_ratios=[2, 1]) as (of_tasks, of_index):
        for task in sorted({name for line in log for name in line} - set(NOT_TASKS)):
            of_tasks.plot(*smoothed(log, task), label=task, linewidth=1)
        of_tasks.set(yscale="log", ylim=(1e-4, None), xlabel="steps", ylabel="loss of what is said, by task")
        of_tasks.legend(frameon=False, fontsize=8)
        for name, label in (("index", "indexer: KL from the attention"), ("prompt", "text of prompts")):
            of_index.plot(*smoothed(log, name), label=label, linewidth=1)
        of_index.set(xlabel="steps", ylim=(0, 1.5))
        of_index.legend(frameon=False, fontsize=8)


def smoothed(log: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    seen = [(line["step"], line[name]) for line in log if name in line]
    groups = [seen[start : start + LINES] for start in range(0, len(seen), LINES)]
    return [g[-1][0] for g in groups], [sum(value for _, value in g) / len(g) for g in groups]


if __name__ == "__main__":
    main()
