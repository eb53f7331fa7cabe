"""The hosts in this environment, and the class that each loads for MiniMax-M3, after its own patches."""

from types import SimpleNamespace
from typing import NamedTuple

from ..startup.report import version_of
from .new_process import ask

# Runs in a new process.  Arguments: the module to load, and the host's function that comes before, if any.
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


class Engine(NamedTuple):
    """One way in which a host loads M3.

    Attributes:
        module: whose ``Model`` it takes.
        name: for people; empty where there is one.
        patch: the host's own function that it calls before, ``module:function``.
    """

    module: str
    name: str = ""
    patch: str = ""


_MLX_LM, _MLX_VLM = "mlx_lm.models.minimax_m3_vl", "mlx_vlm.models.minimax_m3_vl"
_OMLX_FOR_VLM = "omlx.patches.mlx_vlm_minimax_m3_compat:apply_mlx_vlm_minimax_m3_compat_patch"
_OMLX_FOR_LM = "omlx.patches.minimax_m3_mlx_lm:apply_minimax_m3_mlx_lm_patch"
_VMLX = "vmlx_engine.models.minimax_m3.minimax_m3_register:register_minimax_m3_runtime"
# By distribution.  The first engine takes a checkpoint as it is published.
_ENGINES = {
    "omlx": [
        Engine(_MLX_VLM, "vision engine", _OMLX_FOR_VLM),
        Engine(_MLX_LM, 'text engine ("model_type_override": "llm")', _OMLX_FOR_LM),
    ],
    "vllm-mlx": [
        Engine(_MLX_VLM, "with vision"),
        Engine("mlx_lm.models.minimax_m3", "text-only checkpoints"),
    ],
    "rapid-mlx": [Engine(_MLX_VLM, "with vision"), Engine(_MLX_LM, "with --no-mllm")],
    "vmlx": [Engine(_MLX_LM, patch=_VMLX)],
    "mlx-openai-server": [Engine(_MLX_LM, "with --model-type lm")],
    "exo": [Engine(_MLX_LM)],
}


class HostClass(SimpleNamespace):
    """What one engine of an installed host loads.

    Attributes:
        host: its distribution.  engine: its name for people.
        is_default: the engine takes a checkpoint as it is published.
        module: whose ``Model`` it takes.
        source: ``"plugin"``, ``"native"`` for the host's own class or upstream's, or ``"none"``.
        path: the file of the class.  why: what failed.
    """

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
    found, run = ask(_PROBE, engine.module, *filter(None, [engine.patch]))
    if found is None:
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
