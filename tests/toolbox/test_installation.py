"""Which environment a command on PATH belongs to, by the script's first lines."""

import shlex
import sys
from pathlib import Path

import pytest

from mlx_m3_plugin.toolbox.installation import find_command, how_to_install_into


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
