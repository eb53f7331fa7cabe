"""A MiniMax-M3 model as mlx-vlm expects it, with vision or without, and as mlx-vlm stores it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_m3_plugin.hosts.loading import CheckpointMixin
from mlx_m3_plugin.model.tensor_scales import is_scaled
from mlx_m3_plugin.weights.layouts import pack_experts
from mlx_m3_plugin.weights.quantization import quantization_entry
from mlx_m3_plugin.weights.tensor import Tensor

from .language import LanguageModel


class StoredModel:
    """The methods of a model that ``save_weights`` calls: give the parameters, and free them."""

    def __init__(self, parameters: dict[str, mx.array], model: nn.Module):
        self._parameters = parameters
        self._model = model

    def parameters(self) -> Any:
        return tree_unflatten(list(self._parameters.items()))

    def update(self, parameters: Any) -> None:
        """Called with empty arrays, for weights to be freed as they are written."""
        self._parameters = dict(tree_flatten(parameters))
        self._model.update(tree_map(lambda _: mx.array([]), self._model.parameters()))


class MlxVlmModel(CheckpointMixin):
    """Base of the two ``Model`` classes; they differ in their configs and in vision."""

    text_prefix = "language_model."
    config: Any
    language_model: LanguageModel

    @property
    def loader_config(self) -> dict[str, Any]:
        return self.config.loader_config

    def make_cache(self) -> list[Any]:
        return self.language_model.make_cache()

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """As :meth:`CheckpointMixin.sanitize`; the config then has the quantization of the tensors."""
        mapped = super().sanitize(weights)
        found = self.loader_config.get("quantization")
        self.config.quantization = self.config.quantization_config = found
        return mapped

    def as_stored(self) -> tuple[StoredModel, dict[str, Any]]:
        """The model to save, and its description for the config.

        In mlx-vlm's layout: gate and up fused, the shared expert as one more row of the experts.  Without
        us mlx-vlm opens no other (until: mlx-vlm 0.6.5, which does if the config says so).  Experts stay
        apart if some differ in bits: gate and up, or the shared and the routed experts.
        """
        self.check_is_whole()
        arrays = dict(tree_flatten(self.parameters()))
        plan = {name: Tensor.stored(name, array) for name, array in arrays.items()}
        packed = pack_experts(plan, self.text_config, self.text_prefix)
        made = {name: tensor.make(arrays) for name, tensor in (packed or plan).items()}
        description = {"quantization": _quantization(self, made), "pack_shared_expert": packed is not None}
        return StoredModel(made, self), description

    def speculative_logits_from_hidden(self, hidden: mx.array) -> mx.array:
        return self.language_model.speculative_logits_from_hidden(hidden)

    def rollback_speculative_cache(self, *args: Any, **kwargs: Any) -> int:
        return self.language_model.rollback_speculative_cache(*args, **kwargs)


def refuse_pixels(pixel_values: mx.array | None, kwargs: dict[str, Any]) -> None:
    """For a model without a vision tower.

    Raises:
        ValueError: the arguments of a call hold an image or a video.
    """
    if pixel_values is not None or kwargs.get("pixel_values_videos") is not None:
        raise ValueError("this MiniMax-M3 checkpoint has no vision tower: it takes text only")


def _quantization(model: nn.Module, stored: dict[str, mx.array]) -> dict[str, Any] | None:
    """The quantization of every quantized module, by the name it is stored under."""
    modules = {}
    for path, module in model.named_modules():
        if getattr(module, "bits", None) is None or "scales" not in module:
            continue
        spec = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        if is_scaled(module):
            spec["global_scale"] = True
        # Gate and up may be stored as one.
        for name in (path, path.replace(".switch_mlp.gate_proj", ".switch_mlp.gate_up_proj")):
            if f"{name}.scales" in stored:
                modules[name] = spec
    return quantization_entry(modules)
