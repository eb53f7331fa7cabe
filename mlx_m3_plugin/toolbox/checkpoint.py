"""A checkpoint opened by the tools that read its weights: every weight of the model, and how it is stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..model.config import TextConfig, text_config_of
from ..weights import Headers, lacks_indexers, plan_layout, read_headers, shorten
from ..weights.headers import MODEL_TYPES
from ..weights.names import is_vision
from ..weights.quantization import PARTS
from ..weights.tensor import Tensor
from .common import read_json_object
from .parameters import differences, quantized_modules, text_shapes, vision_shapes
from .precision import Quantization
from .source import locate_weights


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to convert, evaluate or measure.

    Attributes:
        name: the directory as given, or ``owner/name`` of a repository in the cache.
        title: the same without the path of a directory.
        config: ``config.json``.  text_config: the text model's part of it.
        plan: published parameter names, without a prefix -> how they are made from stored tensors.
        quantized: the modules that are quantized in one of MLX's modes.
        indexers: whether the checkpoint has weights for them.
    """

    name: str
    title: str
    directory: Path
    config: dict[str, Any]
    text_config: TextConfig
    headers: Headers
    plan: Mapping[str, Tensor]
    quantized: Mapping[str, Quantization]
    indexers: bool

    @property
    def vision(self) -> list[str]:
        """The names of the vision tower's parameters, and the projectors'."""
        return [name for name in self.plan if is_vision(name)]

    def parts(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module by part: ``weight``, and those that belong to a quantized one."""
        return {part: self.plan[name] for part in PARTS if (name := f"{module}.{part}") in self.plan}

    def spec(self, module: str) -> Quantization:
        """How a module's weight is stored."""
        return self.quantized.get(module, Quantization())

    def float_dtype(self, module: str) -> mx.Dtype:
        """The dtype of a module's weight, or of what it is dequantized to."""
        spec = self.quantized.get(module)
        if spec is None:
            return self.plan[f"{module}.weight"].dtype
        return self.plan[f"{module}.scales"].dtype if spec.mode == "affine" else mx.bfloat16


def open_checkpoint(path_or_repository: str | Path) -> Checkpoint:
    """Read headers and settings, and see that every weight of the model is there.

    Raises:
        OSError: there is no checkpoint in the directory, or the repository is not in the cache.
        ValueError: it is not a whole MiniMax-M3; says what is missing or wrong.
    """
    place = locate_weights(path_or_repository)
    assert place.directory is not None
    directory = place.directory
    title = place.repository or directory.name
    config = _read_config(directory)
    try:
        text_config = text_config_of(config)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {str(error).removeprefix('config: ')}") from None
    headers = read_headers(directory)
    _refuse(directory, headers.problems)
    plan = plan_layout(headers.tensors, text_config, "", vision=True)
    indexers = not lacks_indexers(plan, text_config)
    shapes = text_shapes(text_config, indexers=indexers)
    seen = {name: tensor for name, tensor in plan.items() if is_vision(name)}
    if seen:
        shapes |= vision_shapes(config)
    quantized, problems = quantized_modules(plan, shapes)
    _refuse(directory, problems or differences(plan, shapes, quantized))
    return Checkpoint(place.name, title, directory, config, text_config, headers, plan, quantized, indexers)


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = read_json_object(directory / "config.json")
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory} has no config.json") from None
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"{directory} is not a MiniMax-M3: its config.json has another model_type")
    return config


def _refuse(directory: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join([f"{directory} is not a whole MiniMax-M3:", *shorten(problems)]))
