"""Which library opens a checkpoint, with the plugin and without it.

The rules for the libraries as they come are those of the versions named here; the tests hold them
against the libraries themselves.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from ...model.config import TextConfig
from .describe import AROUND, PUBLISHED, TEXT_ONLY, Layout

NEWEST_KNOWN = {"mlx-lm": "0.32.2", "mlx-vlm": "0.7.10"}
# What each serves itself, in those versions.
_SERVES = {"mlx-lm": ("minimax_m3_vl",), "mlx-vlm": ("minimax_m3_vl", "minimax_m3")}
_SEE_PROBLEMS = "see the problems below"


@dataclass(frozen=True)
class Verdict:
    """Whether a library opens the checkpoint, and why not.

    ``not_yet``: the plugin does not serve this library yet, so that it does as without.
    """

    opens: bool
    reason: str | None = None
    not_yet: bool = False


@dataclass(frozen=True)
class Reader:
    """One library; ``version`` is the newest one known where none is installed that the rules are of."""

    library: str
    version: str
    installed: bool
    without_plugin: Verdict
    with_plugin: Verdict


@dataclass(frozen=True)
class Features:
    """All that the rules look at.

    Attributes:
        files_are_whole: all shards are there, and nothing is wrong with them.
        text_is_whole, vision_is_whole: the tensors are all there, and no others.
        has_plan: all formats are ones that MLX has a mode for.
        has_sparse_layers: by the config.
        all_files_named_model: shards are named ``model*.safetensors``.
    """

    layout: Layout
    config: Mapping[str, Any]
    has_sparse_layers: bool
    packs_shared_expert: bool
    all_files_named_model: bool
    files_are_whole: bool
    text_is_whole: bool = True
    vision_is_whole: bool = True
    has_plan: bool = True

    @property
    def plugin_opens(self) -> bool:
        return self.files_are_whole and self.text_is_whole and self.has_plan

    @property
    def quant_method(self) -> str | None:
        found = self.config.get("quantization_config") or {}
        return found.get("quant_method") if isinstance(found, Mapping) else None

    @property
    def has_foreign_format(self) -> bool:
        return bool(self.layout.foreign_parts)

    @property
    def mlx_vlm_converts_format(self) -> bool:
        """mlx-vlm makes plain weights of it when it loads them."""
        return self.quant_method == "fp8" and set(self.layout.foreign_parts) == {"weight_scale_inv"}


def packs_shared_expert(config: TextConfig, raw: Mapping[str, Any]) -> bool:
    """What mlx-vlm expects of a checkpoint with this config."""
    text = raw.get("text_config") or raw
    asked = text.get("pack_shared_expert")
    same_width = config.shared_intermediate_size == config.intermediate_size
    return same_width if asked is None else bool(asked)


_NAMES_FOR_MLX_VLM = {"minimax_m3_vl": (PUBLISHED, AROUND), "minimax_m3": (PUBLISHED, TEXT_ONLY)}
# How mlx-vlm takes experts and the shared expert, by whether it packs them together.
_PACKED = (("one by one", "apart"), ("fused", "last row"))
_UNPACKED = (("one by one", "apart"), ("stacked", "apart"))

# The first rule that applies is the reason.
Rule = tuple[Callable[[Features], bool], str]

_FOR_BOTH: tuple[Rule, ...] = (
    (lambda f: not (f.files_are_whole and f.text_is_whole), _SEE_PROBLEMS),
    (lambda f: f.layout.modules != "published", "it does not know transformers' names of modules"),
    (lambda f: f.has_sparse_layers and not f.layout.indexer, "it wants indexers, and there are none"),
    (lambda f: f.layout.unused > 0, "the mtp tensors are in its way"),
    (
        lambda f: f.layout.quantized and not f.config.get("quantization") and not f.quant_method,
        "its config does not say how it is quantized",
    ),
)

_MLX_LM: tuple[Rule, ...] = (
    (lambda f: f.layout.names != PUBLISHED, f"it wants names that begin with {PUBLISHED}"),
    (
        lambda f: (
            f.has_foreign_format
            and (f.layout.foreign_parts, f.quant_method) != (["weight_scale_inv"], "mxfp8")
        ),
        "it does not know this quantized format",
    ),
    (lambda f: not f.all_files_named_model, "it opens files named model*.safetensors only"),
)

_MLX_VLM: tuple[Rule, ...] = (
    (lambda f: not f.vision_is_whole, _SEE_PROBLEMS),
    (
        lambda f: f.layout.names not in _NAMES_FOR_MLX_VLM[f.config["model_type"]],
        "it does not know these names",
    ),
    (lambda f: f.layout.dense_under_moe, "it does not look for dense MLPs under block_sparse_moe"),
    (lambda f: "weight_global_scale" in f.layout.foreign_parts, "it has no tensor scales of experts"),
    (
        lambda f: f.has_foreign_format and f.quant_method == "compressed-tensors",
        "it opens this format only where every module has it",
    ),
    (
        lambda f: f.has_foreign_format and not f.mlx_vlm_converts_format,
        "it does not know this quantized format",
    ),
    (lambda f: f.layout.tensor_scales, "it has no scales of whole tensors"),
    (
        lambda f: f.packs_shared_expert and (f.layout.experts, f.layout.shared_expert) not in _PACKED,
        "it wants gate and up fused, and the shared expert as the last row",
    ),
    (
        lambda f: not f.packs_shared_expert and (f.layout.experts, f.layout.shared_expert) not in _UNPACKED,
        "its config says that the shared expert is not packed",
    ),
)

_RULES = {"mlx-lm": _FOR_BOTH + _MLX_LM, "mlx-vlm": _FOR_BOTH + _MLX_VLM}


def who_opens(model_type: str, features: Features | None) -> list[Reader]:
    """The verdicts on both libraries; without ``features``, of a broken config, nobody opens it."""
    readers = []
    for library in NEWEST_KNOWN:
        without = Verdict(False, _SEE_PROBLEMS) if features is None else stock_verdict(library, features)
        opens = features is not None and features.plugin_opens
        if library == "mlx-vlm" and features is not None:
            opens = opens and features.vision_is_whole
        installed = _installed_version(library)
        told = installed is not None and (
            installed == NEWEST_KNOWN[library] or not _serves(library, "minimax_m3_vl")
        )
        readers.append(
            Reader(
                library,
                installed if installed and told else NEWEST_KNOWN[library],
                told,
                without,
                _plugin_verdict(library, model_type, without, opens),
            )
        )
    return readers


def stock_verdict(library: str, features: Features) -> Verdict:
    """What the library does without the plugin."""
    model_type = features.config["model_type"]
    if not _serves(library, model_type):
        return Verdict(False, f"it has no model type {model_type}")
    for applies, reason in _RULES[library]:
        if applies(features):
            return Verdict(False, reason)
    return Verdict(True)


def _plugin_verdict(library: str, model_type: str, without: Verdict, opens: bool) -> Verdict:
    if model_type not in _served_by_plugin(library):
        return Verdict(without.opens, without.reason, not_yet=True)
    return Verdict(opens, None if opens else _SEE_PROBLEMS)


def _served_by_plugin(library: str) -> set[str]:
    group = f"{library.replace('-', '_')}.models"
    try:
        return {e.name for e in distribution("mlx-m3-plugin").entry_points if e.group == group}
    except PackageNotFoundError:
        return set()


def _installed_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _serves(library: str, model_type: str) -> bool:
    """Whether the library has a module of its own for the model type, found without importing it."""
    try:
        spec = importlib.util.find_spec(library.replace("-", "_"))
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        return model_type in _SERVES[library]
    models = [Path(place) / "models" / model_type for place in places]
    return any(path.is_dir() or path.with_suffix(".py").is_file() for path in models)
