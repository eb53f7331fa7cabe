"""mlx-lm and mlx-vlm: their commands, and what they do without this plugin."""

import shlex
from pathlib import Path

from ..model.config import TextConfig
from ..startup.report import version_of
from ..startup.settings import EFFORT, without_plugin
from .checkpoint import M3
from .new_process import ask

_WHY_SAMPLING = (
    "(with the sampling that MiniMax uses: greedy decoding, the default of these commands, can make "
    "low-bit weights repeat themselves while thinking)"
)
# M3.1 always reasons: about 600 tokens at low effort and 6,400 at max.
_EFFORT = "max"
_WHY_EFFORT = (
    "(max is the effort that MiniMax's own service uses by default; it takes about ten times the tokens of "
    "low, so leave room for them)"
)

# --- how to run a checkpoint ---


def stock_commands(
    name: str, *, mlx_lm: bool, mlx_vlm: bool, model_name: str = M3, takes_effort: bool = False
) -> list[str]:
    """Stock command lines of these libraries, with MiniMax's sampling for ``model_name``,
    ready to paste.

    Args:
        takes_effort: whether the chat template takes an effort of reasoning.  ``mlx_lm.chat`` and mlx-vlm
            have no option for it, and get our variable.
    """
    model = f"--model {shlex.quote(name)}"
    tokens = "--max-tokens 4096" if model_name == M3 else "--max-tokens 16384"
    sampling = "--temp 1.0 --top-p 0.95"
    # Nothing is known of it for M3.1.
    top_k = " --top-k 40" if model_name == M3 else ""
    variable = f"{EFFORT}={_EFFORT} " if takes_effort else ""
    effort = f"""'{{"reasoning_effort": "{_EFFORT}"}}'"""
    config, args = (f" --chat-template-{x} {effort}" if takes_effort else "" for x in ("config", "args"))
    lines = []
    if mlx_lm:
        lines += [
            f'mlx_lm.generate {model} --prompt "Hello" {tokens} {sampling}{top_k}{config}',
            # It has no --top-k.
            f"{variable}mlx_lm.chat {model} {tokens} {sampling}",
            f"mlx_lm.server {model} {tokens} {sampling}{top_k}{args}",
        ]
    if mlx_vlm:
        sampling = sampling.replace("--temp ", "--temperature ") + top_k
        if (version_of("mlx-vlm") or "").startswith("0.6."):
            # It takes the others from generation_config.json only.  until: mlx-vlm 0.7
            sampling = "--temperature 1.0"
        question = '--image photo.jpg --prompt "What is this?"'
        lines.append(f"{variable}mlx_vlm.generate {model} {question} {tokens} {sampling}")
    return lines


def why_these_options(takes_effort: bool) -> list[str]:
    return [_WHY_SAMPLING, *([_WHY_EFFORT] if takes_effort else [])]


# --- what they do alone ---

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
    answers, run = ask(_LOAD, library.replace("-", "_"), *paths, env=without_plugin())
    if answers is None:
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        return [f"{library} does not run: {last}"] * len(paths)
    return list(answers)


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
