"""``mlx-m3 doctor``: does an M3 checkpoint run correctly with the stock commands here?  If not, what helps?

The answer is about a new process that does not import the plugin, and about the commands on PATH.  In the
environment of another host, such as oMLX, it is about what that host loads.
"""

import os
import shlex
import shutil
import site
import stat
import sys
import sysconfig
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..startup.report import patch_lines, report, version_of
from ..startup.settings import read_settings
from .common import Answer
from .installed_hosts import classes_of_hosts, installed_hosts
from .new_process import ask

_PACKAGES = ("mlx-m3-plugin", "mlx", "mlx-lm", "mlx-vlm", "transformers")
_LIBRARIES = {"mlx_lm": "mlx-lm", "mlx_vlm": "mlx-vlm"}
_UPGRADE = "pip install --upgrade mlx-m3-plugin"
REINSTALL = "pip install --force-reinstall --no-deps mlx-m3-plugin"
FOR_MLX = (
    'pip install "mlx-m3-plugin[cpu]", or with an NVIDIA GPU [cuda12] or [cuda13] in place of [cpu]'
    if sys.platform == "linux"
    else "pip install --force-reinstall mlx"
)
_FIXES = {
    "mlx": FOR_MLX,
    "mlx_vlm": 'pip install "mlx-m3-plugin[vlm]"',
    "matplotlib": 'pip install "mlx-m3-plugin[plot]"',
}
STARTUP_FILES = ("mlx_m3_plugin_startup.pth", "mlx_m3_plugin_startup.start")
# What the interpreter of another command is asked.
_ASK = "import json, sys; print(json.dumps([sys.prefix, 'mlx_m3_plugin' in sys.modules]))"

# Runs in a new process, which loads the plugin only through its start-up file.  Arguments: the libraries.
_PROBE = """
import json, logging, sys
logging.disable(logging.WARNING)
hooked = "mlx_m3_plugin" in sys.modules
answer = {"hooked": hooked, "status": None, "modules": [], "mlx_error": None, "import_errors": {}}
try:
    import mlx.core
except Exception as error:
    answer["mlx_error"] = str(error)
for library in sys.argv[1:]:
    try:
        __import__(library)
    except Exception as error:
        answer["import_errors"][library] = repr(error)
if hooked and "mlx_m3_plugin.startup.hook" in sys.modules:
    from mlx_m3_plugin.startup import hook
    finder = next((f for f in sys.meta_path if isinstance(f, hook.PluginFinder)), None)
    if finder is not None:
        for namespace, group in hook.NAMESPACES.items():
            if namespace.split(".")[0] in sys.modules:
                names = [e.name for e in hook.own_entry_points() if e.group == group]
                answer["modules"] += [finder.decide(f"{namespace}.{name}") for name in names]
        for module in list(answer["modules"]):
            try:
                __import__(module["name"].rpartition(".")[0])
            except ModuleNotFoundError:
                # The package of another version of upstream.
                answer["modules"].remove(module)
                continue
            if module["source"] == "plugin":
                try:
                    # A module of ours may step back here if it does not fit the installed upstream.
                    __import__(module["name"])
                except Exception as error:
                    module.update(source="none", why=str(error))
                served = hook.status["served"].get(module["name"], module["path"])
                if served != module["path"]:
                    module.update(source="native", path=served, why="ours does not fit this version")
    answer["status"] = hook.status
print("\\n" + json.dumps(answer))
"""


@dataclass
class Problem:
    """Why an M3 checkpoint does not run correctly, and the command or step that helps."""

    what: str
    fix: str


class StartupFile(SimpleNamespace):
    """One of our start-up files; ``problem`` is why Python skips it, ``cure`` what helps."""


class Command(SimpleNamespace):
    """A stock command, as the shell finds it.

    Attributes:
        path: the script; None if it is not on PATH.
        python: the interpreter that the script starts; None if unknown.
        environment: that interpreter's ``sys.prefix``; None if it does not start.
        is_here: whether that is the environment here; True if unknown, as for the shims of pyenv.
        has_plugin: whether that interpreter loads the plugin at its start.
    """


class Diagnosis(SimpleNamespace):
    """The result of ``mlx-m3 doctor``.

    Attributes:
        ok: an M3 checkpoint runs correctly with the stock commands here: there are no problems.
        verdict: the same as a sentence.
        active: the plugin is active in a new process that imports mlx-lm or mlx-vlm.
        startup_files, commands: see :class:`StartupFile` and :class:`Command`.
        modules: those that we serve, with their ``name``, ``source``, ``why`` and ``path``.
        hosts: what the hosts in this environment load, beside mlx-lm and mlx-vlm.
        patches, errors: of the plugin in that process.
        problems: the most important one first.
        notes: worth knowing, but not a problem.
    """


def command(args: Namespace) -> Answer:
    if args.engine:
        # Imported here: doctor has to work where mlx cannot be imported.
        from .engine import engine_answer

        return engine_answer()
    found = diagnose()
    return Answer(found, doctor_lines(found), found.ok)


def diagnose() -> Diagnosis:
    """Look at this interpreter's environment and at PATH, and see which modules a new process gets."""
    libraries = [library for library, package in _LIBRARIES.items() if version_of(package) is not None]
    probe = _probe(libraries)
    status, import_errors = probe["status"], probe["import_errors"]
    found = Diagnosis(
        ok=False,
        verdict="",
        active=bool(probe["hooked"] and status.get("active")),
        python=f"{sys.version.split()[0]} ({sys.executable})",
        versions={name: version_of(name) for name in _PACKAGES},
        settings=read_settings()._asdict(),
        startup_files=find_startup_files(),
        commands=[find_command(f"{library}.generate") for library in libraries],
        modules=probe["modules"],
        hosts=classes_of_hosts(),
        patches=status.get("patched", {}),
        errors=[*status.get("errors", []), *(f"{name}: {e}" for name, e in import_errors.items())],
        problems=[],
        notes=[],
    )
    found.problems += _problems(found, libraries, probe)
    found.ok = not found.problems
    found.verdict = _verdict(found, libraries)
    found.notes += _notes(found)
    return found


def doctor_lines(found: Diagnosis) -> list[str]:
    """The first line is the verdict."""
    files = [file.path + (f"  ({file.problem})" if file.problem else "") for file in found.startup_files]
    modules = [f"{m['name']}: {m['source']}, {m['why']}\n    {m['path']}" for m in found.modules]
    hosts = [f"{h}: {h.module}: {h.source}\n    {h.path or h.why}" for h in found.hosts]
    versions = [f"{name} {version or 'not installed'}" for name, version in found.versions.items()]
    sections = {
        "What to do": [f"{problem.what}\n    {problem.fix}" for problem in found.problems],
        "Versions": [f"Python {found.python}", *versions],
        "Commands": [f"{c.name}: {c.path or 'not on PATH'}" for c in found.commands],
        "Start-up files": files or ["none"],
        "Modules": modules,
        "Hosts": hosts,
        "Patches": patch_lines(found.patches),
        "Errors": found.errors,
        "Notes": found.notes,
    }
    return report(found.verdict, sections).splitlines()


def _verdict(found: Diagnosis, libraries: list[str]) -> str:
    if found.problems:
        return f"No, MiniMax-M3 does not run correctly here: {found.problems[0].what}."
    sources = {module["name"]: module["source"] for module in found.modules}
    why_ours = ", because upstream has no class of its own" if found.settings["prefer_native"] else ""
    loaded = [
        (library, sources[f"{library}.models.minimax_m3_vl"], why_ours, "upstream's own class")
        for library in libraries
    ]
    loaded += [(host.host, host.source, "", "another class") for host in found.hosts if host.is_default]
    names: dict[str, list[str]] = {}
    for name, source, why, other in loaded:
        ours, native = f"this plugin{why}", f"{other}, as MLX_M3_PLUGIN_PREFER=native asks"
        if source != "none":
            names.setdefault(ours if source == "plugin" else native, []).append(name)
    parts = [f"in {' and '.join(names[which])} with {which}" for which in names]
    return f"Yes, MiniMax-M3 runs here: {'; '.join(parts)}."


# --- problems ---


def _problems(found: Diagnosis, libraries: list[str], probe: dict[str, Any]) -> Iterator[Problem]:
    if probe["died"] is not None:
        # Nothing else is known.
        yield Problem(
            f"a new Python process that imports mlx, mlx_lm and mlx_vlm ends with exit code {probe['died']}",
            f"see how far this gets: {sys.executable} -X importtime -c 'import mlx.core, mlx_lm'",
        )
        return
    yield from _missing_packages(libraries, probe)
    yield from _startup_problems(found.startup_files, probe)
    if not found.settings["enabled"]:
        yield Problem(
            "MLX_M3_PLUGIN is off, so mlx-lm and mlx-vlm use their own M3 classes, if they have any",
            "unset MLX_M3_PLUGIN",
        )
    for complaint in found.settings["complaints"]:
        what, _, fix = complaint.partition("; ")
        yield Problem(what, fix)
    yield from _failures(found, libraries, probe)
    yield from _host_problems(found)
    # Other hosts have commands of their own.
    for command in found.commands if not found.hosts else ():
        yield from _command_problems(command)


def _missing_packages(libraries: list[str], probe: dict[str, Any]) -> Iterator[Problem]:
    if probe["mlx_error"]:
        yield Problem(f"mlx cannot be imported ({probe['mlx_error']})", FOR_MLX)
    if not libraries:
        yield Problem("neither mlx-lm nor mlx-vlm is installed", "pip install mlx-lm, or mlx-vlm, or both")
    # Without mlx they cannot be imported either.
    for library, error in probe["import_errors"].items() if not probe["mlx_error"] else ():
        package = _LIBRARIES[library]
        yield Problem(f"{package} cannot be imported: {error}", f"pip install --upgrade {package}")


def _startup_problems(files: list[StartupFile], probe: dict[str, Any]) -> Iterator[Problem]:
    if probe["hooked"]:
        return
    # Python 3.15 runs a .start file, and the .pth of the same name only where there is none.
    usable = [f for f in files if f.path.endswith(".pth") or sys.version_info >= (3, 15)]
    broken = [file for file in usable if file.problem]
    for file in broken:
        yield Problem(f"{file.path} is {file.problem}", file.cure)
    if broken:
        return
    if usable:
        yield Problem(
            f"the plugin's start-up file does not run{_printed(probe)}",
            f"start Python without -S; if that does not help, {REINSTALL}",
        )
    elif is_in_site_directory():
        yield Problem("the plugin's start-up file is missing from this environment", REINSTALL)
    else:
        yield Problem(
            "the plugin is not installed in one of Python's site directories, where start-up files are read",
            "install it with pip into the environment itself (without --target), or put "
            "`import mlx_m3_plugin` first in your program",
        )


def _failures(found: Diagnosis, libraries: list[str], probe: dict[str, Any]) -> Iterator[Problem]:
    """What is installed and switched on, but fails."""
    if probe["mlx_error"] or not probe["hooked"] or not found.settings["enabled"]:
        return
    loadable = [library for library in libraries if library not in probe["import_errors"]]
    if loadable and not found.active:
        yield Problem(f"the plugin cannot be activated{_printed(probe)}", REINSTALL)
        return
    # Where another host is installed, what it loads counts.
    passed_over = {module["why"] for module in found.modules if found.hosts and module["source"] == "none"}
    errors = probe["status"].get("errors", [])
    for what in errors:
        if what not in found.settings["complaints"] and what not in passed_over:
            yield Problem(what, _UPGRADE)
    for module in found.modules:
        if module["source"] == "none" and module["why"] not in (*errors, *passed_over):
            yield Problem(f"{module['name']} cannot be served: {module['why']}", _UPGRADE)


def _host_problems(found: Diagnosis) -> Iterator[Problem]:
    """Only the class that a checkpoint gets as it is published; the other engines are in the list."""
    if not found.active:
        return
    ours = {host.host: host for host in found.hosts if host.source == "plugin"}
    for host in (host for host in found.hosts if host.is_default):
        other = ours.get(host.host)
        fix = f"use {other}" if other else f"{_UPGRADE}; if that does not help, report both versions"
        if host.source == "none":
            yield Problem(f"{host} cannot load {host.module} ({host.why})", fix)
        elif host.source == "native" and not found.settings["prefer_native"]:
            yield Problem(f"{host} loads another class, {host.path}", fix)


def _printed(probe: dict[str, Any]) -> str:
    """What the new process printed about the plugin."""
    lines = [line.strip() for line in probe["stderr"].splitlines() if "mlx-m3-plugin" in line]
    return f": {lines[-1]}" if lines else ""


def _command_problems(command: Command) -> Iterator[Problem]:
    if command.is_here:
        return
    what = f"{command.name} on PATH ({command.path}) belongs to another environment"
    here = Path(sys.executable).parent / command.name
    otherwise = f"; or run {here}" if here.exists() else ""
    if command.environment is None or command.python is None:
        yield Problem(
            f"{command.name} on PATH ({command.path}) cannot start: {command.python} is not a working Python",
            f"remove it, or reinstall its package{otherwise}",
        )
    elif command.has_plugin:
        fix = f"run doctor there: {command.python} -m mlx_m3_plugin.cli doctor{otherwise}"
        yield Problem(f"{what}, {command.environment}, which has the plugin as well", fix)
    else:
        install = how_to_install_into(Path(command.environment), command.python)
        yield Problem(f"{what}, {command.environment}, which does not have the plugin", install + otherwise)


def _notes(found: Diagnosis) -> Iterator[str]:
    for command in found.commands:
        if command.path is None:
            there = Path(sys.executable).parent / command.name
            yield f"{command.name} is not on PATH: activate this environment, or run {there}"
    if "JPY_PARENT_PID" in os.environ:
        yield (
            "this is about new processes; a notebook that was started before the plugin was installed needs "
            "a restart or `import mlx_m3_plugin`, and `mlx_m3_plugin.status()` describes the notebook itself"
        )
    if not found.hosts:
        return
    names = " and ".join(dict.fromkeys(host.host for host in found.hosts))
    yield (
        f"do not install mlx-m3-plugin[vlm] or another extra here: it may replace the mlx, mlx-vlm and "
        f"transformers of {names}; `pip install --no-deps mlx-m3-plugin` changes nothing else"
    )
    for module in found.modules:
        if module["source"] == "none":
            yield f"outside of {names}, {module['name']} cannot be served: {module['why']}"


def _probe(libraries: list[str]) -> dict[str, Any]:
    nothing: dict[str, Any] = dict(hooked=False, status=None, modules=[], mlx_error=None, import_errors={})
    answer, run = ask(_PROBE, *libraries)
    died, answer = (run.returncode, nothing) if answer is None else (None, answer)
    return {**answer, "status": answer["status"] or {}, "stderr": run.stderr, "died": died}


# --- what is installed ---


def what_to_install(error: ImportError) -> str | None:
    """What a user should install, in one line; None if the error is in our own package."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "mlx_m3_plugin"):
        return None
    if package == "mlx_vlm" and (hosts := installed_hosts()):
        # The extra would replace what the host needs.
        return f"mlx_vlm cannot be imported ({error}): install the mlx-vlm that {hosts[0]} asks for"
    # The other packages that we import are mlx-lm and its dependencies.
    return f"{package} cannot be imported ({error}): {_FIXES.get(package, 'pip install --upgrade mlx-lm')}"


def find_startup_files() -> list[StartupFile]:
    """Our start-up files in the directories where Python looks for them."""
    paths = [directory / name for directory in _site_directories() for name in STARTUP_FILES]
    return [_startup_file(path) for path in paths if path.exists()]


def is_in_site_directory() -> bool:
    """Whether pip has put the plugin, or the link to its checkout, where Python reads start-up files."""
    try:
        metadata = distribution("mlx-m3-plugin").locate_file("")
    except PackageNotFoundError:
        return False
    return Path(str(metadata)).resolve() in [directory.resolve() for directory in _site_directories()]


def _startup_file(path: Path) -> StartupFile:
    found = StartupFile(path=str(path), problem=None, cure=None)
    # macOS hides files in some folders, and ``site`` silently skips hidden files.
    hidden = getattr(stat, "UF_HIDDEN", 0x8000)
    if getattr(os.lstat(path), "st_flags", 0) & hidden:
        found.problem, found.cure = "hidden by macOS, so Python skips it", f"chflags nohidden {path}"
    elif not os.access(path, os.R_OK):
        found.problem, found.cure = "not readable", f"chmod a+r {path}"
    elif path.stat().st_size == 0:
        found.problem, found.cure = "empty", REINSTALL
    return found


def _site_directories() -> list[Path]:
    names = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        names.append(site.getusersitepackages())
    return [Path(name) for name in dict.fromkeys(names)]


def find_command(name: str) -> Command:
    path = shutil.which(name)
    python = None if path is None else _interpreter_of(Path(path))
    found = Command(name=name, path=path, python=python, environment=None, is_here=True, has_plugin=False)
    if python is None:
        return found
    try:
        (found.environment, found.has_plugin), _ = ask(_ASK, python=python)
        found.is_here = os.path.realpath(found.environment) == os.path.realpath(sys.prefix)
    except (OSError, TypeError, ValueError):
        found.is_here = False
    return found


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
