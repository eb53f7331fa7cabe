"""What mlx-lm expects of a model besides calling it, for both M3 model types."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.model.decoder import DecoderLayer, LanguageModel, TextModel
from mlx_m3_plugin.model.sharding import shard_layers
from mlx_m3_plugin.weights import (
    check_values,
    check_weights,
    infer_quantization,
    lacks_indexers,
    map_weights,
)

from .cache import CacheList, make_layer_cache
from .experts import hold_global_scales

log = logging.getLogger("mlx_m3_plugin")


def warn_dense(reason: str, config: TextConfig) -> None:
    log.warning(
        "mlx-m3-plugin: %s; every layer attends to everything. Past %d tokens that is not what "
        "MiniMax-M3 was trained with, and its answers there are not to be relied on.",
        reason,
        config.budget,
    )


class MlxLmModel(nn.Module):
    """Base of the two ``Model`` classes; they differ in where the text model sits.

    Attributes:
        text_prefix: what stands before ``model.layers`` and ``lm_head`` in parameter names.
        args: among them ``loader_config``, the dict that mlx-lm's loader made the model from, and
            reads again after :meth:`sanitize`.
    """

    text_prefix: str
    text_config: TextConfig
    language_model: LanguageModel
    args: Any

    @property
    def text_model(self) -> TextModel:
        return self.language_model.model

    @property
    def layers(self) -> list[DecoderLayer]:
        """The layers that this process runs."""
        return self.text_model.pipeline_layers

    def make_cache(self) -> list[CacheList]:
        return [make_layer_cache(layer.self_attn.is_sparse_attn) for layer in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Map the tensors of any known checkpoint layout to this model's parameter names.

        Raises:
            ValueError: a tensor is there twice, or in a format that MLX has no mode for.
        """
        mapped = map_weights(weights, self.text_config, self.text_prefix)
        if lacks_indexers(mapped, self.text_config):
            for layer in self.layers:
                if layer.self_attn.is_sparse_attn:
                    layer.self_attn.drop_indexer()
            warn_dense("this checkpoint has no indexer weights", self.text_config)
        elif not any(layer.self_attn.is_sparse_attn for layer in self.layers):
            warn_dense("this checkpoint's config names no sparse layers", self.text_config)
        elif self.text_config.attention == "dense":
            warn_dense("dense attention was asked for", self.text_config)
        self._tell_loader(mapped)
        return mapped

    def _tell_loader(self, mapped: dict[str, mx.array]) -> None:
        """Describe the mapped tensors in the loader's config, as it stands for what is saved too.

        The checkpoint's own quantization map names modules as they were stored, and mlx-lm
        before 0.32 takes bits and modes from nowhere else.
        """
        config = self.args.loader_config
        quantization = infer_quantization(mapped, dict(tree_flatten(self.parameters())))
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
        if quantization is not None:
            config.update(quantization=quantization, quantization_config=quantization)
            hold_global_scales(self, mapped)
        # For mlx-vlm: gate and up are apart here, and the shared expert is no row of the experts.
        text_config = config.get("text_config")
        (text_config if isinstance(text_config, dict) else config)["pack_shared_expert"] = False

    def load_weights(
        self, file_or_weights: str | Path | list[tuple[str, mx.array]], strict: bool = True
    ) -> nn.Module:
        """As ``nn.Module.load_weights``, with an error that a person can read.

        Raises:
            ValueError: when ``strict``, tensors are missing, left over or of the wrong shape.
        """
        if isinstance(file_or_weights, (str, Path)):
            file_or_weights = list(mx.load(str(file_or_weights)).items())  # type: ignore[union-attr]
        if strict:
            check_weights(dict(file_or_weights), dict(tree_flatten(self.parameters())))
        super().load_weights(file_or_weights, strict=strict)
        return self

    def check_values(self) -> None:
        """See :func:`~mlx_m3_plugin.weights.check_values`."""
        check_values(self)

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        shard_layers(self.layers, group or mx.distributed.init())

    def pipeline(self, group: mx.distributed.Group, split: list[int] | None = None) -> None:
        self.text_model.pipeline(group, split)

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Which parameters a conversion may cast: not the router, which is float32 by design."""
        return lambda path: not path.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias"))

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], Any]:
        """Which parameters a conversion quantizes: all linear layers, the router in 8 bits."""

        def predicate(path: str, _: nn.Module) -> bool | dict[str, int]:
            if path.endswith("block_sparse_moe.gate"):
                return {"group_size": 64, "bits": 8}
            return True

        return predicate
