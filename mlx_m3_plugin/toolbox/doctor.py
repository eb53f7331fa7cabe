"""Is the plugin active where it matters: in a fresh process that does not import it?"""

import json
import os
import site
import stat
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..startup.settings import read_settings

STARTUP_FILES = ("mlx_m3_plugin_startup.pth", "mlx_m3_plugin_startup.start")
_PACKAGES = ("mlx-m3-plugin", "mlx", "mlx-lm", "mlx-vlm", "transformers")

# Runs in a fresh process, which learns of us only through the start-up file.
_PROBE = """
import json, logging, sys
logging.disable(logging.WARNING)
hooked = "mlx_m3_plugin" in sys.modules
answer = {"hooked": hooked, "status": None, "modules": []}
for library in ("mlx_lm", "mlx_vlm"):
    try:
        __import__(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            answer.setdefault("import_errors", {})[library] = repr(error)
    except Exception as error:
        answer.setdefault("import_errors", {})[library] = repr(error)
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
                # Where another version of upstream looks.
                answer["modules"].remove(module)
                continue
            if module["source"] == "plugin":
                try:
                    # Some stand back at this moment, if the installed upstream is not one they fit.
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
class StartupFile:
    """A start-up file where the interpreter looks for it, and what stops it from running."""

    path: str
    problem: str | None = None
    cure: str | None = None


@dataclass
class Diagnosis:
    """Everything ``mlx-m3 doctor`` knows.

    Attributes:
        active: a fresh process that imports mlx-lm or mlx-vlm gets our modules.
        advice: what to do, one line each; empty when all is well.
    """

    active: bool
    python: str
    versions: dict[str, str | None]
    settings: dict[str, Any]
    startup_files: list[StartupFile]
    modules: list[dict[str, str | None]] = field(default_factory=list)
    patches: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this interpreter's environment, and start a fresh process to see what it gets."""
    files = find_startup_files()
    probe = _ask_fresh_process()
    status = probe.get("status") or {}
    diagnosis = Diagnosis(
        active=bool(probe.get("hooked") and status.get("active")),
        python=f"{sys.version.split()[0]} ({sys.executable})",
        versions={name: _version(name) for name in _PACKAGES},
        settings=asdict(read_settings()),
        startup_files=files,
        modules=probe.get("modules", []),
        patches=status.get("patched", {}),
        errors=[*status.get("errors", []), *_import_errors(probe)],
    )
    diagnosis.advice = _advice(diagnosis, probe)
    return diagnosis


def find_startup_files() -> list[StartupFile]:
    """Our start-up files in the site directories, with the reason why one would be skipped."""
    found = []
    for directory in _site_directories():
        for name in STARTUP_FILES:
            path = directory / name
            if path.exists():
                problem, cure = _why_skipped(path)
                found.append(StartupFile(str(path), problem, cure))
    return found


def _why_skipped(path: Path) -> tuple[str | None, str | None]:
    # On macOS some folders hide what is put into them, and ``site`` skips hidden files in silence.
    hidden = getattr(stat, "UF_HIDDEN", 0x8000)
    flags = getattr(os.lstat(path), "st_flags", 0)
    if flags & hidden:
        return "hidden by macOS, so Python skips it", f"chflags nohidden {path}"
    if not os.access(path, os.R_OK):
        return "not readable", f"chmod a+r {path}"
    if path.stat().st_size == 0:
        return "empty", "pip install --force-reinstall --no-deps mlx-m3-plugin"
    return None, None


def _site_directories() -> list[Path]:
    names = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        names.append(site.getusersitepackages())
    return [Path(name) for name in dict.fromkeys(names)]


def _ask_fresh_process() -> dict[str, Any]:
    # Not the current directory: a checkout of ours there would be found without being installed.
    run = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, cwd=Path(sys.executable).parent
    )
    try:
        return json.loads(run.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"import_errors": {"fresh process": run.stderr.strip() or f"exit code {run.returncode}"}}


def _import_errors(probe: dict[str, Any]) -> list[str]:
    return [f"{library}: {error}" for library, error in probe.get("import_errors", {}).items()]


def _advice(diagnosis: Diagnosis, probe: dict[str, Any]) -> list[str]:
    advice = [f.cure for f in diagnosis.startup_files if f.cure]
    if not diagnosis.settings["enabled"]:
        advice.append("MLX_M3_PLUGIN is off; unset it to switch the plugin on")
    elif not diagnosis.startup_files:
        advice.append(
            "no start-up file in this environment's site directories: install with pip into the "
            "environment itself (not --target), or write `import mlx_m3_plugin` first in your program"
        )
    elif not probe.get("hooked") and not advice:
        advice.append("the start-up file did not run: is PYTHON started with -S, or by an application?")
    if diagnosis.versions["mlx-lm"] is None and diagnosis.versions["mlx-vlm"] is None:
        advice.append("neither mlx-lm nor mlx-vlm is installed")
    return advice


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
