"""What mlx-lm and mlx-vlm compute otherwise than M3, without this plugin."""

import json
import subprocess
import sys
from pathlib import Path

from ..model.config import TextConfig
from ..startup.settings import without_plugin

# A lazy load reads headers alone, and compares them with the model.
_LOAD = """
import json, sys
from importlib import import_module
from pathlib import Path
load_model = import_module(f"{sys.argv[1]}.utils").load_model
answers = []
for directory in sys.argv[2:]:
    try:
        load_model(Path(directory), lazy=True)
        answers.append("")
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


def why_not_opened(library: str, *directories: Path) -> list[str]:
    """What ``mlx-lm`` or ``mlx-vlm`` says when it loads checkpoints without this plugin; empty if it
    opens them.

    Asks the installed library in a process of its own, which takes some seconds and no memory for weights.
    """
    paths = [str(directory.absolute()) for directory in directories]
    command = [sys.executable, "-c", _LOAD, library.replace("-", "_"), *paths]
    home = Path(sys.executable).parent
    run = subprocess.run(command, capture_output=True, text=True, env=without_plugin(), cwd=home)
    try:
        answers: list[str] = json.loads(run.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        return [f"{library} does not run: {last}"] * len(paths)
    return answers


def wrong_past_the_budget(config: TextConfig, with_indexer: bool = True) -> dict[str, str]:
    """The libraries whose own M3 is not right past ``config.budget`` tokens, each with the reason.

    Of mlx-lm 0.32 and mlx-vlm 0.7; ``tests/upstream`` compares both with what the libraries do.

    Args:
        with_indexer: whether any layer selects blocks.
    """
    reasons = {}
    if with_indexer and config.index_init_blocks:
        reasons["mlx-lm"] = "it ignores sparse_init_block"
    if with_indexer and config.index_n_heads > 1:
        reasons["mlx-vlm"] = "it selects the same blocks for all groups of heads"
    return reasons
