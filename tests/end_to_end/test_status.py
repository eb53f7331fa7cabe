"""``mlx_m3_plugin.status()``, and a process that is older than the installation.

``python -S`` with the packages on PYTHONPATH stands for a notebook kernel that was started before
the plugin was installed: nothing of ours runs in it until it is imported.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_m3_plugin.hosts.mlx_lm.patches import PATCHES
from tests.end_to_end.environments import Environment, warm

SHOW = "\nimport mlx_m3_plugin, json\nprint(json.dumps(mlx_m3_plugin.status().as_dict()))\n"
NAMES = {f"mlx_lm.models.{name}" for name in ("minimax_m3", "minimax_m3_vl")} | {
    f"mlx_vlm.models.{name}" for name in ("minimax_m3", "minimax_m3_vl")
}


@pytest.fixture(scope="module")
def kernel(cold_guest: Environment) -> Iterator[Environment]:
    with warm(cold_guest, "-S", PYTHONPATH=str(cold_guest.site_packages)) as environment:
        yield environment


def older(kernel: Environment, source: str, *args: str | Path, **env: str) -> list[Any]:
    """Each line that a process without start-up files prints, as JSON."""
    return printed(kernel.run("-c", "import json, sys\n" + source, *args, env=env))


def older_in_a_new_process(own_guest: Environment, source: str) -> list[Any]:
    path = {"PYTHONPATH": str(own_guest.site_packages)}
    return printed(own_guest.run("-S", "-c", "import json, sys\n" + source, env=path))


def printed(done: subprocess.CompletedProcess[str]) -> list[Any]:
    return [json.loads(line) for line in done.stdout.splitlines() if line[:1] in '{["tf0123456789']


@pytest.fixture(scope="module")
def nano(guest: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "m3"
    guest.run("-m", "mlx_m3_plugin.cli", "demo", path)
    return path


def test_before_anything_is_imported(kernel: Environment) -> None:
    imported = (
        "print(json.dumps([n for n in sys.modules if n.partition('.')[0] in ('mlx', 'mlx_lm', 'mlx_vlm')]))"
    )
    found, modules = older(kernel, SHOW + imported)
    assert modules == []
    assert found["state"] == "waits in this process for mlx_lm or mlx_vlm to be imported"
    assert {m["name"]: (m["source"], m["why"]) for m in found["modules"]} == dict.fromkeys(
        NAMES, ("plugin", "when it is imported")
    )
    assert found["active"] is False
    assert found["advice"] == found["errors"] == []


def test_in_a_new_process(guest: Environment) -> None:
    """The start-up file has done everything: the import that shows it changes nothing."""
    source = "import mlx_lm, mlx_lm.models.minimax_m3_vl" + SHOW
    found = json.loads(guest.run("-c", source).stdout.splitlines()[-1])
    assert found["state"] == "is active in this process"
    modules = {m["name"]: m for m in found["modules"]}
    assert modules["mlx_lm.models.minimax_m3_vl"] == {
        "name": "mlx_lm.models.minimax_m3_vl",
        "source": "plugin",
        "path": str(guest.plugin / "hosts/mlx_lm/minimax_m3_vl.py"),
        "why": "in use",
    }
    assert modules["mlx_lm.models.minimax_m3"]["why"] == "upstream has no such module"
    assert "mlx_lm.utils" in found["patches"]
    assert found["advice"] == found["errors"] == []


@pytest.mark.parametrize("library", ["mlx_lm", "mlx_vlm"])
def test_functions_imported_by_name_before_the_plugin_open_m3_with_it(
    kernel: Environment, nano: Path, library: str
) -> None:
    source = f"""
from {library} import load, generate
from {library}.utils import load_model as renamed
def served(model):
    return sys.modules[type(model).__module__].__file__
import mlx_m3_plugin
from pathlib import Path
print(json.dumps([served(load(sys.argv[1])[0]), served((renamed(Path(sys.argv[1])) if "{library}" == "mlx_vlm"
    else renamed(Path(sys.argv[1]))[0]))]))
import {library}.utils
print(json.dumps(renamed is {library}.utils.load_model))
"""
    files, is_renewed = older(kernel, source, nano)
    assert files == [str(kernel.plugin / "hosts" / library / "minimax_m3_vl.py")] * 2
    assert is_renewed


COPIES = """
import types
replaced, key, value = {}, None, None
for name in [n for n in sys.modules if n.partition(".")[0] in ("mlx_lm", "mlx_vlm", "__main__")]:
    for key, value in list(vars(sys.modules[name]).items()):
        if isinstance(value, types.FunctionType):
            replaced.setdefault(id(value), (value, []))[1].append(f"{name}.{key}")
"""
STALE = """
stale = set()
for function, names in replaced.values():
    now = {getattr(sys.modules[n.rpartition(".")[0]], n.rpartition(".")[2]) for n in names}
    if len(now) > 1:
        stale |= set(names)
print(json.dumps(sorted(stale)))
"""


def test_every_copy_of_a_replaced_function_is_renewed(kernel: Environment) -> None:
    """No two modules that shared a function before hold different ones afterwards."""
    imports = """
import mlx_lm, mlx_lm.server, mlx_vlm, mlx_vlm.server
from mlx_lm import load, generate, stream_generate
from mlx_lm.utils import load_model, sharded_load
from mlx_vlm.prompt_utils import apply_chat_template
from mlx_vlm.utils import load_processor, save_weights
"""
    (stale,) = older(kernel, imports + COPIES + "\nimport mlx_m3_plugin\n" + STALE)
    assert stale == []


@pytest.mark.parametrize("library", ["mlx_lm", "mlx_vlm"])
def test_a_model_loaded_before_the_plugin_is_counted(kernel: Environment, nano: Path, library: str) -> None:
    module = f"{library}.models.minimax_m3_vl"
    source = f"""
import importlib
try:
    stock = importlib.import_module("{module}")
except ModuleNotFoundError:
    print("[]")
    sys.exit()
import {library}
model = stock.Model.__new__(stock.Model)
{SHOW}
again = importlib.import_module("{module}")
print(json.dumps(again.__file__))
del model
"""
    found, *file = older(kernel, source)
    if not found:
        pytest.skip("this version has no M3 class of its own")
    assert file == [str(kernel.plugin / "hosts" / library / "minimax_m3_vl.py")]
    first, second = found["advice"]
    assert first.startswith(
        "M3 models in memory that were loaded before the plugin and have upstream's class: 1"
    )
    assert second.startswith(f"imported before the plugin: {library}. Load older tokenizers")
    assert "A restart updates everything" in second
    (row,) = [m for m in found["modules"] if m["name"] == module]
    assert row["source"] == "plugin"


def test_switched_off(kernel: Environment) -> None:
    (found,) = older(kernel, "import mlx_lm" + SHOW, MLX_M3_PLUGIN="off")
    assert found["state"] == "is switched off in this process by MLX_M3_PLUGIN"
    assert {m["source"] for m in found["modules"]} == {"native"}
    assert found["patches"] == {}
    assert found["advice"] == ["unset MLX_M3_PLUGIN and restart this process to use the plugin"]


def test_native_preferred(kernel: Environment) -> None:
    (found,) = older(kernel, SHOW, MLX_M3_PLUGIN_PREFER="native")
    assert {m["source"] for m in found["modules"]} == {"undecided"}
    assert found["settings"]["prefer_native"] is True


def test_a_switch_set_too_late(kernel: Environment) -> None:
    source = "import mlx_lm, mlx_m3_plugin, os\nos.environ['MLX_M3_PLUGIN'] = 'off'" + SHOW
    (found,) = older(kernel, source)
    assert found["settings"]["enabled"] is True
    assert "the environment variables have changed" in found["advice"][0]


def test_a_misspelt_switch(kernel: Environment) -> None:
    (found,) = older(kernel, "import mlx_lm" + SHOW, MLX_M3_PLUGIN_PREFR="native")
    assert found["errors"] == ["unknown variable MLX_M3_PLUGIN_PREFR; did you mean MLX_M3_PLUGIN_PREFER?"]


def test_a_plugin_that_cannot_start(own_guest: Environment) -> None:
    hook = own_guest.plugin / "startup" / "hook.py"
    hook.write_text(
        hook.read_text().replace(
            "    finder = PluginFinder(", "    raise OSError('broken')\n    finder = PluginFinder(", 1
        )
    )
    (found,) = older_in_a_new_process(own_guest, "import mlx_lm" + SHOW)
    assert found["state"] == "is NOT ACTIVE in this process: OSError: broken"
    assert found["errors"] == ["OSError: broken"]
    assert {m["source"] for m in found["modules"]} == {"native"}


def test_a_newer_version_was_installed_since(own_guest: Environment) -> None:
    (metadata,) = own_guest.site_packages.glob("mlx_m3_plugin-*.dist-info/METADATA")
    text = metadata.read_text()
    metadata.write_text(text.replace("\nVersion: ", "\nVersion: 99.", 1))
    (found,) = older_in_a_new_process(own_guest, SHOW)
    assert found["advice"][0].startswith("version 99.")
    assert "restart this process" in found["advice"][0]


def test_it_prints_for_people(kernel: Environment) -> None:
    code = "import mlx_lm, mlx_m3_plugin\nprint(mlx_m3_plugin.status())"
    lines = kernel.run("-c", code, env={"MLX_M3_PLUGIN_ATTENTION": "Dense"}).stdout.splitlines()
    assert lines[0].startswith("mlx-m3-plugin ")
    assert lines[0].endswith(" is active in this process")
    assert any(line.startswith("  mlx_lm.models.minimax_m3_vl: plugin, ") for line in lines)
    assert lines[lines.index("Settings") + 1] == "  MLX_M3_PLUGIN_ATTENTION: attention is dense"
    (line,) = (line for line in lines if line.startswith("  mlx_lm.generate: "))
    assert any(patch.what in line for patch in PATCHES if patch.module == "mlx_lm.generate")
    assert lines[lines.index("What to do") + 1].startswith("  imported before the plugin: mlx_lm")
