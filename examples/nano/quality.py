"""What fewer bits cost M3-nano: task scores beside the perplexity and divergence of ``mlx-m3 evaluate``.

    python examples/nano/quality.py build/nano --cases 50     # writes docs/nano/quality.md and quality.png

Made of the float weights: plain 8, 6, 4, 3 and 2 bits, and every recipe that there is.  What is finished is
kept in build/nano/quality, and the same command goes on from there.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import conversations
import vocabulary
from plots import plot, write_page
from tokenizers import Tokenizer

from mlx_m3_plugin.toolbox.convert.recipe import recipe_names

HERE = Path(__file__).parent
BITS = (8, 6, 4, 3, 2)
SEED = 2_000_000
# Of the text for perplexity and divergence; tokens of each.
CONVERSATIONS = 60
WINDOW = 512
# tests/nano/test_measurements.py holds these against the recipes' plans.
WHAT_FOUR_LAYERS_HIDE = """\
**M3-nano is too small to tell some recipes apart.** Do not read these rows as what the recipes do to an
M3 of 60 layers:

- `config-i` is an 8-bit recipe here. It gives 8 bits to the first and last two layers, and nano has four
  layers. Not one weight gets the 2 or 3 bits that most of a real M3 gets; the row differs from `8bit` in
  router and indexer alone.
- `oq2`, `oq2.5` and `oq2.7` are the same checkpoint, byte for byte, and so are `oq3` and `oq3.5`. These
  recipes spend a budget of bits per weight. Nano's vision tower stays in float and is a large part of it, so
  that nano is above every such budget (6.4 bits per weight with `oq2`) before anything is spent. `oq4`, `oq5`
  and `oq6` spend nothing either."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--cases", type=int, default=50, help="of each task")
    arguments = parser.parse_args()
    made = arguments.directory / "quality"
    made.mkdir(exist_ok=True)
    whole = arguments.directory / "float"
    text = made / "text.txt"
    text.write_text(held_out_text(whole), encoding="utf-8")
    rows = {"float32": measured(whole, whole, text, made / "float32.json", arguments.cases)}
    for name, recipe in recipes(made).items():
        target = made / name
        if not target.exists():
            run("-m", "mlx_m3_plugin", "convert", str(whole), str(target), "--recipe", recipe)
        rows[name] = measured(target, whole, text, made / f"{name}.json", arguments.cases)
    write_page("quality.md", page(rows, arguments.cases))
    draw(rows)


def recipes(directory: Path) -> dict[str, str]:
    """By what they are called here: names and files of recipes."""
    found = {}
    for bits in BITS:
        file = directory / f"plain-{bits}.toml"
        file.write_text(f'summary = "{bits} bits everywhere"\n[default]\nbits = {bits}\ngroup_size = 64\n')
        found[f"plain-{bits}"] = str(file)
    return found | {name: name for name in recipe_names()}


def held_out_text(model: Path) -> str:
    """The first ``WINDOW`` tokens of conversations of a seed of their own; none has pictures.

    Evaluation cuts its text into windows: so each of them begins as the model has seen conversations begin.
    """
    tokenizer = vocabulary.with_template(Tokenizer.from_file(str(model / "tokenizer.json")))
    encoder, rng = conversations.Encoder(tokenizer), random.Random(SEED)
    texts: list[str] = []
    while len(texts) < CONVERSATIONS:
        cases = conversations.draw(rng, 1.0, encoder.count)
        if cases[0].pictures:
            continue
        begins = tokenizer.encode(encoder.text(cases), add_special_tokens=False)[:WINDOW]
        text = tokenizer.decode(begins)
        # A word that was cut may be other tokens alone.
        if len(begins) == WINDOW == encoder.count(text):
            texts.append(text)
    return "".join(texts)


def measured(model: Path, reference: Path, text: Path, kept: Path, cases: int) -> dict[str, Any]:
    if not kept.exists():
        evaluation, scores = kept.with_suffix(".evaluation"), kept.with_suffix(".scores")
        against = [] if model == reference else ["--reference", str(reference)]
        options = ["--text", str(text), "--context", str(WINDOW), "--json"]
        with evaluation.open("w") as output:
            run("-m", "mlx_m3_plugin", "evaluate", str(model), *against, *options, output=output)
        options = ["--text-by", "mlx_lm_in_batches", "--cases", str(cases), "--json", str(scores)]
        run(str(HERE / "score.py"), str(model), *options)
        found = {"evaluation": json.loads(evaluation.read_text()), "scores": json.loads(scores.read_text())}
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def run(*arguments: str, output: TextIO | None = None) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=output)


def page(rows: dict[str, dict[str, Any]], cases: int) -> Iterator[str]:
    tasks = list(next(iter(rows.values()))["scores"])
    yield "# What fewer bits cost: the cheap numbers and the real ones"
    yield ""
    yield f"`python examples/nano/quality.py`: M3-nano, {cases} held-out cases of each task, greedily;"
    yield "perplexity and divergence from float32 by `mlx-m3 evaluate` on held-out conversations."
    yield ""
    yield WHAT_FOUR_LAYERS_HIDE
    yield ""
    yield "| | MiB | perplexity | KL | same top token | all tasks | " + " | ".join(tasks) + " |"
    yield "|---|" + "--:|" * (5 + len(tasks))
    for name, row in rows.items():
        yield "| " + " | ".join([name, *cells(row, tasks)]) + " |"
    yield ""
    yield "![task scores by divergence](quality.png)"


def cells(row: dict[str, Any], tasks: list[str]) -> Iterator[str]:
    found, against = row["evaluation"], row["evaluation"]["distributions"]
    yield f"{found['bytes'] / (1 << 20):.2f}"
    yield f"{found['perplexity']:.4f}"
    yield f"{against['kl_mean']:.6f}" if against else "-"
    yield f"{against['top_1']:.2%}" if against else "-"
    yield f"{mean(row):.1%}"
    yield from (f"{row['scores'][task]:.0%}" for task in tasks)


def mean(row: dict[str, Any]) -> float:
    return sum(row["scores"].values()) / len(row["scores"])


def draw(rows: dict[str, dict[str, Any]]) -> None:
    with plot("quality.png", figsize=(9, 4.6)) as (axes,):
        for (kl, right), names in places(rows).items():
            axes.plot(kl, right, "o", color="C0")
            told = {"rotation": -45, "rotation_mode": "anchor", "va": "top", "fontsize": 7}
            offset = {"xytext": (2, -6), "textcoords": "offset points"}
            axes.annotate(", ".join(names), (kl, right), **offset, **told)
        axes.set(xscale="log", xlim=(2e-6, 30), ylim=(0, 105))
        axes.set(xlabel="KL divergence from float32", ylabel="right answers, all tasks, %")


def kl_of(row: dict[str, Any]) -> float:
    return row["evaluation"]["distributions"]["kl_mean"]


def places(rows: dict[str, dict[str, Any]]) -> dict[tuple[float, float], list[str]]:
    """Names by divergence and right answers; what is hardly apart is one place."""
    found: dict[tuple[float, float], list[str]] = {}
    judged = {name: row for name, row in rows.items() if row["evaluation"]["distributions"]}
    for name, row in sorted(judged.items(), key=lambda item: kl_of(item[1])):
        kl, right = kl_of(row), 100 * mean(row)
        near = [at for at in found if kl < 1.4 * at[0] and abs(right - at[1]) < 3]
        found.setdefault(near[-1] if near else (kl, right), []).append(name)
    return found


if __name__ == "__main__":
    main()
