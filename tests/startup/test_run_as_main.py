"""``python -m`` of a module that we patch runs it with the patches, and of any other as before."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.environments import clean_variables

SERVER = """
import sys

def greeting():
    return "stock"

def main():
    print(__name__, greeting(), sys.argv)
    if "fail" in sys.argv:
        raise RuntimeError("in main")

NAME = "module"
if __name__ == "__main__":
    print(NAME, __file__, __spec__.name)
    main()
"""
# As the start-up hook does it, with a patch for one of the two.
START = """
import runpy, sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from mlx_m3_plugin.startup import hook
from mlx_m3_plugin.startup.settings import read_settings

def apply(module):
    if sys.argv[1] == "probe fails":
        raise LookupError("upstream has changed")
    module.greeting = lambda: "patched"
    return True

sys.path.insert(0, sys.argv.pop(1))
module = sys.argv.pop(1)
PATCHES = [SimpleNamespace(module="mlx_fake.server", what="x", apply=apply)]
sys.modules["starter"] = sys.modules["__main__"]
entry = EntryPoint("mlx_fake.server", "starter:PATCHES", hook.PATCH_GROUP)
sys.meta_path.insert(0, hook.PluginFinder([entry], read_settings()))
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    directory = tmp_path / "mlx_fake"
    directory.mkdir()
    (directory / "__init__.py").touch()
    for name in ("server", "other"):
        (directory / f"{name}.py").write_text(SERVER)
    return directory


def run(package: Path, module: str, *arguments: str) -> tuple[list[str], str]:
    command = [sys.executable, "-c", START, str(package.parent), module, *arguments]
    done = subprocess.run(command, env=clean_variables(), capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr


def test_a_patched_module_runs_with_its_patches(package: Path) -> None:
    file = package / "server.py"
    said, errors = run(package, "mlx_fake.server", "asked")
    assert said == [
        f"module {file} mlx_fake.server",
        f"mlx_fake.server patched ['{file}', 'asked']",
    ], errors
    _, errors = run(package, "mlx_fake.server", "fail")
    # Tracebacks show upstream's lines.
    lines = [line.strip() for line in errors.splitlines()]
    assert f'File "{file}", line 15, in <module>' in lines
    assert lines[-1] == "RuntimeError: in main"


def test_any_other_module_runs_as_it_is(package: Path) -> None:
    file = package / "other.py"
    said, errors = run(package, "mlx_fake.other", "asked")
    assert said == [f"module {file} mlx_fake.other", f"__main__ stock ['{file}', 'asked']"], errors


def test_where_no_patch_fits_it_runs_all_the_same(package: Path) -> None:
    said, errors = run(package, "mlx_fake.server", "probe fails")
    assert said[1].startswith("mlx_fake.server stock")
    assert "cannot extend mlx_fake.server for MiniMax-M3: without x (LookupError" in errors


MODULES = """
import runpy, sys
sys.argv = ["-", "--help"]
try:
    runpy.run_module("mlx_lm.server", run_name="__main__", alter_sys=True)
except SystemExit as error:
    names, trace = [], error.__traceback__
    while trace is not None:
        names.append((trace.tb_frame.f_globals["__name__"], trace.tb_frame.f_code.co_name))
        trace = trace.tb_next
from mlx_m3_plugin.startup import hook
print("WITH", ("mlx_lm.server", "main") in names, "mlx_lm.server" in hook.status["patched"])
"""


def test_mlx_lm_server() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MODULES], env=clean_variables(), capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "WITH True True", done.stderr
    assert "deprecated" in done.stdout
