"""What the plugin does in this process, for people and notebooks.  Imports no upstream library."""

import gc
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from . import hook
from .report import patch_lines, report, version_of
from .settings import lines_of, read_settings


@dataclass(repr=False)
class Status:
    """What ``mlx_m3_plugin.status()`` returns.  Its ``repr`` is for people.

    Attributes:
        version: of the plugin that runs in this process.
        state: one sentence.
        active: mlx-lm or mlx-vlm is imported and gets our modules.
        modules: for each upstream name that we can serve ``name``, ``source`` (``"plugin"``,
            ``"native"`` or ``"undecided"``), ``path`` and ``why``.
        settings: the switches in force, by the names of ``startup.settings.Settings``.
        patches: upstream module -> what we have added to it.
        advice: what to do, one line each; empty when all is well.
    """

    version: str
    state: str
    active: bool
    modules: list[dict[str, str | None]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    patches: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __repr__(self) -> str:
        sections = {
            "Modules": [f"{m['name']}: {m['source']}, {m['why']}" for m in self.modules],
            "Settings": lines_of(self.settings),
            "Patches": patch_lines(self.patches),
            "Errors": self.errors,
            "What to do": self.advice,
        }
        return report(f"mlx-m3-plugin {self.version} {self.state}", sections)


def status_of_process(running_version: str, failure: str | None) -> Status:
    """Args: the plugin's version, and why activating it failed, if it did."""
    known, now = hook.status, read_settings()._asdict()
    # Only these are read once; the others, each time a model is made.
    at_activation = ("enabled", "prefer_native", "strict")
    settings = now | {name: (known["settings"] or now)[name] for name in at_activation}
    if failure:
        state = f"is NOT ACTIVE in this process: {failure}"
    elif known["active"]:
        state = "is active in this process"
    elif not settings["enabled"]:
        state = "is switched off in this process by MLX_M3_PLUGIN"
    else:
        state = "waits in this process for mlx_lm or mlx_vlm to be imported"
    serves = not failure and settings["enabled"]
    return Status(
        version=running_version,
        state=state,
        active=known["active"],
        modules=_modules(serves, settings["prefer_native"]),
        settings=settings,
        patches=dict(known["patched"]),
        errors=[*([failure] if failure else []), *known["errors"]],
        advice=[*_advice_on_settings(settings, now), *_advice_on_restart(running_version)],
    )


def _modules(serves: bool, prefer_native: bool) -> list[dict[str, str | None]]:
    return [
        _module(f"{namespace}.{entry_point.name}", namespace, serves, prefer_native)
        for entry_point in hook.own_entry_points()
        for namespace, group in hook.NAMESPACES.items()
        if group == entry_point.group and _is_looked_up_in(namespace)
    ]


def _is_looked_up_in(namespace: str) -> bool:
    """Whether the library looks there, in this version; if it is not imported, only ``models`` counts."""
    library = namespace.partition(".")[0]
    if library in sys.modules:
        return namespace in sys.modules
    return namespace == f"{library}.models" and version_of(library.replace("_", "-")) is not None


def _module(name: str, parent: str, serves: bool, prefer_native: bool) -> dict[str, str | None]:
    def row(source: str, why: str, path: str | None = None) -> dict[str, str | None]:
        return {"name": name, "source": source, "path": path, "why": why}

    if name in sys.modules:
        path = getattr(sys.modules[name], "__file__", None)
        return row("plugin" if name in hook.status["ours"] else "native", "in use", path)
    if not serves:
        return row("native", "the plugin does not serve here")
    finder = next((f for f in sys.meta_path if isinstance(f, hook.PluginFinder)), None)
    if finder is not None and parent in sys.modules:
        return finder.decide(name)
    why = f"decided when {parent.partition('.')[0]} is imported"
    return row("undecided" if prefer_native else "plugin", why if prefer_native else "when it is imported")


def _advice_on_settings(in_force: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if in_force != now:
        return ["the environment variables have changed since the plugin read them: restart this process"]
    return [] if in_force["enabled"] else ["unset MLX_M3_PLUGIN and restart this process to use the plugin"]


def _advice_on_restart(running_version: str) -> list[str]:
    advice = []
    installed = version_of(hook.DISTRIBUTION)
    if installed is not None and installed != running_version:
        advice.append(f"version {installed} has been installed since: restart this process to use it")
    models = sum(_instances(module) for module in hook.replaced_modules)
    if models:
        advice.append(
            f"M3 models in memory that were loaded before the plugin and have upstream's class: {models}; "
            "load them again"
        )
    libraries = sorted({name.partition(".")[0] for name in hook.status["caught_up"]})
    if libraries:
        advice.append(
            f"imported before the plugin: {' and '.join(libraries)}. Load older tokenizers and processors "
            "again. Functions imported by name are up to date; functools.partial objects, "
            "subclasses and other references to them are not. A restart updates everything"
        )
    return advice


def _instances(module: Any) -> int:
    """How many models of a class that is no longer served are in memory."""
    model = getattr(module, "Model", None)
    return 0 if model is None else sum(type(thing) is model for thing in gc.get_objects())
