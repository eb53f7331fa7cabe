"""What mlx-lm expects of a model besides calling it, for both M3 model types."""

from typing import Any

import mlx.core as mx

from mlx_m3_plugin.hosts.loading import AnyLayout
from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.model.decoder import DecoderLayer, LanguageModel, TextModel
from mlx_m3_plugin.model.sharding import shard_layers

from .cache import CacheList, make_layer_cache


class MlxLmModel(AnyLayout):
    """Base of the two ``Model`` classes; they differ in where the text model sits."""

    args: Any
    text_config: TextConfig
    language_model: LanguageModel

    @property
    def loader_config(self) -> dict[str, Any]:
        return self.args.loader_config

    @property
    def text_model(self) -> TextModel:
        return self.language_model.model

    @property
    def layers(self) -> list[DecoderLayer]:
        """The layers that this process runs."""
        return self.text_model.pipeline_layers

    def make_cache(self) -> list[CacheList]:
        return [make_layer_cache(layer.self_attn.is_sparse_attn) for layer in self.layers]

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        shard_layers(self.layers, group or mx.distributed.init())

    def pipeline(self, group: mx.distributed.Group, split: list[int] | None = None) -> None:
        self.text_model.pipeline(group, split)

    @property
    def held_layers(self) -> range | None:  # type: ignore[override]
        model = self.text_model
        return None if model.end_idx is None else range(model.start_idx, model.end_idx)
