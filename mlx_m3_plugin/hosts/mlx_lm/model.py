"""A MiniMax-M3 model as mlx-lm expects it, with a ``text_config`` or flat."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_m3_plugin.hosts.loading import CheckpointMixin, text_config_as_set
from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.model.decoder import DecoderLayer, LanguageModel, TextModel
from mlx_m3_plugin.model.sharding import shard_layers

from .cache import CacheList, make_layer_cache


@dataclass
class ModelArgs:
    """``config.json`` of a checkpoint, published or re-saved: with a ``text_config``, or flat."""

    text_config: TextConfig
    model_type: str = "minimax_m3_vl"
    loader_config: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = TextConfig.from_dict(self.text_config)

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        return cls(text_config_as_set(params), params.get("model_type", cls.model_type), params)


class MlxLmModel(CheckpointMixin):
    """Base of the two ``Model`` classes; they differ in where the text model is."""

    args: ModelArgs
    language_model: LanguageModel

    @property
    def model_type(self) -> str:
        return self.args.model_type

    @property
    def text_config(self) -> TextConfig:
        return self.args.text_config

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

    @property
    def held_layers(self) -> range | None:
        model = self.text_model
        return None if model.end_idx is None else range(model.start_idx, model.end_idx)

    def make_cache(self) -> list[CacheList]:
        return [make_layer_cache(layer.self_attn.is_sparse_attn) for layer in self.layers]

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        shard_layers(self.layers, group or mx.distributed.init())

    def pipeline(self, group: mx.distributed.Group, split: list[int] | None = None) -> None:
        self.text_model.pipeline(group, split)
