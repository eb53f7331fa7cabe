"""Throw-away virtual environments that cost a tenth of a second instead of a gigabyte.

What we promise is about *installed* packages: that pip installs the start-up files, that
a process finds them without importing us, that uninstalling leaves nothing.  So the tests
install the real wheel with the real pip.  Only the heavy packages around it are borrowed:
``site-packages`` of a new environment is filled with links to the entries of the running
interpreter's, so pip sees mlx-lm as installed and everything we write stays in here.
"""

import atexit
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

from tests.end_to_end.forks import Fork, Forks

CHECKOUT = Path(__file__).resolve().parents[2]

# Ours in every form of installation, and byte code that belongs to the borrowed directory.
PLUGIN = "*mlx_m3_plugin*"
NEVER_SHARED = (PLUGIN, "__pycache__")
# mlx-lm does not need torch, but transformers imports it where it is: 1.5 s a process.
SLOW_AND_UNNEEDED = ("torch", "torch-*", "torchgen", "functorch")

CONSOLE_SCRIPT = """\
#!{python}
import sys
from {module} import {function}
if __name__ == '__main__':
    sys.exit({function}())
"""
# Runs a script, and then prints the file of a module: ``python -c SERVED_BY MODULE SCRIPT ARGUMENTS``.
SERVED_BY = """
import runpy, sys
_, module, *sys.argv = sys.argv
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(sys.modules[module].__file__)
"""


class CommandError(AssertionError):
    """A child process failed; the message holds all it said."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment and the ways to run something in it."""

    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        (directory,) = self.path.glob("lib/python*/site-packages")
        return directory

    @property
    def plugin(self) -> Path:
        """The installed package, where it is a real directory (so not in an editable install)."""
        return self.site_packages / "mlx_m3_plugin"

    def run(
        self,
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        input: str | None = None,
        timeout: float = 300,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run this environment's ``python *args`` with the variables ``env`` added to a clean set."""
        command = [str(self.python), *map(str, args)]
        done = subprocess.run(
            command,
            env=clean_variables() | dict(env or {}),
            cwd=cwd or self.path,
            input=input,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
        return checked(done) if check else done

    def start(
        self, *args: str | Path, log: Path, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes] | Fork":
        """Start ``python *args``, which writes all that it says into ``log``."""
        with log.open("w") as file:
            return subprocess.Popen(
                [str(self.python), *map(str, args)],
                env=clean_variables() | dict(env or {}),
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def pip(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pip", "--disable-pip-version-check", *args)

    def install(self, *what: str | Path) -> None:
        """Install from local files alone; the dependencies are there already."""
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *what)

    def install_from(self, other: "Environment") -> None:
        """The plugin as pip has installed it in another environment: its files are the same everywhere."""
        for entry in other.site_packages.glob(PLUGIN):
            if entry.is_dir():
                shutil.copytree(entry, self.site_packages / entry.name)
            else:
                shutil.copy2(entry, self.site_packages)
        self.script("mlx-m3")

    def uninstall(self) -> None:
        self.pip("uninstall", "--yes", "mlx-m3-plugin")

    def script(self, name: str) -> Path:
        """The console script ``name``, such as ``mlx_lm.generate``.

        Scripts of borrowed packages are not linked: their first line names the other
        environment's interpreter.  The file is written here from the same metadata and in
        the same words as pip would, so that ``sys.argv[0]``, ``sys.path[0]`` and
        ``__main__`` are what a user's process has.
        """
        path = self.path / "bin" / name
        if not path.exists():
            entry_point = self._console_entry_point(name)
            source = CONSOLE_SCRIPT.format(
                python=self.python, module=entry_point.module, function=entry_point.attr
            )
            path.write_text(source)
            path.chmod(0o755)
        return path

    def run_script(self, name: str, *args: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        """Run a console script, by its interpreter: a long path would not fit into a ``#!`` line."""
        return self.run(self.script(name), *args, **options)  # type: ignore[arg-type]

    def _console_entry_point(self, name: str) -> EntryPoint:
        for distribution in distributions(path=[str(self.site_packages)]):
            for entry_point in distribution.entry_points:
                if entry_point.group == "console_scripts" and entry_point.name == name:
                    return entry_point
        raise LookupError(f"no console script {name!r} in {self.path}")


@dataclass(frozen=True)
class WarmEnvironment(Environment):
    """One whose processes are forks: for what commands do, not for how Python starts."""

    forks: Forks

    def run(
        self,
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        input: str | None = None,
        timeout: float = 300,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        done = self.forks.run(args, cwd or self.path, env, input or "", timeout)
        return checked(done) if check else done

    def start(self, *args: str | Path, log: Path | None = None, env: Mapping[str, str] | None = None) -> Fork:
        return self.forks.start(args, self.path, env, log=log)


def warmed(environment: Environment, *flags: str, **variables: str) -> WarmEnvironment:
    """``variables`` and the interpreter's ``flags`` are those of all runs."""
    offline = clean_variables() | {"HF_HUB_OFFLINE": "1"} | variables
    return WarmEnvironment(environment.path, Forks(environment.python, offline, *flags))


@contextmanager
def warm(environment: Environment, *flags: str, **variables: str) -> Iterator[WarmEnvironment]:
    running = warmed(environment, *flags, **variables)
    try:
        yield running
    finally:
        running.forks.close()


@cache
def here() -> WarmEnvironment:
    """The environment of these tests, with the plugin; each run is a fork, which starts at once."""
    running = warmed(Environment(Path(sys.prefix)))
    atexit.register(running.forks.close)
    return running


def checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if done.returncode != 0:
        raise CommandError(f"{done.args}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def clean_variables() -> dict[str, str]:
    """The environment variables of this process that change nothing about Python or about us."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLX_M3_PLUGIN"))
    }


def make_environment(path: Path, leave_out: tuple[str, ...] = SLOW_AND_UNNEEDED) -> Environment:
    """A new environment at ``path`` with the packages of the running one, but without the plugin."""
    venv.create(path, with_pip=False, symlinks=True)
    environment = Environment(path)
    for name, entry in shared_entries(leave_out).items():
        (environment.site_packages / name).symlink_to(entry)
    return environment


# All that mlx-lm takes of transformers when it is imported.
TRANSFORMERS = """
import sys
class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: None
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(name, (), {})
sys.modules["transformers.tokenization_utils_base"] = sys.modules["transformers"]
"""


def make_quick_environment(path: Path, *leave_out: str) -> Environment:
    """One where ``import mlx_lm`` takes a fifth of its time, for want of transformers."""
    environment = make_environment(path, (*SLOW_AND_UNNEEDED, "transformers", *leave_out))
    (environment.site_packages / "transformers").mkdir()
    (environment.site_packages / "transformers" / "__init__.py").write_text(TRANSFORMERS)
    return environment


def shared_entries(leave_out: tuple[str, ...]) -> dict[str, Path]:
    """What to borrow, by name; of two directories with the same name the one that imports first."""
    directories = [Path(directory) for directory in reversed(site.getsitepackages())]
    entries = {entry.name: entry for d in directories if d.is_dir() for entry in d.iterdir()}
    patterns = (*NEVER_SHARED, *leave_out)
    return {n: entry for n, entry in entries.items() if not any(fnmatch(n, pattern) for pattern in patterns)}


def build_wheel(directory: Path) -> Path:
    """Build the wheel of this checkout into ``directory``."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    subprocess.run(command, cwd=CHECKOUT, env=clean_variables(), check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    return wheel
