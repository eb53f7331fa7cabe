"""``mlx-m3 demo`` from its arguments to what it says."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import demo, nano
from .demo_vision import PICTURE
from .layouts import LAYOUTS


def list_layouts() -> dict[str, str]:
    """The title of each layout by its name."""
    return {name: layout.title for name, layout in LAYOUTS.items()}


def demo_command(
    directory: str,
    *,
    bits: int | None = None,
    layout: str | None = None,
    random: bool = False,
    seed: int | None = None,
    vision: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """What to print, as JSON and as lines.

    Raises:
        OSError, ValueError: it cannot be written; options do not go together.
    """
    if random:
        if bits is not None or layout is not None:
            raise ValueError("--bits and --layout are for the trained model, not for --random")
        made = demo.write_demo(directory, seed or 0, vision)
        size = f"{made.parameters / 1e6:.1f} M parameters"
        lines = [f"Wrote a random MiniMax-M3 of {size} to {made.path}", *_to_try(made.path, made.vision)]
        return asdict(made), lines
    if seed is not None or vision:
        raise ValueError("--seed and --vision are for --random; the trained model sees as it is")
    if bits is not None and layout is not None:
        raise ValueError("a layout has bits of its own: give --bits or --layout")
    written = nano.write_nano(directory, nano.STORED_BITS if bits is None else bits, layout)
    sees = layout is None or LAYOUTS[layout].has_vision
    told = f"Wrote M3-nano ({written.kind}, {written.bytes / (1 << 20):.1f} MiB) to {written.path}"
    return asdict(written), [told, *_to_try(written.path, sees)]


def _to_try(path: str, sees: bool) -> list[str]:
    """Stock command lines, ready to paste, with headings."""
    model = f"--model {shlex.quote(path)}"
    question = '"Anna lives in Rome. The nurse is Ben. Ben likes rice. Who is the nurse?"'
    lines = ["Try it with stock mlx-lm:", f"  mlx_lm.generate {model} --prompt {question} --max-tokens 40"]
    if sees:
        image = f"--image {shlex.quote(str(Path(path) / PICTURE))}"
        question = '"What is in the picture?"'
        lines += [
            "and with stock mlx-vlm:",
            f"  mlx_vlm.generate {model} {image} --prompt {question} --max-tokens 40",
        ]
    return lines
