"""What is installed: packages, start-up files of this environment, and the commands on PATH."""

import json
import os
import shlex
import shutil
import site
import stat
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

REINSTALL = "pip install --force-reinstall --no-deps mlx-m3-plugin"

# --- packages ---

FOR_MLX = (
    'pip install "mlx-m3-plugin[cpu]", or with an NVIDIA GPU [cuda12] or [cuda13] in place of [cpu]'
    if sys.platform == "linux"
    else "pip install --force-reinstall mlx"
)
_FOR = {
    "mlx": FOR_MLX,
    "mlx_vlm": 'pip install "mlx-m3-plugin[vlm]"',
    "matplotlib": 'pip install "mlx-m3-plugin[plot]"',
}


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def what_to_install(error: ImportError) -> str | None:
    """What a user should install, in one line; None if the error is in our own package."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "mlx_m3_plugin"):
        return None
    # The other packages that we import are mlx-lm and its dependencies.
    return f"{package} cannot be imported ({error}): {_FOR.get(package, 'pip install --upgrade mlx-lm')}"


# --- start-up files ---

STARTUP_FILES = ("mlx_m3_plugin_startup.pth", "mlx_m3_plugin_startup.start")


@dataclass
class StartupFile:
    """One of our start-up files; ``problem`` is why Python skips it, ``cure`` what helps."""

    path: str
    problem: str | None = None
    cure: str | None = None


def find_startup_files() -> list[StartupFile]:
    """Our start-up files in the directories where Python looks for them."""
    paths = [directory / name for directory in _site_directories() for name in STARTUP_FILES]
    return [StartupFile(str(path), *_why_skipped(path)) for path in paths if path.exists()]


def is_in_site_directory() -> bool:
    """Whether pip has put the plugin, or the link to its checkout, where Python reads start-up files."""
    try:
        metadata = distribution("mlx-m3-plugin").locate_file("")
    except PackageNotFoundError:
        return False
    return Path(str(metadata)).resolve() in [directory.resolve() for directory in _site_directories()]


def _why_skipped(path: Path) -> tuple[str | None, str | None]:
    # macOS hides files in some folders, and ``site`` silently skips hidden files.
    hidden = getattr(stat, "UF_HIDDEN", 0x8000)
    flags = getattr(os.lstat(path), "st_flags", 0)
    if flags & hidden:
        return "hidden by macOS, so Python skips it", f"chflags nohidden {path}"
    if not os.access(path, os.R_OK):
        return "not readable", f"chmod a+r {path}"
    if path.stat().st_size == 0:
        return "empty", REINSTALL
    return None, None


def _site_directories() -> list[Path]:
    names = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        names.append(site.getusersitepackages())
    return [Path(name) for name in dict.fromkeys(names)]


# --- commands on PATH ---

_ASK = "import json, sys; print(json.dumps([sys.prefix, 'mlx_m3_plugin' in sys.modules]))"


@dataclass
class Command:
    """A stock command, as the shell finds it.

    Attributes:
        path: the script; None if it is not on PATH.
        python: the interpreter that the script starts; None if unknown.
        environment: that interpreter's ``sys.prefix``; None if it does not start.
        is_here: whether this is the environment of the running interpreter.  True if
            unknown, as for the shims of pyenv.
        has_plugin: whether that interpreter loads the plugin at its start.
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
    """From the first line ``#!/path/python``, or from the second if pip had to start it with a shell."""
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
