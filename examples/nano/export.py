"""A trained M3-nano as checkpoints: float as transformers saves it, and converted by ``mlx-m3 convert``.

python examples/nano/export.py build/nano        # writes build/nano/float and build/nano/8bit
"""

import argparse
import subprocess
import sys
from pathlib import Path

import net
import torch
import vocabulary
from tokenizers import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--recipe", default="8bit")
    arguments = parser.parse_args()
    whole = arguments.directory / "float"
    write_float(arguments.directory, whole)
    made = arguments.directory / arguments.recipe
    command = [
        sys.executable,
        "-m",
        "mlx_m3_plugin",
        "convert",
        str(whole),
        str(made),
        "--recipe",
        arguments.recipe,
    ]
    subprocess.run(command, check=True)


def write_float(trained: Path, directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    model = net.build(len(ids), ids, seed=0)
    model.load_state_dict(torch.load(trained / "checkpoint.pt", weights_only=True)["model"])
    model.save_pretrained(directory)
    vocabulary.save(tokenizer, directory)


if __name__ == "__main__":
    main()
