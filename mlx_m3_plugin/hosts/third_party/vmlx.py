"""vmlx: ``MLX_M3_PLUGIN_PREFER=native`` gives back its own class, which it registers where none is served."""

import importlib.util
import sys
from typing import Any

from mlx_m3_plugin.hosts.patching import Patch, by_target
from mlx_m3_plugin.startup.settings import read_settings


def register_minimax_m3_runtime(module: Any, original: Any) -> Any:
    if not read_settings().prefer_native:
        return original

    def register() -> Any:
        name = module._PACKAGE
        if name not in sys.modules:
            importlib.import_module(name.rpartition(".")[0])
            spec = importlib.util.spec_from_file_location(name, module._VENDORED)
            if spec is None or spec.loader is None:
                return original()
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return original()

    return register


_PATCHES = {
    "vmlx_engine.models.minimax_m3.minimax_m3_register:register_minimax_m3_runtime": Patch(
        "MLX_M3_PLUGIN_PREFER=native",
        register_minimax_m3_runtime,
        "never: vmlx takes the class of whoever serves the name",
        ("_PACKAGE", "_VENDORED"),
    )
}
PATCHES = by_target(_PATCHES)
