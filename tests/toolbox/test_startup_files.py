"""What the doctor says about start-up files that are there and do not run."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_m3_plugin.toolbox import installation


@pytest.fixture
def startup_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mlx_m3_plugin_startup.pth"
    path.write_text("import mlx_m3_plugin; mlx_m3_plugin.install()\n")
    monkeypatch.setattr(installation, "_site_directories", lambda: [tmp_path])
    return path


def have_flags(monkeypatch: pytest.MonkeyPatch, flags: int) -> None:
    """For the doctor, files have these flags of macOS."""
    with_flags = {"lstat": lambda _: SimpleNamespace(st_flags=flags)}
    monkeypatch.setattr(installation, "os", SimpleNamespace(**vars(os) | with_flags))


def test_a_good_file_has_no_problem(startup_file: Path) -> None:
    (found,) = installation.find_startup_files()
    assert (found.path, found.problem) == (str(startup_file), None)


def test_a_file_that_macos_hides_is_named_with_its_cure(
    startup_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_flags(monkeypatch, 0x8000)
    (found,) = installation.find_startup_files()
    assert found.problem == "hidden by macOS, so Python skips it"
    assert found.cure == f"chflags nohidden {startup_file}"


def test_other_flags_of_macos_do_not_matter(startup_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have_flags(monkeypatch, 0x40)
    (found,) = installation.find_startup_files()
    assert found.problem is None
