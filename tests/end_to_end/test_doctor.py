"""``mlx-m3 doctor`` tells the truth about a process that is not its own."""

import json
import subprocess
from importlib.metadata import version
from typing import Any

from tests.end_to_end.environments import Environment, clean_variables

HAS_NATIVE_CLASS = tuple(int(n) for n in version("mlx-lm").split(".")[:2]) >= (0, 32)


def doctor(environment: Environment, **env: str) -> tuple[int, dict[str, Any]]:
    run = environment.run("-m", "mlx_m3_plugin.cli", "doctor", "--json", env=env, check=False)
    return run.returncode, json.loads(run.stdout)


def test_a_healthy_installation(guest: Environment) -> None:
    code, diagnosis = doctor(guest)
    assert code == 0
    assert diagnosis["active"] is True
    assert diagnosis["errors"] == diagnosis["advice"] == []
    assert diagnosis["versions"]["mlx-lm"] == version("mlx-lm")
    assert {f["path"].rpartition(".")[2] for f in diagnosis["startup_files"]} == {"pth", "start"}
    assert all(f["problem"] is None for f in diagnosis["startup_files"])
    modules = {m["name"]: m for m in diagnosis["modules"]}
    assert modules["mlx_lm.models.minimax_m3"]["why"] == "upstream has no such module"
    vl = modules["mlx_lm.models.minimax_m3_vl"]
    assert vl["source"] == "plugin"
    assert vl["path"] == str(guest.plugin / "hosts/mlx_lm/minimax_m3_vl.py")
    assert vl["why"] == (
        "ours wins over the native module" if HAS_NATIVE_CLASS else "upstream has no such module"
    )
    assert "mlx_lm.tokenizer_utils" in diagnosis["patches"]


def test_the_same_for_a_person(guest: Environment) -> None:
    lines = guest.run_script("mlx-m3", "doctor").stdout.splitlines()
    assert lines[0] == "mlx-m3-plugin is active in a fresh process"
    assert any("mlx_lm.models.minimax_m3_vl: plugin" in line for line in lines)


def test_a_reader_that_stops_early_is_no_error(guest: Environment) -> None:
    command = f"set -o pipefail; {guest.python} {guest.script('mlx-m3')} doctor | head -1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=clean_variables())
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "mlx-m3-plugin is active in a fresh process\n"


def test_switched_off(guest: Environment) -> None:
    code, diagnosis = doctor(guest, MLX_M3_PLUGIN="off")
    assert code == 1
    assert diagnosis["active"] is False
    assert "MLX_M3_PLUGIN is off" in diagnosis["advice"][0]


def test_native_preferred(guest: Environment) -> None:
    code, diagnosis = doctor(guest, MLX_M3_PLUGIN_PREFER="native")
    (vl,) = [m for m in diagnosis["modules"] if m["name"] == "mlx_lm.models.minimax_m3_vl"]
    assert code == 0
    assert vl["source"] == ("native" if HAS_NATIVE_CLASS else "plugin")
    assert "mlx_m3_plugin" not in vl["path"] or not HAS_NATIVE_CLASS


def test_without_its_start_up_files(new_environment: Any, wheel: Any) -> None:
    environment = new_environment()
    environment.install(wheel)
    for name in ("pth", "start"):
        (environment.site_packages / f"mlx_m3_plugin_startup.{name}").unlink()
    code, diagnosis = doctor(environment)
    assert code == 1
    assert diagnosis["startup_files"] == []
    assert "no start-up file" in diagnosis["advice"][0]


def test_an_empty_start_up_file_is_seen(new_environment: Any, wheel: Any) -> None:
    environment = new_environment()
    environment.install(wheel)
    (environment.site_packages / "mlx_m3_plugin_startup.pth").write_text("")
    code, diagnosis = doctor(environment)
    assert code == 1
    assert "empty" in [f["problem"] for f in diagnosis["startup_files"]]
    assert "pip install --force-reinstall" in diagnosis["advice"][0]
