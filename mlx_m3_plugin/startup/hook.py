"""The finder that serves our modules under upstream's names, and only when asked.

``mlx_lm.utils`` looks up a model class with ``import_module("mlx_lm.models.<type>")``.
:class:`PluginFinder` answers that question with the file named by our entry point
``mlx_lm.models`` / ``<type>``, executed *under upstream's module name*: upstream code
that tests ``type(x).__module__`` (mlx-vlm's prefix cache does) sees what it expects.

The same finder applies our patches right after an upstream module was executed, for the few
places that upstream does not look up by name.
"""

import ast
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.machinery import ModuleSpec as Spec
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution
from types import FunctionType, ModuleType
from typing import Any

from .settings import Settings, read_settings

log = logging.getLogger("mlx_m3_plugin")

DISTRIBUTION = "mlx-m3-plugin"
PATCH_GROUP = "mlx_m3_plugin.patches"
# The package in which upstream looks for a name -> the entry-point group that answers.
NAMESPACES = {
    "mlx_lm.models": "mlx_lm.models",
    "mlx_lm.tool_parsers": "mlx_lm.tool_parsers",
    "mlx_vlm.models": "mlx_vlm.models",
    "mlx_vlm.tool_parsers": "mlx_vlm.tool_parsers",  # until: mlx-vlm 0.7.1
    "mlx_vlm.tools.parsers": "mlx_vlm.tool_parsers",
}

# What happened in this process, for ``mlx-m3 doctor``, ``status()`` and bug reports.
status: dict[str, Any] = {
    "active": False,
    "why": "not asked yet",
    "settings": None,  # as they were read at activation
    "served": {},  # upstream's name -> the file that was executed
    "ours": [],  # those among them whose file is ours
    "patched": {},  # upstream module -> what our patches give M3, one line each
    "caught_up": [],  # upstream modules that were imported before us
    "errors": [],
}
# Upstream's own modules that were imported before ours replaced them.
replaced_modules: list[ModuleType] = []


def activate(replacing: Any) -> None:
    """Put the finder on ``sys.meta_path``, in the place of ``replacing`` if that is on it."""
    settings = read_settings()
    status["settings"] = status["settings"] or settings._asdict()
    for complaint in settings.complaints:
        _report(complaint)
    if status["active"] or not settings.enabled:
        if not status["active"]:
            status["why"] = "MLX_M3_PLUGIN is off"
        # A new list: the import system is iterating over the old one and would skip the finder behind us.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not replacing]
        return
    entry_points = own_entry_points()
    if not entry_points:
        _report(f"no metadata of {DISTRIBUTION} found; install it with pip instead of copying it")
    finder = PluginFinder(entry_points, settings)
    if replacing in sys.meta_path:
        # In place: the import system may be iterating over this very list.
        sys.meta_path[sys.meta_path.index(replacing)] = finder  # type: ignore[call-overload]
    else:
        sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    status.update(active=True, why="installed")
    finder.catch_up()
    log.debug("active; native modules preferred: %s", settings.prefer_native)


def own_entry_points() -> list[EntryPoint]:
    """The entry points of this distribution.  What other packages register is theirs to load."""
    groups = {*NAMESPACES.values(), PATCH_GROUP}
    try:
        # A distribution can be on sys.path twice; the first one is the one that imports.
        return [e for e in distribution(DISTRIBUTION).entry_points if e.group in groups]
    except PackageNotFoundError:
        return []


class PluginFinder:
    """A ``sys.meta_path`` finder for the names in ``NAMESPACES`` and for the modules to patch."""

    def __init__(self, entry_points: Sequence[EntryPoint], settings: Settings):
        self._modules = {(e.group, e.name): e.value for e in entry_points}
        self._patches = {e.name: e for e in entry_points if e.group == PATCH_GROUP}
        self._prefers_native = settings.prefer_native

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Spec | None:
        ours = self._module_for(fullname)
        if ours is None and fullname not in self._patches:
            return None
        native = self._native_spec(fullname, path, target)
        if ours is None:
            if native is not None and native.loader is not None:
                after = partial(self._run_patches, entry_point=self._patches[fullname])
                native.loader = _PatchingLoader(native.loader, after)  # type: ignore[assignment]
            return native
        if native is not None and self._prefers_native:
            return None
        return graft_spec(fullname, ours, native)

    def catch_up(self) -> None:
        """Patch or replace the modules that were imported before us."""
        for name, entry_point in self._patches.items():
            if name in sys.modules:
                before = dict(vars(sys.modules[name]))
                self._run_patches(sys.modules[name], entry_point)
                _renew_imports_by_name(before, sys.modules[name])
                status["caught_up"].append(name)
        served = [name for name in list(sys.modules) if self._module_for(name)]
        for name in [] if self._prefers_native else served:
            # The next look-up must find ours.  Objects made from the native module keep working.
            replaced_modules.append(sys.modules.pop(name))
            status["caught_up"].append(name)
            parent, _, leaf = name.rpartition(".")
            if hasattr(sys.modules.get(parent), leaf):
                delattr(sys.modules[parent], leaf)

    def decide(self, fullname: str) -> dict[str, str | None]:
        """Which module answers to a name of our entry points, and why.  Imports the parent packages only."""
        parent = fullname.rpartition(".")[0]
        try:
            path = getattr(importlib.import_module(parent), "__path__", None)
            native = self._native_spec(fullname, path, None)
        except ImportError:
            native = None
        if native is not None and self._prefers_native:
            why = "MLX_M3_PLUGIN_PREFER=native"
            return {"name": fullname, "source": "native", "path": native.origin, "why": why}
        why = "ours wins over the native module" if native else "upstream has no such module"
        origin = _origin(self._module_for(fullname) or "")
        return {"name": fullname, "source": "plugin", "path": origin, "why": why}

    def _module_for(self, fullname: str) -> str | None:
        parent, _, leaf = fullname.rpartition(".")
        group = NAMESPACES.get(parent)
        return None if group is None else self._modules.get((group, leaf))

    def _native_spec(self, fullname: str, path: Any, target: Any) -> Spec | None:
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                return spec
        return None

    def _run_patches(self, module: ModuleType, entry_point: EntryPoint) -> None:
        """Apply the patches of ``module`` in the list that the entry point names.

        Where upstream has changed, a patch is left out, and the others still work.
        """
        done, problems = [], {}
        try:
            for patch in entry_point.load():
                try:
                    if patch.module == module.__name__ and patch.apply(module):
                        done.append(patch.what)
                except Exception as error:
                    problems[f"without {patch.what} ({type(error).__name__}: {error})"] = error
        except Exception as error:
            problems[f"{type(error).__name__}: {error}"] = error
        if done:
            status["patched"][module.__name__] = done
        if problems:
            message = f"cannot extend {module.__name__} for MiniMax-M3: {'; '.join(problems)}"
            _report(message, next(iter(problems.values())))


def graft_spec(fullname: str, module_name: str, native: Spec | None) -> Spec:
    """A spec that executes the file of ``module_name`` as ``fullname``.

    Where ``native`` is a package, its sub-modules stay upstream's own.

    Raises:
        RuntimeError: the module named by our entry point is not there.  Not an
            ``ImportError``: upstream would turn that into "Model type not supported".
    """
    origin = _origin(module_name)
    if origin is None:
        raise RuntimeError(f"mlx-m3-plugin: {module_name}, which should serve {fullname}, is not installed")
    loader = _GraftLoader(fullname, origin, native)
    locations = native.submodule_search_locations if native else None
    spec = importlib.util.spec_from_file_location(
        fullname, origin, loader=loader, submodule_search_locations=locations
    )
    assert spec is not None
    return spec


def _renew_imports_by_name(before: Mapping[str, Any], patched: ModuleType) -> None:
    """Update names that ``from module import function`` has bound to functions that are replaced now.

    Args:
        before: the names of ``patched`` and their values before it was patched.
    """
    now = vars(patched)
    renewed = {
        id(old): now[name]
        for name, old in before.items()
        if isinstance(old, (FunctionType, type)) and now.get(name, old) is not old
    }
    others = [m for m in list(sys.modules.values()) if isinstance(m, ModuleType) and m is not patched]
    for names in map(vars, others if renewed else []):
        names.update({name: renewed[id(value)] for name, value in names.items() if id(value) in renewed})


class _GraftLoader(importlib.machinery.SourceFileLoader):
    """Executes our file under upstream's name and never fails with an ``ImportError``.

    Where upstream has changed too much, our file raises an exception with the attribute
    ``fall_back_to_native``; then the native module takes its place, with a warning.
    """

    def __init__(self, name: str, path: str, native: Spec | None):
        super().__init__(name, path)
        self._native = native

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except Exception as error:
            message = f"mlx-m3-plugin: {self.name} ({self.path}) failed: {type(error).__name__}: {error}"
            if self._native is not None and getattr(error, "fall_back_to_native", False):
                _report(f"{error}; {self.name} is upstream's own", error)
                self._exec_native(module, self._native)
                return
            status["errors"].append(message)
            raise RuntimeError(message) from error
        status["served"][self.name] = self.path
        status["ours"].append(self.name)

    def _exec_native(self, module: ModuleType, native: Spec) -> None:
        assert native.loader is not None
        kept = {name: value for name, value in vars(module).items() if name.startswith("__")}
        vars(module).clear()
        vars(module).update(kept, __spec__=native, __file__=native.origin, __loader__=native.loader)
        native.loader.exec_module(module)
        status["served"][self.name] = native.origin


class _PatchingLoader:
    """Runs ``after`` right after the real loader has executed the module."""

    def __init__(self, loader: Any, after: Callable[[ModuleType], None]):
        self._loader = loader
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def get_code(self, fullname: str) -> Any:
        """What ``python -m`` executes as ``__main__``: the module is imported under its own name, where
        our patches are, and only what upstream does as ``__main__`` is done there, with its names."""
        try:
            tree = ast.parse(self._loader.get_source(fullname))
        except Exception:
            return self._loader.get_code(fullname)
        mains = [node for node in tree.body if isinstance(node, ast.If) and _tests_for_main(node.test)]
        tree.body = [*ast.parse(_NAMES_OF_MODULE.format(fullname)).body, *mains]
        return compile(tree, self._loader.get_filename(fullname), "exec")

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module looks as if we had never been there.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._after(module)


_NAMES_OF_MODULE = """
from importlib import import_module
globals().update({{n: v for n, v in vars(import_module("{}")).items() if n[:2] != "__"}})
"""


def _tests_for_main(test: ast.expr) -> bool:
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    return "__name__" in names and any(
        isinstance(n, ast.Constant) and n.value == "__main__" for n in ast.walk(test)
    )


def _origin(module_name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        return None
    return None if spec is None else spec.origin


def _report(message: str, cause: Exception | None = None) -> None:
    status["errors"].append(message)
    if status["settings"] and status["settings"]["strict"]:
        raise RuntimeError(f"mlx-m3-plugin: {message}") from cause
    log.warning("mlx-m3-plugin: %s", message)
