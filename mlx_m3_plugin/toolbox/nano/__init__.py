"""M3-nano: a tiny MiniMax-M3 that was trained, and is part of this package.

It answers short questions about what the prompt says, adds, calls tools, finds needles far past its block
budget of 64 tokens, and names coloured figures.  ``examples/nano`` has its training; its model card is
``checkpoint/README.md``.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import open_checkpoint
from ..convert import convert, parse_recipe, plan_conversion
from ..layouts import LAYOUTS
from ..layouts.reading import source_of
from ..new_directory import new_directory
from ..suggestions import did_you_mean

CHECKPOINT = Path(__file__).with_name("checkpoint")
BITS = (2, 3, 4, 5, 6, 8)
STORED_BITS = 8
_MEMORY = 1 << 28


@dataclass(frozen=True)
class NanoReport:
    """What was written: where, bytes of weights, and as what (bits, or the name of a layout)."""

    path: str
    bytes: int
    kind: str


def write_nano(directory: str | Path, bits: int = STORED_BITS, layout: str | None = None) -> NanoReport:
    """Write M3-nano into ``directory``, which must not exist or be empty.

    Args:
        bits: of its weights, one of ``BITS``; 8 is what it was published with, the others are made of that.
        layout: a name of :data:`..layouts.LAYOUTS`, in place of ``bits``.

    Raises:
        FileExistsError: ``directory`` is not empty.
        ValueError: there are no such bits or there is no such layout.
    """
    if bits not in BITS:
        raise ValueError(f"{bits} bits? there are {', '.join(map(str, BITS))}")
    if layout is not None and layout not in LAYOUTS:
        meant = did_you_mean(layout, LAYOUTS)
        raise ValueError(f"there is no layout {layout}{meant}; `mlx-m3 demo --list-layouts` names them all")
    directory = Path(directory)
    with new_directory(directory, "demo") as unfinished:
        if layout is not None:
            LAYOUTS[layout].write(unfinished, source_of(CHECKPOINT))
        elif bits == STORED_BITS:
            shutil.copytree(CHECKPOINT, unfinished, dirs_exist_ok=True)
        else:
            _convert(unfinished, bits)
        written = sum(file.stat().st_size for file in unfinished.glob("*.safetensors"))
    return NanoReport(str(directory), written, layout or f"{bits} bits")


def _convert(directory: Path, bits: int) -> None:
    source = open_checkpoint(CHECKPOINT)
    recipe = parse_recipe(
        f"{bits} bits",
        f"[default]\nbits = {bits}\ngroup_size = 64\n[[rule]]\nparts = ['router']\nbits = 8\ngroup_size = 64",
        source.text_config,
    )
    made = directory / "made"
    convert(plan_conversion(source, recipe), made, memory=_MEMORY, progress=lambda *_: None)
    for file in made.iterdir():
        file.rename(directory / file.name)
    made.rmdir()
