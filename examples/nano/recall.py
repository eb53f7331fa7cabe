"""How many needles are found by the length of the prompt: ours, transformers, stock mlx-vlm, dense attention.

    python examples/nano/recall.py build/nano --cases 100     # writes docs/nano/recall.md and recall.png

The same prompts and float32 weights for all; each way is a child process of its own.  Needs torch and
matplotlib.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from plots import plot, write_page
from sizes import BUDGET

HERE = Path(__file__).parent
# Of prompts, in block budgets.  Training goes to 8.5.
LENGTHS = (1, 2, 4, 8, 16)
# Of each way: who answers, and in what environment.
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "transformers": ("transformers", {}),
    "mlx-lm with the plugin": ("mlx_lm", {}),
    "mlx-vlm with the plugin": ("mlx_vlm", {}),
    "stock mlx-lm": ("mlx_lm", {"MLX_M3_PLUGIN": "off"}),
    "stock mlx-vlm": ("mlx_vlm", {"MLX_M3_PLUGIN": "off"}),
    "dense attention": ("mlx_lm", {"MLX_M3_PLUGIN_ATTENTION": "dense"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--cases", type=int, default=100)
    arguments = parser.parse_args()
    found = {way: recall(arguments.directory / "float", arguments.cases, *WAYS[way]) for way in WAYS}
    write_page("recall.md", page(found, arguments.cases))
    draw(found)


def recall(model: Path, cases: int, by: str, environment: dict[str, str]) -> dict[int, float]:
    """By length in block budgets, the share that is right."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, str(HERE / "score.py"), str(model), "--by", by, "--tasks", "needles"]
        command += ["--lengths", *map(str, LENGTHS), "--cases", str(cases), "--json", file.name]
        run(command, environment)
        scores = json.loads(Path(file.name).read_text())
    return {int(task.split()[1].removesuffix("x")): score for task, score in scores.items()}


def run(command: list[str], environment: dict[str, str]) -> None:
    subprocess.run(command, check=True, env=os.environ | environment)


def page(found: dict[str, dict[int, float]], cases: int) -> Iterator[str]:
    lengths = list(next(iter(found.values())))
    yield "# Needles found, by the length of the prompt"
    yield ""
    yield f"`python examples/nano/recall.py`: M3-nano in float32, {cases} prompts of each length,"
    yield f"greedily; an answer is right when all its digits are. A query may attend to {BUDGET} tokens."
    yield "Lengths are of the text; M3's chat template puts 185 tokens before it, so all prompts are past the"
    yield "budget. Training had texts of up to 8.5 times the budget; longer ones are new to the model."
    yield ""
    yield "| | " + " | ".join(f"{length * BUDGET} tokens ({length}x)" for length in lengths) + " |"
    yield "|---|" + "--:|" * len(lengths)
    for way, scores in found.items():
        yield f"| {way} | " + " | ".join(f"{scores[length]:.1%}" for length in lengths) + " |"
    yield ""
    yield "![recall by context](recall.png)"


def draw(found: dict[str, dict[int, float]]) -> None:
    with plot("recall.png", figsize=(7, 3.6)) as (axes,):
        for way, scores in found.items():
            style = "--" if "plugin" not in way else "-"
            lengths = [length * BUDGET for length in scores]
            found_of_hundred = [100 * score for score in scores.values()]
            axes.plot(lengths, found_of_hundred, style, marker="o", label=way, alpha=0.8)
        axes.set(xlabel="tokens of text", ylabel="needles found, %", ylim=(0, 103), xscale="log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
