"""Every module of ours can be the first that a process imports."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.end_to_end.environments import clean_variables

PACKAGE = Path(__file__).parents[1] / "mlx_m3_plugin"

# Imports each module in a process of its own, which is forked once the libraries that have nothing to
# do with us are there: to import them takes seconds, each time.
EACH_FIRST = """
import importlib, json, os, sys, traceback
sys.modules["torch"] = None  # transformers would import it, for seconds

for name in ("numpy", "safetensors", "tokenizers", "transformers", "fastapi", "PIL.Image", "requests"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass  # of mlx-vlm, which need not be there
from transformers import AutoProcessor, PreTrainedTokenizerFast, ProcessorMixin, AutoTokenizer
assert not any(name.startswith(("mlx.", "mlx_lm", "mlx_vlm", "mlx_m3_plugin.hosts")) for name in sys.modules)

failed = {}
for module in json.load(sys.stdin):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        message = ""
        try:
            importlib.import_module(module)
        except BaseException:
            message = traceback.format_exc()
        os.write(write, message[-4000:].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        message = answer.read()
    os.waitpid(child, 0)
    if message:
        failed[module] = message
print(json.dumps(failed))
"""
# Ours that extend sub-modules of a package that is ours too: each imports what imports it.
IN_A_CIRCLE = [f"mlx_m3_plugin.hosts.mlx_vlm.{name}" for name in ("cache", "language", "model")]
# And then upstream's package is what it always is.
FIRST = """
import importlib, sys
sys.modules["torch"] = None
importlib.import_module(sys.argv[1])
from mlx_vlm.models import minimax_m3_vl
from mlx_m3_plugin.hosts.mlx_vlm import language
from mlx_m3_plugin.startup import hook
assert hook.status["errors"] == [], hook.status
assert minimax_m3_vl.LanguageModel is language.LanguageModel
assert minimax_m3_vl.language.__name__ == "mlx_vlm.models.minimax_m3_vl.language"
assert minimax_m3_vl.language.LanguageModel is not language.LanguageModel
assert minimax_m3_vl.__file__.endswith("hosts/mlx_vlm/minimax_m3_vl.py")
"""


def modules() -> list[str]:
    parts = (file.relative_to(PACKAGE.parent).with_suffix("").parts for file in PACKAGE.rglob("*.py"))
    found = sorted({".".join(part for part in path if part != "__init__") for path in parts})
    missing = [name for name in ("mlx_lm", "mlx_vlm") if find_spec(name) is None]
    if "mlx_vlm" not in missing and version("mlx-vlm").startswith("0.6."):
        # Before 0.7 mlx-vlm has no DSpark to build on.
        missing.append("mlx_vlm.drafter")
    return [name for name in found if not any(f".hosts.{library}" in name for library in missing)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_each_module_can_be_imported_first() -> None:
    names = modules()
    assert len(names) > 50
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EACH_FIRST],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        # The parent has not used what macOS would not have used before a fork.
        env=clean_variables() | {"OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


@pytest.mark.skipif(find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")
def test_modules_in_a_circle_can_be_imported_first() -> None:
    """In fresh interpreters, all at once."""
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", FIRST, module],
            stderr=subprocess.PIPE,
            text=True,
            env=clean_variables(),
        )
        for module in IN_A_CIRCLE
    ]
    assert [process.communicate()[1] for process in running] == [""] * len(running)
