"""What ``mlx-m3 doctor`` says of hosts; ``tests/end_to_end/test_doctor.py`` looks at real environments."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_m3_plugin.toolbox import doctor, installed_hosts
from mlx_m3_plugin.toolbox.installed_hosts import Engine, HostClass


def engine(source: str, is_default: bool = True, name: str = "vision engine") -> HostClass:
    why = "ValueError: broken" if source == "none" else ""
    return HostClass(
        host="omlx",
        engine=name,
        is_default=is_default,
        module="mlx_vlm.models.minimax_m3_vl",
        source=source,
        path="/a/file.py",
        why=why,
    )


def diagnosis(*hosts: HostClass, prefer_native: bool = False, active: bool = True) -> Any:
    settings = {"prefer_native": prefer_native}
    return SimpleNamespace(active=active, hosts=hosts, settings=settings, problems=[], modules=[])


def problems(*hosts: HostClass, **switches: bool) -> list[str]:
    found = doctor._host_problems(diagnosis(*hosts, **switches))
    return [f"{problem.what}: {problem.fix}" for problem in found]


def test_the_default_engine_counts() -> None:
    other = engine("plugin", False, "text engine")
    assert problems(engine("plugin"), engine("native", False), engine("none", False)) == []
    (loads,) = problems(engine("native"), other)
    assert "vision engine loads another class, /a/file.py: use omlx" in loads
    assert loads.endswith(", text engine")
    (fails,) = problems(engine("none"))
    assert "cannot load mlx_vlm.models.minimax_m3_vl (ValueError: broken): pip install --upgrade" in fails


def test_another_class_where_it_is_preferred() -> None:
    assert problems(engine("native"), prefer_native=True) == []
    assert len(problems(engine("none"), prefer_native=True)) == 1
    verdict = doctor._verdict(diagnosis(engine("native"), engine("plugin", False), prefer_native=True), [])
    asked = "with another class, as MLX_M3_PLUGIN_PREFER=native asks"
    assert verdict == f"Yes, MiniMax-M3 runs here: in omlx {asked}."


def test_a_plugin_that_is_not_active_is_not_the_fault_of_a_host() -> None:
    assert problems(engine("none"), engine("native"), active=False) == []


def test_a_host_whose_own_patch_ends_the_process() -> None:
    found = installed_hosts._class_of("omlx", Engine("mlx_lm.models.llama", patch="os:abort"), True)
    assert (found.source, found.why) == ("none", f"the process ends with exit code {-signal.SIGABRT}")


def test_no_extra_is_named_where_it_would_replace_what_a_host_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ImportError("No module named mlx_vlm", name="mlx_vlm")
    assert "mlx-m3-plugin[vlm]" in str(doctor.what_to_install(error))
    monkeypatch.setattr(doctor, "installed_hosts", lambda: ["omlx"])
    assert str(doctor.what_to_install(error)).endswith("install the mlx-vlm that omlx asks for")
