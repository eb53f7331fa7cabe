"""What ``mlx-m3 doctor`` says of hosts; ``tests/end_to_end/test_doctor.py`` looks at real environments."""

from typing import Any

import pytest

from mlx_m3_plugin.toolbox import doctor
from mlx_m3_plugin.toolbox.installed_hosts import HostClass


def engine(source: str, is_default: bool = True, name: str = "vision engine") -> HostClass:
    why = "ValueError: broken" if source == "none" else ""
    return HostClass("omlx", name, is_default, "mlx_vlm.models.minimax_m3_vl", source, "/a/file.py", why)


def problems(*hosts: HostClass, prefer_native: bool = False) -> list[str]:
    found: Any = type("Found", (), {})()
    found.active, found.hosts, found.settings = True, hosts, {"prefer_native": prefer_native}
    return [f"{problem.what}: {problem.fix}" for problem in doctor._host_problems(found)]


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


def test_no_extra_is_named_where_it_would_replace_what_a_host_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ImportError("No module named mlx_vlm", name="mlx_vlm")
    assert "mlx-m3-plugin[vlm]" in str(doctor.what_to_install(error))
    monkeypatch.setattr(doctor, "installed_hosts", lambda: ["omlx"])
    assert str(doctor.what_to_install(error)).endswith("install the mlx-vlm that omlx asks for")
