"""Who may import whom.  Data goes one way through the rooms; a newcomer can rely on it."""

import ast
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib

PACKAGE = "mlx_m3_plugin"
ROOT = Path(__file__).parents[1] / PACKAGE

# Room -> what it may import of ours, besides itself.  A name with a dot is one module.
ALLOWED = {
    "startup": (),
    "msa": (),
    "chat": (),
    "model": ("msa",),
    "weights": ("model.config", "model.tensor_scales"),
    "offload": ("model", "weights"),
    "hosts": ("model", "msa.engine", "weights", "chat", "offload", "startup.settings"),
    "toolbox": ("hosts", "weights", "model", "msa.engine", "chat", "startup"),
    "cli": ("toolbox",),
    # The package itself: it starts the hook when asked for it.
    "__init__": ("startup",),
    "__main__": ("cli",),
}
# Room -> the only modules of others that it may import, besides the standard library.
ONLY_THESE_OTHERS = {"msa": ("mlx.core",), "chat": (), "startup": (), "__init__": ()}
# Library -> the only place that may import it.
ONLY_HERE = {"mlx_lm": "hosts/mlx_lm", "mlx_vlm": "hosts/mlx_vlm"}
# mlx-vlm before 0.6.4 takes two of its layers from mlx-lm, and so do we there.  until: mlx-vlm 0.6.4
ALSO_HERE = {"mlx_lm": "hosts/mlx_vlm/parts.py"}

CHECKOUT = ROOT.parent
FILES = sorted(ROOT.rglob("*.py"))


def imported_modules(source: str, path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file of the package may import, at any depth of code."""
    package = (PACKAGE, *path.parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            # ``from package import name`` may import a module or a name of one: both are meant.
            for alias in node.names:
                yield f"{module}.{alias.name}"


def is_in(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def complaints(source: str, path: Path) -> list[str]:
    """What a file at ``path`` (relative to the package) imports and must not."""
    room = path.with_suffix("").parts[0]
    found = []
    for module in imported_modules(source, path):
        top = module.partition(".")[0]
        if top == PACKAGE:
            ours = module.removeprefix(f"{PACKAGE}.")
            if not any(is_in(ours, name) for name in (room, *ALLOWED[room])) and ours != "__version__":
                found.append(f"{room} must not import {ours}")
        elif top not in sys.stdlib_module_names:
            others = ONLY_THESE_OTHERS.get(room)
            if others is not None and not any(is_in(module, name) for name in others):
                found.append(f"{room} must not import {module}")
            place = ONLY_HERE.get(top)
            is_there = place is None or path.as_posix().startswith(f"{place}/")
            if not is_there and path.as_posix() != ALSO_HERE.get(top):
                found.append(f"only {place} may import {top}")
        if path.parts[0] == "hosts" and len(path.parts) > 2:
            for host in ("mlx_lm", "mlx_vlm"):
                if host != path.parts[1] and is_in(module, f"{PACKAGE}.hosts.{host}"):
                    found.append(f"hosts/{path.parts[1]} must not import hosts/{host}")
    return found


def test_imports_follow_the_rule():
    found = {}
    for file in FILES:
        path = file.relative_to(ROOT)
        assert path.with_suffix("").parts[0] in ALLOWED, f"no rule for {path}"
        found[str(path)] = complaints(file.read_text(), path)
    assert {path: told for path, told in found.items() if told} == {}
    assert {path.partition("/")[0] for path in found} >= {"msa", "model", "weights", "hosts", "chat"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_imported_package_is_declared():
    """mlx alone is not: what it is called on Linux depends on the machine, and mlx-lm's extras say it."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("vlm", "plot")]
    declared = {
        re.match(r"[\w-]+", requirement)[0].replace("-", "_")
        for requirement in (*project["dependencies"], *itertools.chain(*extras))
    }
    imported = {
        module.partition(".")[0]
        for file in FILES
        for module in imported_modules(file.read_text(), file.relative_to(ROOT))
    }
    assert imported - set(sys.stdlib_module_names) - {PACKAGE, "mlx"} == declared


def test_importing_the_package_imports_nothing_but_sys():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    at_module_level = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in at_module_level] == ["import sys"]
    assert not any(isinstance(node, (ast.If, ast.Try, ast.With)) for node in tree.body)


def served_files() -> list[Path]:
    """Those that the hook executes under upstream's names, where relative imports lead elsewhere."""
    groups = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["entry-points"]
    # Patches are imported as ours are.
    served = [names for group, names in groups.items() if not group.startswith(PACKAGE)]
    return sorted({CHECKOUT / f"{m.replace('.', '/')}.py" for names in served for m in names.values()})


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_what_upstream_is_served_imports_absolutely():
    assert len(served_files()) >= 5
    for file in served_files():
        imports = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
        assert [ast.unparse(node) for node in imports if node.level] == [], file


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("msa/a.py", "import numpy", "msa must not import numpy"),
        ("msa/a.py", "import mlx.nn as nn", "msa must not import mlx.nn"),
        ("msa/a.py", "from mlx import nn", "msa must not import mlx.nn"),
        ("msa/a.py", "from ..model import norm", "msa must not import model.norm"),
        ("chat/a.py", "import mlx.core", "chat must not import mlx.core"),
        ("startup/a.py", "def f():\n    import mlx_lm", "startup must not import mlx_lm"),
        ("model/a.py", "from mlx_lm.models import cache", "only hosts/mlx_lm may import mlx_lm"),
        ("hosts/mlx_vlm/a.py", "import mlx_lm", "only hosts/mlx_lm may import mlx_lm"),
        ("hosts/mlx_vlm/parts.py", "from ..mlx_lm import host", "hosts/mlx_vlm must not import hosts/mlx_lm"),
        ("toolbox/a.py", "import mlx_vlm.utils", "only hosts/mlx_vlm may import mlx_vlm"),
        ("hosts/mlx_vlm/a.py", "from ..mlx_lm import host", "hosts/mlx_vlm must not import hosts/mlx_lm"),
        ("weights/a.py", "from ..model import attention", "weights must not import model.attention"),
        ("model/a.py", "from mlx_m3_plugin.weights.check import x", "model must not import weights.check.x"),
        ("cli.py", "from .model.config import TextConfig", "cli must not import model.config.TextConfig"),
        ("cli.py", "from . import model", "cli must not import model"),
    ],
)
def test_a_broken_rule_is_noticed(path, source, complaint):
    assert complaint in complaints(source, Path(path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "msa/a.py",
            "import math\nimport mlx.core as mx\nfrom mlx.core import array\nfrom .reference import attend",
        ),
        ("weights/a.py", "from ..model.config import TextConfig\nfrom .tensor import Tensor"),
        (
            "hosts/mlx_lm/a.py",
            "from mlx_lm.models.cache import KVCache\nfrom mlx_m3_plugin.model import decoder",
        ),
        ("cli.py", "import argparse\nfrom .toolbox import doctor\nfrom . import __version__"),
    ],
)
def test_a_kept_rule_is_not_complained_of(path, source):
    assert complaints(source, Path(path)) == []
