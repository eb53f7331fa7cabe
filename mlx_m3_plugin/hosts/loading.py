"""Loading a checkpoint into a model, as both libraries do it: names, quantization, values."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.config import TextConfig, text_config_of
from ..model.decoder import DecoderLayer, LanguageModel
from ..model.sharding import shard_layers
from ..model.tensor_scales import dequantize_scaled_layers, expect_scales
from ..msa import engine
from ..startup.settings import EXPERT_MEMORY, checked, engine_settings, model_settings
from ..weights.check import check_values, check_weights
from ..weights.layouts import lacks_indexers, plan_layout
from ..weights.names import unused_in_words
from ..weights.quantization import infer_quantization, quantized_in, with_quantization
from ..weights.tensor import TensorPlan
from .patching import LOADED_DIRECTORY

log = logging.getLogger("mlx_m3_plugin")

# The router and its bias.
_FLOAT32_BY_DESIGN = ("block_sparse_moe.gate.weight", "e_score_correction_bias")


def text_config_as_set(config: Mapping[str, Any], kind: type[TextConfig] = TextConfig) -> TextConfig:
    """The text config of a checkpoint, with the environment variables' overrides.  Sets up the engine, too.

    Args:
        kind: the host's class.

    Raises:
        ValueError: see :func:`text_config_of`; or a variable has an unknown value.
    """
    engine.configure(**engine_settings())
    return kind(**vars(text_config_of(config, model_settings())))


def warn_dense(reason: str, config: TextConfig) -> None:
    log.warning(
        "mlx-m3-plugin: %s, so every layer attends to all tokens. MiniMax-M3 was not trained like that "
        "past %d tokens: do not rely on its answers there.",
        reason,
        config.budget,
    )


def describe_to_loader(config: dict[str, Any], plan: TensorPlan, parameters: Mapping[str, mx.array]) -> bool:
    """Describe the planned tensors in a loader's config, which is also the config that is saved.

    The checkpoint's own quantization map has the names of stored modules, and some loaders take bits and
    modes from there alone.

    Returns:
        Whether any tensors are quantized.
    """
    quantization = infer_quantization(plan, parameters)
    described = with_quantization(config, quantization)
    config.clear()
    config.update(described)
    return quantization is not None


class CheckpointMixin(nn.Module):
    """For ``Model`` classes: loads, checks and converts checkpoints of any layout.

    Attributes:
        text_prefix: what comes before ``model.layers`` and ``lm_head`` in parameter names.
        takes_vision: whether the tensors of the vision tower and the projectors are kept.
        loader_config: the dict that the host's loader made the model from, and reads again
            after :meth:`sanitize`.
    """

    text_prefix: str
    takes_vision = False
    language_model: LanguageModel

    @property
    def loader_config(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def text_config(self) -> TextConfig:
        return self.language_model.model.config

    @property
    def layers(self) -> list[DecoderLayer]:
        """The layers that this process runs."""
        return self.language_model.model.pipeline_layers

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        self.check_is_whole()
        shard_layers(self.layers, group or mx.distributed.init())

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Map the tensors of any known checkpoint layout to this model's parameter names.

        Raises:
            ValueError: a tensor is there twice, or in a format that MLX cannot compute with.
        """
        config, text_model = self.text_config, self.language_model.model
        held = None if text_model.end_idx is None else range(text_model.start_idx, text_model.end_idx)
        plan = plan_layout(weights, config, self.text_prefix, vision=self.takes_vision, layers=held)
        for line in unused_in_words(weights):
            log.warning("mlx-m3-plugin: %s", line)
        if lacks_indexers(plan, config):
            for layer in self.layers:
                if layer.self_attn.is_sparse_attn:
                    layer.self_attn.drop_indexer()
            warn_dense("this checkpoint has no indexer weights", config)
        elif not any(map(config.is_sparse_attention, range(config.num_hidden_layers))):
            warn_dense("the config of this checkpoint has no sparse layers", config)
        elif config.attention == "dense":
            warn_dense("dense attention is set", config)
        if describe_to_loader(self.loader_config, plan, dict(tree_flatten(self.parameters()))):
            expect_scales(self, plan)
        # For mlx-vlm: gate and up are separate here, and so is the shared expert.
        nested = self.loader_config.get("text_config")
        (nested if isinstance(nested, dict) else self.loader_config)["pack_shared_expert"] = False
        if memory := checked("expert_memory"):
            plan = self._put_experts_on_disk(plan, memory)
        return {name: tensor.make(weights) for name, tensor in plan.items()}

    def _put_experts_on_disk(self, plan: TensorPlan, memory: int | str) -> TensorPlan:
        from ..offload.install import put_experts_on_disk

        directory = LOADED_DIRECTORY.get()
        if directory is None or self.language_model.model.end_idx is not None:
            raise ValueError(
                f"{EXPERT_MEMORY} is set, but experts on disk are only for a model that is loaded to answer, "
                "in one process: unset it to convert, to fuse adapters or to share a model"
            )
        return put_experts_on_disk(self.language_model.model, plan, self.text_prefix, Path(directory), memory)

    def check_is_whole(self) -> None:
        """Before a model is saved or changed.

        Raises:
            ValueError: its experts are on disk.
        """
        if any(layer.is_moe and hasattr(layer.block_sparse_moe.switch_mlp, "slots") for layer in self.layers):
            raise ValueError(
                f"this model's experts are on disk, and are needed in memory: unset {EXPERT_MEMORY}"
            )

    def load_weights(
        self, file_or_weights: str | Path | list[tuple[str, mx.array]], strict: bool = True
    ) -> nn.Module:
        """As ``nn.Module.load_weights``, with an error that lists all problems.

        Raises:
            ValueError: when ``strict``, tensors are missing, left over, or of the wrong shape or
                dtype; or adapters are for experts that are on disk.
        """
        if isinstance(file_or_weights, (str, Path)):
            file_or_weights = list(mx.load(str(file_or_weights)).items())  # type: ignore[union-attr]
        if any(".switch_mlp." in name for name, _ in file_or_weights):
            self.check_is_whole()
        if strict:
            check_weights(dict(file_or_weights), dict(tree_flatten(self.parameters())))
        super().load_weights(file_or_weights, strict=strict)
        return self

    def check_values(self) -> None:
        """See :func:`~mlx_m3_plugin.weights.check.check_values`."""
        check_values(self)

    def dequantize_scaled_layers(self) -> None:
        """See :func:`~mlx_m3_plugin.model.tensor_scales.dequantize_scaled_layers`."""
        dequantize_scaled_layers(self)

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Which parameters a conversion may cast: the unquantized weights.

        Not the scales of quantized ones, which would change values, and not what is float32 by design:
        the router, and what a 16-bit model stores in float32, as M3 does its patch embedding.
        """
        arrays: dict[str, mx.array] = dict(tree_flatten(self.parameters()))
        quantized = set(quantized_in(arrays))
        kept = {name for name in arrays if name.endswith(_FLOAT32_BY_DESIGN)}
        kept |= {name for name in arrays if name.rpartition(".")[0] in quantized}
        sizes: Counter[mx.Dtype] = Counter()
        for name in arrays.keys() - kept:
            sizes[arrays[name].dtype] += arrays[name].size
        if sizes and sizes.most_common(1)[0][0] != mx.float32:
            kept |= {name for name, array in arrays.items() if array.dtype == mx.float32}
        return lambda path: path not in kept

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], Any]:
        """Which parameters a conversion quantizes: all linear layers, the router in 8 bits."""

        def predicate(path: str, _: nn.Module) -> bool | dict[str, int]:
            return {"group_size": 64, "bits": 8} if path.endswith("block_sparse_moe.gate") else True

        return predicate
