"""Copies of upstream's modules to patch, some with a name changed, and objects that record reads."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_m3_plugin.chat import tool_calls

RENAMED = "_in_the_next_version"


def patch_of(module_name: str) -> Callable[..., Any]:
    """The function that the hook runs after this module."""
    (entry_point,) = entry_points(group="mlx_m3_plugin.patches", name=module_name)
    return entry_point.load()


def patched(module: ModuleType) -> list[str]:
    """Patch a copy as the hook does it; returns what the hook would report."""
    try:
        patch_of(module.__name__)(module, lambda group: [tool_calls])
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def copy_of(module_name: str, rename: str = "") -> ModuleType:
    """The module, executed once more from its file, without any patch.

    Args:
        rename: what has another name there: ``function``, ``Class``, ``Class.method``, ``.attribute``,
            ``function(parameter)`` or ``Class.method(parameter)``.
    """
    file = import_module(module_name).__file__
    assert file is not None
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    if rename:
        renamer = _Renamer(rename)
        tree = ast.fix_missing_locations(renamer.visit(tree))
        assert renamer.found, f"{module_name} has no {rename}"
    copy = ModuleType(module_name)
    copy.__file__, copy.__spec__ = file, sys.modules[module_name].__spec__
    copy.__package__ = copy.__spec__.parent
    exec(compile(tree, file, "exec"), vars(copy))
    return copy


def has(module_name: str, name: str) -> bool:
    """Whether the installed version has it; versions differ."""
    file = import_module(module_name).__file__
    renamer = _Renamer(name)
    renamer.visit(ast.parse(Path(file).read_text(encoding="utf-8")))  # type: ignore[arg-type]
    return renamer.found


def get(owner: Any, name: str) -> Any:
    """An attribute by its name or by its new one."""
    return getattr(owner, name, None) or getattr(owner, name + RENAMED)


class _Renamer(ast.NodeTransformer):
    def __init__(self, what: str) -> None:
        path, _, parameter = what.rstrip(")").partition("(")
        self.owner, _, self.name = path.rpartition(".")
        self.parameter, self.is_attribute = parameter, what.startswith(".")
        self.found = False
        self._classes: list[str] = []
        self._inside = False

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        if not (self.owner or self.is_attribute or self.parameter) and node.name == self.name:
            node.name, self.found = self.name + RENAMED, True
        self._classes.append(node.name)
        self.generic_visit(node)
        self._classes.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        is_it = (
            not self.is_attribute
            and node.name == self.name
            and self._classes[-1:] == [self.owner] * bool(self.owner)
        )
        if is_it and not self.parameter:
            node.name, self.found = self.name + RENAMED, True
        self._inside = self._inside or bool(is_it and self.parameter)
        self.generic_visit(node)
        self._inside = self._inside and not is_it
        return node

    def visit_arg(self, node: ast.arg) -> Any:
        if self._inside and node.arg == self.parameter:
            node.arg, self.found = node.arg + RENAMED, True
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        called = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if self.parameter and called in (self.name, self.owner):
            for keyword in node.keywords:
                if keyword.arg == self.parameter:
                    keyword.arg += RENAMED
        self.generic_visit(node)
        return node

    def visit_Name(self, node: ast.Name) -> Any:
        if self._inside:
            node.id += RENAMED if node.id == self.parameter else ""
        elif not (self.owner or self.parameter or self.is_attribute) and node.id == self.name:
            node.id += RENAMED
        return node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        self.generic_visit(node)
        if self.is_attribute and node.attr == self.name:
            node.attr, self.found = self.name + RENAMED, True
        elif self.owner and not self.parameter and node.attr == self.name:
            of = getattr(node.value, "id", "").removesuffix(RENAMED)
            node.attr += RENAMED if of in (self.owner, "self", "cls") else ""
        return node


class Recorder:
    """Has what it was given and nothing else, and writes down what it is asked for."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(_attributes=attributes, _reads=set())

    def __getattr__(self, name: str) -> Any:
        self._reads.add(name)
        try:
            return self._attributes[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._attributes[name] = value


def reads(*recorders: Recorder) -> list[list[str]]:
    return [sorted(vars(recorder)["_reads"]) for recorder in recorders]
