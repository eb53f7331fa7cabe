"""Upstream's parts that ours are built from, and whether the installed mlx-vlm has them.

The vision tower, the projectors, the processors and the caches are mlx-vlm's own, in sub-modules
that stay upstream's while we serve the package around them.  :func:`upstream` loads one.
"""

import importlib.machinery
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from mlx_m3_plugin.hosts.patching import UpstreamChangedError, check_needs

_M3 = "mlx_vlm.models.minimax_m3_vl"
# In the form that :func:`.patching.check_needs` takes: classes, and methods that ours inherit or call.
_NEEDS = {
    f"{_M3}.config": ("ModelConfig", "VisionConfig"),
    f"{_M3}.language": (
        "MiniMaxM3KVCache.update_index_and_fetch(keys)",
        "MiniMaxM3BatchKVCache.merge(caches)",
        "LanguageModel.rollback_speculative_cache(caches, accepted, block_size)",
    ),
    f"{_M3}.minimax_m3_vl": (
        "Model._compute_visual_features(pixel_values, grid_thw)",
        "Model.merge_input_ids_with_visual_features(inputs_embeds, input_ids)",
        "Model.get_input_embeddings(input_ids, pixel_values)",
        "MiniMaxProjector.__init__(input_dim, hidden_dim, output_dim, bias)",
    ),
    f"{_M3}.vision": ("VisionModel",),
    f"{_M3}.processing_minimax_m3_vl": ("MiniMaxM3VLProcessor",),
    "mlx_vlm.models.base": (
        "InputEmbeddingsFeatures",
        "LanguageModelOutput",
        "create_attention_mask",
        "scaled_dot_product_attention",
    ),
    "mlx_vlm.models.cache": ("KVCache", "QuantizedKVCache"),
}


class PartsDoNotFitError(ImportError):
    """The installed mlx-vlm is not one that our model can be put into."""

    fall_back_to_native = True


def upstream(name: str) -> ModuleType:
    """Upstream's own sub-module ``name`` of ``mlx_vlm.models.minimax_m3_vl``.

    Importing it would import the package first.  Where that is ours, it needs the very modules that
    ask here, so an empty package stands in for it while the sub-module is loaded.
    """
    if _M3 in sys.modules:
        return _bound(name)
    models = import_module("mlx_vlm.models")
    found = importlib.machinery.PathFinder.find_spec(_M3, models.__path__)
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError(f"mlx_vlm has no {_M3}")
    package = ModuleType(_M3)
    package.__path__ = list(found.submodule_search_locations)
    sys.modules[_M3] = package
    try:
        return _bound(name)
    finally:
        del sys.modules[_M3]


def _bound(name: str) -> ModuleType:
    module = import_module(f"{_M3}.{name}")
    # The import system does this only for the package that was there at the first import.
    setattr(sys.modules[_M3], name, module)
    return module


def rope_and_experts() -> tuple[Any, Any]:
    """``initialize_rope`` and ``SwitchGLU``.

    mlx-vlm's own, or those of mlx-lm that it uses (until: mlx-vlm 0.6.4).

    Raises:
        PartsDoNotFitError: one of them is missing.
    """
    try:
        from mlx_vlm.models.rope_utils import initialize_rope
    except ImportError:  # until: mlx-vlm 0.6.4
        from mlx_lm.models.rope_utils import initialize_rope
    try:
        from mlx_vlm.models import switch_layers
    except ImportError:  # until: mlx-vlm 0.6.4
        from mlx_lm.models import switch_layers
    # Where mlx-vlm has the module, its tools know no other class.
    return initialize_rope, _checked(switch_layers.__name__, "SwitchGLU").SwitchGLU


def keeps_hidden_states() -> bool:
    """Whether the hidden states that drafters read survive when a prompt is given in pieces."""
    return hasattr(import_module("mlx_vlm.speculative.utils"), "SpeculativePrefill")


def check_parts() -> None:
    """Look for all of upstream's parts.

    Raises:
        PartsDoNotFitError: names the first one that is missing or has changed.
    """
    for module, needs in _NEEDS.items():
        _checked(module, *needs)
    rope_and_experts()


def _checked(name: str, *needs: str) -> Any:
    """The module of this name, which has everything that ours use of it."""
    package, _, leaf = name.rpartition(".")
    try:
        module = upstream(leaf) if package == _M3 else import_module(name)
        check_needs(module, *needs)
    except (ImportError, UpstreamChangedError) as error:
        from importlib.metadata import version

        raise PartsDoNotFitError(f"mlx-vlm {version('mlx-vlm')} has changed: {error}") from error
    return module
