"""``mlx-m3 doctor`` says whether an M3 checkpoint runs right with the stock commands, and what helps."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.environments import (
    SLOW_AND_UNNEEDED,
    Environment,
    clean_variables,
    make_environment,
    make_quick_environment,
)

HAS_NATIVE_CLASS = tuple(int(n) for n in version("mlx-lm").split(".")[:2]) >= (0, 32)
YES = "Yes, MiniMax-M3 runs here: in mlx_lm and mlx_vlm with this plugin."
YES_OF_MLX_LM = "Yes, MiniMax-M3 runs here: in mlx_lm with this plugin."
NO = "No, MiniMax-M3 does not run correctly here: "
REINSTALL = "pip install --force-reinstall --no-deps mlx-m3-plugin"
MLX = ("mlx", "mlx-[0-9]*", "mlx_cpu*", "mlx_metal*", "mlx_cuda*")


@pytest.fixture
def new_environment(tmp_path: Path) -> Callable[..., Environment]:
    """Without mlx-vlm, which is slow to import, as transformers is."""
    return lambda name="environment": make_quick_environment(tmp_path / name, "mlx_vlm*")


@pytest.fixture(scope="module")
def quick_guest(tmp_path_factory: pytest.TempPathFactory, cold_guest: Environment) -> Environment:
    environment = make_quick_environment(tmp_path_factory.mktemp("quick_guest"), "mlx_vlm*")
    environment.install_from(cold_guest)
    return environment


@pytest.fixture
def with_mlx_vlm(tmp_path: Path, cold_guest: Environment) -> Environment:
    return guest_without(tmp_path / "with_mlx_vlm", cold_guest)


def on_path(environment: Environment) -> dict[str, str]:
    """PATH as in a shell where the environment is activated."""
    return {"PATH": f"{environment.path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"}


def doctor(environment: Environment, **env: str) -> tuple[int, dict[str, Any]]:
    variables = on_path(environment) | env
    run = environment.run("-m", "mlx_m3_plugin.cli", "doctor", "--json", env=variables, check=False)
    assert run.stderr == ""
    return run.returncode, json.loads(run.stdout)


def problem(answer: tuple[int, dict[str, Any]]) -> tuple[str, str]:
    """The only problem of a diagnosis, which says no."""
    code, diagnosis = answer
    assert code == 1
    assert diagnosis["ok"] is False
    (found,) = diagnosis["problems"]
    assert diagnosis["verdict"] == f"{NO}{found['what']}."
    return found["what"], found["fix"]


def guest_without(path: Path, cold_guest: Environment, *packages: str) -> Environment:
    environment = make_environment(path, (*SLOW_AND_UNNEEDED, *packages))
    environment.install_from(cold_guest)
    return environment


@pytest.fixture(scope="module")
def without_mlx(tmp_path_factory: pytest.TempPathFactory, cold_guest: Environment) -> Environment:
    return guest_without(tmp_path_factory.mktemp("without_mlx"), cold_guest, *MLX)


def test_a_healthy_installation(cold_guest: Environment) -> None:
    scripts = [cold_guest.script(name) for name in ("mlx_lm.generate", "mlx_vlm.generate")]
    code, diagnosis = doctor(cold_guest)
    assert diagnosis["problems"] == diagnosis["errors"] == diagnosis["notes"] == []
    assert (code, diagnosis["ok"], diagnosis["active"]) == (0, True, True)
    assert diagnosis["verdict"] == YES
    assert diagnosis["versions"]["mlx-lm"] == version("mlx-lm")
    assert {f["path"].rpartition(".")[2] for f in diagnosis["startup_files"]} == {"pth", "start"}
    assert all(f["problem"] is None for f in diagnosis["startup_files"])
    assert [(c["path"], c["is_here"]) for c in diagnosis["commands"]] == [(str(s), True) for s in scripts]
    modules = {m["name"]: m for m in diagnosis["modules"]}
    assert modules["mlx_lm.models.minimax_m3"]["why"] == "upstream has no such module"
    vl = modules["mlx_lm.models.minimax_m3_vl"]
    assert vl["source"] == "plugin"
    assert vl["path"] == str(cold_guest.plugin / "hosts/mlx_lm/minimax_m3_vl.py")
    assert vl["why"] == (
        "ours wins over the native module" if HAS_NATIVE_CLASS else "upstream has no such module"
    )
    assert "mlx_lm.tokenizer_utils" in diagnosis["patches"]


def test_the_same_for_a_person(quick_guest: Environment) -> None:
    lines = quick_guest.run_script("mlx-m3", "doctor", env=on_path(quick_guest)).stdout.splitlines()
    assert lines[0] == YES_OF_MLX_LM
    assert any("mlx_lm.models.minimax_m3_vl: plugin" in line for line in lines)
    assert "What to do" not in lines


def test_a_pipe_that_closes_early_is_not_an_error(quick_guest: Environment) -> None:
    command = f"set -o pipefail; {quick_guest.python} {quick_guest.script('mlx-m3')} doctor | head -1"
    variables = clean_variables() | on_path(quick_guest)
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=variables)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"{YES_OF_MLX_LM}\n"


# --- switches ---


def test_switched_off(quick_guest: Environment) -> None:
    answer = doctor(quick_guest, MLX_M3_PLUGIN="off")
    what, fix = problem(answer)
    assert what.startswith("MLX_M3_PLUGIN is off")
    assert fix == "unset MLX_M3_PLUGIN"
    assert answer[1]["active"] is False


def test_native_preferred(cold_guest: Environment) -> None:
    code, diagnosis = doctor(cold_guest, MLX_M3_PLUGIN_PREFER="native")
    (vl,) = [m for m in diagnosis["modules"] if m["name"] == "mlx_lm.models.minimax_m3_vl"]
    assert code == 0
    assert vl["source"] == ("native" if HAS_NATIVE_CLASS else "plugin")
    assert "mlx_m3_plugin" not in vl["path"] or not HAS_NATIVE_CLASS
    assert diagnosis["verdict"] == (
        "Yes, MiniMax-M3 runs here: in mlx_lm and mlx_vlm with upstream's own class, "
        "as MLX_M3_PLUGIN_PREFER=native asks."
        if HAS_NATIVE_CLASS
        else "Yes, MiniMax-M3 runs here: in mlx_lm with this plugin, "
        "because upstream has no class of its own; in mlx_vlm with upstream's own class, "
        "as MLX_M3_PLUGIN_PREFER=native asks."
    )


@pytest.mark.parametrize(
    ("name", "value", "what", "fix"),
    [
        ("MLX_M3_PLUGIN", "of", "MLX_M3_PLUGIN='of' is not understood", "use 'on' or 'off'"),
        (
            "MLX_M3_PLUGIN_PREFR",
            "native",
            "unknown variable MLX_M3_PLUGIN_PREFR",
            "did you mean MLX_M3_PLUGIN_PREFER?",
        ),
    ],
)
def test_a_misspelt_switch(quick_guest: Environment, name: str, value: str, what: str, fix: str) -> None:
    assert problem(doctor(quick_guest, **{name: value})) == (what, fix)


# --- what is not installed ---


@pytest.mark.skipif(sys.platform != "linux", reason="on a Mac mlx comes with mlx-lm")
def test_without_mlx(without_mlx: Environment) -> None:
    what, fix = problem(doctor(without_mlx))
    assert what.startswith("mlx cannot be imported (No module named 'mlx")
    assert 'pip install "mlx-m3-plugin[cpu]"' in fix
    assert "[cuda12]" in fix


@pytest.mark.skipif(sys.platform != "linux", reason="the builds of mlx for Linux")
def test_without_the_library_of_mlx(tmp_path: Path, cold_guest: Environment) -> None:
    """``pip install mlx`` on Linux, without an extra."""
    environment = guest_without(tmp_path / "environment", cold_guest, *MLX)
    (environment.site_packages / "mlx").mkdir()
    error = "raise ImportError('libmlx.so: cannot open shared object file', name='mlx.core')\n"
    (environment.site_packages / "mlx" / "core.py").write_text(error)
    what, fix = problem(doctor(environment))
    assert what == "mlx cannot be imported (libmlx.so: cannot open shared object file)"
    assert 'pip install "mlx-m3-plugin[cpu]"' in fix


@pytest.mark.skipif(sys.platform != "linux", reason="on a Mac mlx comes with mlx-lm")
@pytest.mark.parametrize(
    "command",
    ["inspect DIR", "fit DIR --memory 8GB", "convert DIR DST --recipe 4bit", "evaluate DIR", "demo DST"],
)
def test_commands_without_mlx_end_with_one_line(
    without_mlx: Environment, tmp_path: Path, command: str
) -> None:
    source = Path(__file__).parents[1] / "golden" / "as_published"
    words = command.replace("DIR", str(source)).replace("DST", str(tmp_path / "new")).split()
    run = without_mlx.run("-m", "mlx_m3_plugin.cli", *words, check=False)
    (line,) = run.stderr.splitlines()
    assert (run.returncode, run.stdout) == (2, "")
    assert line.startswith("mlx-m3: mlx cannot be imported (No module named 'mlx")
    assert 'pip install "mlx-m3-plugin[cpu]"' in line


def test_without_mlx_lm_and_mlx_vlm(tmp_path: Path, cold_guest: Environment) -> None:
    environment = guest_without(tmp_path / "environment", cold_guest, "mlx_lm*", "mlx_vlm*")
    what, fix = problem(doctor(environment))
    assert what == "neither mlx-lm nor mlx-vlm is installed"
    assert fix == "pip install mlx-lm, or mlx-vlm, or both"


# --- the commands on PATH ---


def test_the_command_on_path_belongs_to_another_environment(
    own_guest: Environment, stock: Environment
) -> None:
    """``mlx-m3`` by its full path, ``mlx_lm.generate`` from wherever it was installed first."""
    other, here = stock.script("mlx_lm.generate"), own_guest.script("mlx_lm.generate")
    what, fix = problem(doctor(own_guest, **on_path(stock)))
    assert what == (
        f"mlx_lm.generate on PATH ({other}) belongs to another environment, {stock.path}, "
        "which does not have the plugin"
    )
    assert fix == f"{stock.python} -m pip install mlx-m3-plugin; or run {here}"


@pytest.mark.parametrize(
    ("receipt", "install"),
    [
        ("uv-receipt.toml", "uv tool install mlx-lm --with mlx-m3-plugin"),
        ("pipx_metadata.json", "pipx inject mlx-lm mlx-m3-plugin"),
    ],
)
def test_the_command_on_path_is_a_tool_of(
    quick_guest: Environment, new_environment: Any, receipt: str, install: str
) -> None:
    tool = new_environment("mlx-lm")
    (tool.path / receipt).write_text("")
    tool.script("mlx_lm.generate")
    what, fix = problem(doctor(quick_guest, **on_path(tool)))
    assert "belongs to another environment" in what
    assert fix.partition("; or run ")[0] == install


def test_the_command_on_path_belongs_to_another_environment_with_the_plugin(
    own_guest: Environment, cold_guest: Environment
) -> None:
    cold_guest.script("mlx_lm.generate")
    (cold_guest.path / "bin" / "mlx_vlm.generate").unlink(missing_ok=True)
    what, fix = problem(doctor(own_guest, **on_path(cold_guest)))
    assert f", {cold_guest.path}, which has the plugin" in what
    assert fix.endswith(f": {cold_guest.python} -m mlx_m3_plugin.cli doctor")


def command_without_python(directory: Path) -> Path:
    script = directory / "mlx_lm.generate"
    script.write_text(f"#!{directory}/gone/bin/python\n")
    script.chmod(0o755)
    return script


def test_the_command_on_path_has_lost_its_interpreter(own_guest: Environment, tmp_path: Path) -> None:
    command_without_python(tmp_path)
    what, fix = problem(doctor(own_guest, PATH=f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"))
    assert "cannot start" in what
    assert f"{tmp_path}/gone/bin/python is not a working Python" in what
    assert fix


def test_commands_that_are_not_on_path_are_noted(own_guest: Environment) -> None:
    code, diagnosis = doctor(own_guest)
    assert code == 0
    there = own_guest.path / "bin" / "mlx_lm.generate"
    assert any(n.startswith("mlx_lm.generate ") and n.endswith(f" {there}") for n in diagnosis["notes"])


def test_a_note_for_notebooks(quick_guest: Environment) -> None:
    _, diagnosis = doctor(quick_guest, JPY_PARENT_PID="1")
    assert "`mlx_m3_plugin.status()`" in diagnosis["notes"][-1]


# --- start-up files ---


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="where .start files run, the .pth is not needed")
@pytest.mark.parametrize("gone", [("pth",), ("pth", "start")], ids=" ".join)
def test_without_its_start_up_files(own_guest: Environment, gone: tuple[str, ...]) -> None:
    for name in gone:
        (own_guest.site_packages / f"mlx_m3_plugin_startup.{name}").unlink()
    what, fix = problem(doctor(own_guest))
    assert what == "the plugin's start-up file is missing from this environment"
    assert fix == REINSTALL


def test_installed_where_no_start_up_files_are_read(
    cold_stock: Environment, wheel: Path, tmp_path: Path
) -> None:
    cold_stock.install("--target", tmp_path, wheel)
    what, fix = problem(doctor(cold_stock, PYTHONPATH=str(tmp_path)))
    assert "not installed in one of Python's site directories" in what
    assert "import mlx_m3_plugin" in fix


def test_an_empty_start_up_file_is_seen(own_guest: Environment) -> None:
    file = own_guest.site_packages / "mlx_m3_plugin_startup.pth"
    file.write_text("")
    assert problem(doctor(own_guest)) == (f"{file} is empty", REINSTALL)


# --- what fails ---


def test_a_patch_that_does_not_fit(own_guest: Environment) -> None:
    file = own_guest.plugin / "hosts" / "mlx_lm" / "patches.py"
    text, name = file.read_text(), "tokenizer_utils:TokenizerWrapper.__init__"
    assert name in text
    file.write_text(text.replace(name, "tokenizer_utils:Renamed.__init__"))
    what, fix = problem(doctor(own_guest))
    assert "cannot extend mlx_lm.tokenizer_utils" in what
    assert fix == "pip install --upgrade mlx-m3-plugin"


def test_a_model_file_that_cannot_be_imported(own_guest: Environment) -> None:
    file = own_guest.plugin / "hosts" / "mlx_lm" / "minimax_m3_vl.py"
    file.write_text("raise ImportError('broken on purpose')\n")
    what, _ = problem(doctor(own_guest))
    assert "broken on purpose" in what


def test_a_hook_that_cannot_be_imported(own_guest: Environment) -> None:
    hook = own_guest.plugin / "startup" / "hook.py"
    hook.write_text(hook.read_text() + "\nraise ImportError('broken on purpose')\n")
    what, fix = problem(doctor(own_guest))
    assert what.startswith("the plugin cannot be activated: mlx-m3-plugin ")
    assert what.endswith("ImportError: broken on purpose")
    assert fix == REINSTALL


def test_a_start_up_file_that_fails(own_guest: Environment) -> None:
    (own_guest.site_packages / "mlx_m3_plugin_startup.pth").write_text("import sys\n")
    what, fix = problem(doctor(own_guest))
    assert what == "the plugin's start-up file does not run"
    assert REINSTALL in fix


def test_mlx_that_ends_the_process(tmp_path: Path, cold_guest: Environment) -> None:
    """A build for another processor, or a Metal driver that fails."""
    environment = guest_without(tmp_path / "environment", cold_guest, *MLX)
    (environment.site_packages / "mlx").mkdir()
    (environment.site_packages / "mlx" / "core.py").write_text("import os; os._exit(132)\n")
    what, fix = problem(doctor(environment))
    assert what.endswith("ends with exit code 132")
    assert f" {environment.python} -X importtime -c " in fix


# --- in the environment of another host ---

THEIRS = """
def apply_mlx_vlm_minimax_m3_compat_patch():
    import sys, types, mlx_vlm.models
    name = "mlx_vlm.models.minimax_m3_vl"
    module = sys.modules[name] = types.ModuleType(name)
    module.Model = type("Model", (), {"__module__": "omlx.patches"})
"""


def install_host(environment: Environment, name: str) -> None:
    """What tells that it is installed."""
    metadata = environment.site_packages / f"{name.replace('-', '_')}-0.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.9\n")


def test_a_host_that_loads_another_class(with_mlx_vlm: Environment) -> None:
    """Its own patch is run before M3 is loaded."""
    install_host(with_mlx_vlm, "omlx")
    patches = with_mlx_vlm.site_packages / "omlx" / "patches"
    patches.mkdir(parents=True)
    (patches / "__init__.py").touch()
    (patches / "mlx_vlm_minimax_m3_compat.py").write_text(THEIRS)
    answer = doctor(with_mlx_vlm)
    what, fix = problem(answer)
    assert what == f"omlx 0.9, vision engine loads another class, {patches / '__init__.py'}"
    assert fix == 'use omlx 0.9, text engine ("model_type_override": "llm")'
    vision, text = answer[1]["hosts"]
    assert (vision["source"], text["source"]) == ("native", "plugin")
    assert (vision["is_default"], text["is_default"]) == (True, False)


def test_a_host_that_does_not_ask_for_a_library_that_fails(with_mlx_vlm: Environment, tmp_path: Path) -> None:
    """mlx-openai-server has an mlx-vlm too old for M3, loads M3 with mlx-lm, and has its own command."""
    install_host(with_mlx_vlm, "mlx-openai-server")
    file = with_mlx_vlm.plugin / "hosts" / "mlx_vlm" / "minimax_m3_vl.py"
    file.write_text("raise ImportError('broken on purpose')\n")
    command = command_without_python(tmp_path)
    code, diagnosis = doctor(with_mlx_vlm, PATH=f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert [(c["path"], c["is_here"]) for c in diagnosis["commands"]][:1] == [(str(command), False)]
    assert (code, diagnosis["problems"]) == (0, [])
    assert diagnosis["verdict"] == YES.replace("mlx_vlm", "mlx-openai-server")
    (host,) = diagnosis["hosts"]
    assert (host["source"], host["path"]) == (
        "plugin",
        str(with_mlx_vlm.plugin / "hosts/mlx_lm/minimax_m3_vl.py"),
    )
    notes = "\n".join(diagnosis["notes"])
    assert "do not install mlx-m3-plugin[vlm]" in notes
    assert "outside of mlx-openai-server, mlx_vlm.models.minimax_m3_vl cannot be served" in notes
