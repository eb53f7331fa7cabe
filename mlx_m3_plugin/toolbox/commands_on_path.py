"""Which environment a command on PATH belongs to."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_ASK = "import json, sys; print(json.dumps([sys.prefix, 'mlx_m3_plugin' in sys.modules]))"


@dataclass
class Command:
    """A stock command, as the shell finds it.

    Attributes:
        path: the script; None where PATH has none.
        python: the interpreter that the script starts; None where it does not say.
        environment: that interpreter's ``sys.prefix``; None where it does not start.
        is_here: whether this is the environment of the running interpreter.  True where
            nothing says otherwise, as for the shims of pyenv.
        has_plugin: whether that interpreter has the plugin from its start.
    """

    name: str
    path: str | None = None
    python: str | None = None
    environment: str | None = None
    is_here: bool = True
    has_plugin: bool = False


def find_command(name: str) -> Command:
    path = shutil.which(name)
    python = None if path is None else _interpreter_of(Path(path))
    if python is None:
        return Command(name, path)
    try:
        run = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, cwd=Path(python).parent)
        environment, has_plugin = json.loads(run.stdout.splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return Command(name, path, python, is_here=False)
    is_here = os.path.realpath(environment) == os.path.realpath(sys.prefix)
    return Command(name, path, python, environment, is_here, has_plugin)


def _interpreter_of(script: Path) -> str | None:
    """From the first line ``#!/path/python``, or from the second where pip had to go through a shell."""
    try:
        first, second = [*script.read_text(encoding="utf-8").splitlines(), "", ""][:2]
        words = shlex.split(first.removeprefix("#!"))
        if words == ["/bin/sh"]:
            # '''exec' "/a path/with spaces/python" "$0" "$@"
            words = shlex.split(second)[1:]
        elif words[:1] == ["/usr/bin/env"]:
            words = [shutil.which(word) or word for word in words[1:]]
    except (OSError, ValueError):
        return None
    is_python = (
        first.startswith("#!") and words and Path(words[0]).name.lower().startswith(("python", "pypy"))
    )
    return words[0] if is_python else None


def how_to_install_into(environment: Path, python: str) -> str:
    """The command that installs the plugin into the environment of another command."""
    if (environment / "uv-receipt.toml").exists():
        return f"uv tool install {environment.name} --with mlx-m3-plugin"
    if (environment / "pipx_metadata.json").exists():
        return f"pipx inject {environment.name} mlx-m3-plugin"
    made_by = environment / "pyvenv.cfg"
    if made_by.exists() and "\nuv = " in made_by.read_text(encoding="utf-8"):
        return f"uv pip install --python {shlex.quote(python)} mlx-m3-plugin"
    return f"{shlex.quote(python)} -m pip install mlx-m3-plugin"
