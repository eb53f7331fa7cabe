"""``mlx-m3 demo``: write M3-nano, a tiny MiniMax-M3 that was trained and is part of this package.

It answers short questions about its prompt, adds numbers, calls tools, finds facts far past its block
budget of 64 tokens, and names coloured figures.  ``examples/nano`` has its training, and ``nano/README.md``
beside this file its model card.
"""

import shlex
import shutil
from argparse import Namespace
from pathlib import Path

from ..weights.quantization import AFFINE_BITS
from .checkpoint import open_checkpoint
from .common import Answer
from .convert.plan import plan_conversion, plan_draft_head
from .convert.recipe import parse_recipe
from .convert.run import write
from .new_directory import new_directory

NANO = Path(__file__).with_name("nano")
# In the checkpoint's directory, to show to the model.
PICTURE = "picture.png"
STORED_BITS = 8
_MEMORY = 1 << 28


def command(args: Namespace) -> Answer:
    bits = STORED_BITS if args.bits is None else args.bits
    size = write_nano(args.directory, bits)
    path = str(Path(args.directory))
    return Answer(
        {"path": path, "bytes": size, "bits": bits},
        [f"Wrote M3-nano ({bits} bits, {size / (1 << 20):.1f} MiB) to {path}", *_commands_to_try(path)],
    )


def write_nano(directory: str | Path, bits: int = STORED_BITS) -> int:
    """Write M3-nano into ``directory``, which must not exist or be empty, and return its bytes of weights.

    Args:
        bits: of its weights, one of ``AFFINE_BITS``.  It is stored in 8 bits; others are converted from that.

    Raises:
        FileExistsError: ``directory`` is not empty.
        ValueError: ``bits`` is not in ``AFFINE_BITS``.
    """
    if bits not in AFFINE_BITS:
        raise ValueError(f"--bits {bits}: must be one of {', '.join(map(str, AFFINE_BITS))}")
    with new_directory(Path(directory), "demo") as unfinished:
        if bits == STORED_BITS:
            shutil.copytree(NANO, unfinished, dirs_exist_ok=True)
        else:
            _convert(unfinished, bits)
        return sum(file.stat().st_size for file in unfinished.glob("*.safetensors"))


def _convert(directory: Path, bits: int) -> None:
    source = open_checkpoint(NANO)
    recipe = parse_recipe(
        f"{bits} bits",
        f"[default]\nbits = {bits}\ngroup_size = 64\n[[rule]]\nparts = ['router']\nbits = 8\ngroup_size = 64",
        source.text_config,
    )
    made = directory / "made"
    plan = plan_conversion(source, recipe, draft=plan_draft_head(source, recipe))
    with new_directory(made, "demo", resumable=True) as unfinished:
        write(plan, unfinished, memory=_MEMORY, progress=lambda *_: None)
    for file in made.iterdir():
        file.rename(directory / file.name)
    made.rmdir()


def _commands_to_try(path: str) -> list[str]:
    """Stock command lines, ready to paste."""
    model = f"--model {shlex.quote(path)}"
    question = "Anna lives in Rome. The nurse is Ben. Ben likes rice. Who is the nurse?"
    image = shlex.quote(str(Path(path) / PICTURE))
    return [
        "Try it with stock mlx-lm:",
        f'  mlx_lm.generate {model} --prompt "{question}" --max-tokens 40',
        "and with stock mlx-vlm:",
        f'  mlx_vlm.generate {model} --image {image} --prompt "What is in the picture?" --max-tokens 40',
    ]
