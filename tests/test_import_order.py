"""Every module of ours can be the first that a process imports."""

import json
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.end_to_end.environments import here

PACKAGE = Path(__file__).parents[1] / "mlx_m3_plugin"

# Imports each module in a process of its own.
EACH_FIRST = """
import importlib, json, os, sys, traceback
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
    done = here().run("-c", EACH_FIRST, input=json.dumps(names))
    assert json.loads(done.stdout.splitlines()[-1]) == {}


@pytest.mark.skipif(find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")
def test_modules_in_a_circle_can_be_imported_first() -> None:
    for module in IN_A_CIRCLE:
        assert here().run("-c", FIRST, module).stderr == ""
