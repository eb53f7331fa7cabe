"""Patches applied to copies of upstream's modules, each with one name changed that they need.

``test_patches.py`` and ``tests/vlm/test_vlm_patches.py`` run every entry of the two lists of patches
through this.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch as mocked

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_m3_plugin.hosts.patching import Patch, parse_need
from mlx_m3_plugin.startup import hook
from mlx_m3_plugin.startup.settings import Settings

RENAMED = "_in_the_next_version"
# What another model does with a copy of a module.  Returns what came out, and what was read of
# stand-ins that have no more than stock reads.
Use = Callable[[ModuleType, Path], Any]


def write_checkpoint(directory: Path, config: dict[str, Any], model: Any) -> Path:
    """A checkpoint of another model, with a tokenizer of three words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    bare = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>").save_pretrained(directory)
    return directory


def apply(patches: Sequence[Patch], module: ModuleType) -> tuple[list[str], list[str]]:
    """Extend a copy as the hook does it.

    Returns:
        what the patches that were applied give to M3, and what the hook reports.
    """
    finder = hook.PluginFinder([], Settings())
    with mocked.dict(hook.status, patched={}, errors=[]):
        finder._run_patches(module, SimpleNamespace(load=lambda: patches))  # type: ignore[arg-type]
        return hook.status["patched"].get(module.__name__, []), hook.status["errors"]


def is_there(module_name: str) -> bool:
    """Whether the installed release has such a module."""
    with suppress(ModuleNotFoundError):
        return bool(import_module(module_name))
    return False


def names_needed(patch: Patch) -> list[str]:
    """All names that a patch needs of upstream, in the form that :func:`copy_of` renames."""
    names = []
    for need in patch.needs:
        name, parameters, attributes = parse_need(need)
        owner, _, leaf = name.rpartition(".")
        # A class without its own __init__ could not be made, with or without us.
        names += [owner] * bool(owner) + [name] * (leaf != "__init__")
        names += [f"{name}({parameter})" for parameter in parameters]
        names += [f".{attribute}" for attribute in attributes]
    return names


def cases(patches: Sequence[Patch]) -> list[Any]:
    """Each module with each name that a patch of it needs."""
    found = [(patch.module, name) for patch in patches for name in names_needed(patch)]
    return [pytest.param(*case, id=f"{case[0]}:{case[1]}") for case in dict.fromkeys(found)]


def check_nothing_noticed(patches: Sequence[Patch], module: str, use: Use, directory: Path) -> None:
    """The same results, and nothing read that stock does not read."""
    if not is_there(module):
        pytest.skip("another release has this module")
    stock, ours = copy_of(module), copy_of(module)
    applied, errors = apply(patches, ours)
    assert errors == []
    if not applied:
        pytest.skip("another release has what is patched in this module")
    assert use(ours, directory) == use(stock, directory)


def check_without(patches: Sequence[Patch], module: str, name: str, use: Use, directory: Path) -> None:
    """With ``name`` gone another model works as without us; for M3 all other patches do, and one
    report says which name is missing and what M3 goes without."""
    applying = _applying(tuple(patches), module)
    affected = [patch for patch in applying if name in names_needed(patch)]
    if not affected:
        pytest.skip("this release has no such function")
    stock, ours = copy_of(module, name), copy_of(module, name)
    applied, errors = apply(patches, ours)
    assert applied == [patch.what for patch in applying if patch not in affected]
    assert use(ours, directory) == use(stock, directory)
    # What a later release no longer has is not reported when it is gone.
    affected = [p for p in affected if not (is_of_old_releases(p) and _replaces(p, name))]
    assert len(errors) == bool(affected)
    lost = name.rstrip(")").replace("(", ".").rpartition(".")[2]
    for patch in affected:
        assert lost in errors[0]
        assert patch.what in errors[0]
    assert RENAMED not in "".join(errors)


def is_of_old_releases(patch: Patch) -> bool:
    return bool(re.fullmatch(r"mlx-v?lm [\d.]+", patch.until))


def _replaces(patch: Patch, name: str) -> bool:
    return name in (patch.path, patch.path.partition(".")[0])


@cache
def _applying(patches: tuple[Patch, ...], module: str) -> list[Patch]:
    """Those that the installed release takes."""
    if not is_there(module):
        return []
    copy = copy_of(module)
    return [patch for patch in patches if patch.module == module and patch.apply(copy)]


def copy_of(module_name: str, rename: str = "") -> ModuleType:
    """The module, executed once more from its file, without any patch.

    Args:
        rename: what has another name there: ``function``, ``Class``, ``Class.method``, ``.attribute``,
            ``function(parameter)``, ``Class.method(parameter)`` or ``Dataclass(field)``.
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

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        for alias in node.names:
            if (alias.asname or alias.name) == self.name and not (self.owner or self.parameter):
                alias.asname, self.found = self.name + RENAMED, True
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if self.parameter and not self.owner and self._classes[-1:] == [self.name]:
            target = node.target
            if isinstance(target, ast.Name) and target.id == self.parameter:
                target.id, self.found = target.id + RENAMED, True
        self.generic_visit(node)
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
