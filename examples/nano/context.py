"""Time and memory of a prompt by its length: ours and stock, in mlx-lm and mlx-vlm.

    python examples/nano/context.py build/nano/8bit      # writes docs/nano/context.md and context.png

Each prompt is a child process of its own, the ways in turn at every length; the numbers are those that the
libraries report themselves: tokens per second of the prompt, and MLX's peak memory.  Needs matplotlib.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from plots import plot, write_page

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
OFF = {"MLX_M3_PLUGIN": "off"}
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "mlx-lm with the plugin": ("mlx_lm", {}),
    "stock mlx-lm": ("mlx_lm", OFF),
    "mlx-vlm with the plugin": ("mlx_vlm", {}),
    "stock mlx-vlm": ("mlx_vlm", OFF),
}
# Of one prompt: seconds and MiB.
Cost = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        library, tokens = arguments.one
        measure = with_mlx_lm if library == "mlx_lm" else with_mlx_vlm
        print(json.dumps(measure(arguments.model, int(tokens))))
        return
    found: dict[str, dict[int, Cost]] = {way: {} for way in WAYS}
    for tokens in LENGTHS:
        for way, (library, environment) in WAYS.items():
            found[way][tokens] = in_a_child(arguments.model, library, tokens, environment)
            print(f"{tokens:>6}  {way:24}  {found[way][tokens]}", flush=True)
    write_page("context.md", page(found))
    draw(found)


def in_a_child(model: Path, library: str, tokens: int, environment: dict[str, str]) -> Cost:
    command = [sys.executable, __file__, str(model), "--one", library, str(tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | environment)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def prompt_of(tokens: int) -> list[int]:
    """Pieces of text at random, the same for all."""
    rng = random.Random(tokens)
    return [rng.randrange(300, 1200) for _ in range(tokens)]


def with_mlx_lm(model: Path, tokens: int) -> Cost:
    from mlx_lm import load, stream_generate

    loaded, tokenizer = load(str(model))[:2]
    *_, last = stream_generate(loaded, tokenizer, prompt_of(tokens), max_tokens=2)
    return last.prompt_tokens / last.prompt_tps, last.peak_memory * 1e9 / (1 << 20)


def with_mlx_vlm(model: Path, tokens: int) -> Cost:
    import mlx.core as mx
    from mlx_vlm import load, stream_generate

    loaded, processor = load(str(model))
    ids = mx.array([prompt_of(tokens)])
    *_, last = stream_generate(loaded, processor, "", input_ids=ids, max_tokens=2, temperature=0.0)
    return last.prompt_tokens / last.prompt_tps, last.peak_memory * 1e9 / (1 << 20)


def page(found: dict[str, dict[int, Cost]]) -> Iterator[str]:
    yield "# What a prompt costs, by its length"
    yield ""
    yield "`python examples/nano/context.py`: M3-nano in 8 bits, on the CPU; seconds and peak MiB,"
    yield "all four in turn at each length. The first of the four layers attends to everything, with all"
    yield "scores in memory on MLX's CPU (2,048 x 16,384 of 8 heads: 1 GiB): most of what grows is its."
    yield ""
    yield "| tokens | " + " | ".join(WAYS) + " |"
    yield "|--:|" + "--:|" * len(WAYS)
    for tokens in LENGTHS:
        costs = (found[way][tokens] for way in WAYS)
        yield f"| {tokens:,} | " + " | ".join(f"{s:.2f} s, {mib:,.0f}" for s, mib in costs) + " |"
    yield ""
    yield "![time and memory by context](context.png)"


def draw(found: dict[str, dict[int, Cost]]) -> None:
    with plot("context.png", 2, figsize=(10, 3.8)) as both:
        for part, (axes, label) in enumerate(zip(both, ("seconds", "peak memory, MiB"), strict=True)):
            for way, costs in found.items():
                style = "-" if "plugin" in way else "--"
                axes.plot(list(costs), [cost[part] for cost in costs.values()], style, marker=".", label=way)
            axes.set(xscale="log", yscale="log", xlabel="tokens in the prompt", ylabel=label)
            axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
