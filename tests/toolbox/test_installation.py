"""What is installed: packages, start-up files, and the environment that a command on PATH belongs to."""

import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_m3_plugin import cli
from mlx_m3_plugin.toolbox import doctor as installation
from mlx_m3_plugin.toolbox.doctor import FOR_MLX, find_command, how_to_install_into

# --- packages ---


def fail_with(error: ImportError, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(command=fail))
    return cli.main(["inspect", "somewhere"])


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("mlx", FOR_MLX),
        ("mlx.core", FOR_MLX),
        ("mlx_vlm.models", 'pip install "mlx-m3-plugin[vlm]"'),
        ("matplotlib", 'pip install "mlx-m3-plugin[plot]"'),
        ("transformers", "pip install --upgrade mlx-lm"),
    ],
)
def test_a_package_that_is_missing(
    name: str, fix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(ModuleNotFoundError("gone", name=name), monkeypatch) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"mlx-m3: {name.partition('.')[0]} cannot be imported (gone): {fix}\n"


@pytest.mark.parametrize("name", [None, "mlx_m3_plugin.toolbox.gone"])
def test_a_fault_of_ours_is_not_for_the_user_to_install(
    name: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(ImportError("gone", name=name), monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("mlx-m3: ImportError: gone (")
    assert "install" not in said


# --- start-up files ---


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


# --- commands on PATH ---


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mlx_lm.generate"
    path.write_text("")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin")
    return path


@pytest.mark.parametrize(
    "head",
    [
        "#!{python}",
        "#!{python} -E",
        "#!/usr/bin/env python",
        # What pip and uv write where the path is too long for a first line, or has spaces.
        "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''",
        "#!/bin/sh\n'''exec' {python} \"$0\" \"$@\"\n' '''",
    ],
)
def test_a_script_of_this_environment(script: Path, head: str) -> None:
    script.write_text(head.format(python=sys.executable) + "\nimport sys\n")
    found = find_command("mlx_lm.generate")
    assert found.path == str(script)
    assert Path(found.python or "").parent == Path(sys.executable).parent
    assert found.environment == sys.prefix
    assert found.is_here


@pytest.mark.parametrize(
    ("directory", "head"),
    [("other", "#!{python}"), ("other one", "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''")],
)
def test_a_script_of_another_environment(script: Path, tmp_path: Path, directory: str, head: str) -> None:
    python = tmp_path / directory / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho '[\"/elsewhere\", true]'\n")
    python.chmod(0o755)
    script.write_text(head.format(python=python) + "\nimport sys\n")
    found = find_command("mlx_lm.generate")
    assert (found.environment, found.is_here, found.has_plugin) == ("/elsewhere", False, True)


@pytest.mark.parametrize("content", ["#!/usr/bin/env bash\nexec pyenv exec mlx_lm.generate\n", "", "\0ELF"])
def test_what_does_not_say_is_not_held_against_it(script: Path, content: str) -> None:
    script.write_text(content)
    found = find_command("mlx_lm.generate")
    assert (found.python, found.is_here) == (None, True)


def test_a_script_without_its_interpreter(script: Path, tmp_path: Path) -> None:
    script.write_text(f"#!{tmp_path}/gone/bin/python3.12\n")
    found = find_command("mlx_lm.generate")
    assert (found.python, found.environment) == (f"{tmp_path}/gone/bin/python3.12", None)
    assert not found.is_here


def test_no_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_command("mlx_lm.generate").path is None


@pytest.mark.parametrize(
    ("file", "content", "command"),
    [
        ("uv-receipt.toml", "", "uv tool install mlx-lm --with mlx-m3-plugin"),
        ("pipx_metadata.json", "{}", "pipx inject mlx-lm mlx-m3-plugin"),
        ("pyvenv.cfg", "home = /x\nuv = 0.9.0\n", "uv pip install --python '/a b/python' mlx-m3-plugin"),
        ("pyvenv.cfg", "home = /x\nversion = 3.12\n", "'/a b/python' -m pip install mlx-m3-plugin"),
        ("other", "", "'/a b/python' -m pip install mlx-m3-plugin"),
    ],
)
def test_how_to_install(tmp_path: Path, file: str, content: str, command: str) -> None:
    environment = tmp_path / "mlx-lm"
    environment.mkdir()
    (environment / file).write_text(content)
    assert how_to_install_into(environment, "/a b/python") == command
    assert shlex.split(command)
