"""The hosts in this environment, and the class that each loads for MiniMax-M3, after its own patches."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..startup.report import version_of

# Runs in a new process.  Arguments: the module to load, and the host's functions that come before.
_PROBE = """
import importlib, json, logging, sys
logging.disable(logging.WARNING)
answer = {"path": None, "is_ours": False, "why": ""}
try:
    for function in sys.argv[2:]:
        module, _, name = function.partition(":")
        try:
            apply = getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue  # Of another release.
        apply()
    # What a package exports may come from a file inside it.
    model = importlib.import_module(sys.argv[1]).Model
    answer["path"] = sys.modules[model.__module__].__file__
    hook = sys.modules.get("mlx_m3_plugin.startup.hook")
    answer["is_ours"] = hook is not None and model.__module__ in hook.status["ours"]
except Exception as error:
    answer["why"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(answer))
"""


@dataclass(frozen=True)
class Engine:
    """One way in which a host loads M3.

    Attributes:
        name: for people; empty where there is one.
        module: whose ``Model`` it takes.
        patches: the host's own functions that it calls before, ``module:function``.
    """

    module: str
    name: str = ""
    patches: tuple[str, ...] = ()


_OMLX = "omlx.patches"
# By distribution.  The first engine takes a checkpoint as it is published.
_ENGINES = {
    "omlx": [
        Engine(
            "mlx_vlm.models.minimax_m3_vl",
            "vision engine",
            (f"{_OMLX}.mlx_vlm_minimax_m3_compat:apply_mlx_vlm_minimax_m3_compat_patch",),
        ),
        Engine(
            "mlx_lm.models.minimax_m3_vl",
            'text engine ("model_type_override": "llm")',
            (f"{_OMLX}.minimax_m3_mlx_lm:apply_minimax_m3_mlx_lm_patch",),
        ),
    ],
    "vllm-mlx": [
        Engine("mlx_vlm.models.minimax_m3_vl", "with vision"),
        Engine("mlx_lm.models.minimax_m3", "text-only checkpoints"),
    ],
    "rapid-mlx": [
        Engine("mlx_vlm.models.minimax_m3_vl", "with vision"),
        Engine("mlx_lm.models.minimax_m3_vl", "with --no-mllm"),
    ],
    "vmlx": [
        Engine(
            "mlx_lm.models.minimax_m3_vl",
            patches=("vmlx_engine.models.minimax_m3.minimax_m3_register:register_minimax_m3_runtime",),
        )
    ],
    "mlx-openai-server": [Engine("mlx_lm.models.minimax_m3_vl", "with --model-type lm")],
    "exo": [Engine("mlx_lm.models.minimax_m3_vl")],
}


@dataclass
class HostClass:
    """What one engine of an installed host loads.

    Attributes:
        host: its distribution.  engine: for people; empty where there is one.
        is_default: the engine takes a checkpoint as it is published.
        source: ``"plugin"``, ``"native"`` for the host's own class or upstream's, or ``"none"``.
        path: the file of the class.  why: what failed.
    """

    host: str
    engine: str
    is_default: bool
    module: str
    source: str
    path: str | None
    why: str

    def __str__(self) -> str:
        return f"{self.host} {version_of(self.host)}{self.engine and ', '}{self.engine}"


def installed_hosts() -> list[str]:
    return [host for host in _ENGINES if version_of(host) is not None]


def classes_of_hosts() -> list[HostClass]:
    return [
        _class_of(host, engine, engine is _ENGINES[host][0])
        for host in installed_hosts()
        for engine in _ENGINES[host]
    ]


def _class_of(host: str, engine: Engine, is_default: bool) -> HostClass:
    run = subprocess.run(
        [sys.executable, "-c", _PROBE, engine.module, *engine.patches],
        capture_output=True,
        text=True,
        cwd=Path(sys.executable).parent,
    )
    try:
        found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        found = {"path": None, "is_ours": False, "why": f"the process ends with exit code {run.returncode}"}
    loads = "plugin" if found["is_ours"] else "native"
    return HostClass(
        host=host,
        engine=engine.name,
        is_default=is_default,
        module=engine.module,
        source="none" if found["why"] else loads,
        path=found["path"],
        why=found["why"],
    )
