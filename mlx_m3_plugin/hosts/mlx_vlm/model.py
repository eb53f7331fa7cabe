"""A MiniMax-M3 model as mlx-vlm expects it, with vision or without."""

from typing import Any

import mlx.core as mx

from mlx_m3_plugin.hosts.loading import CheckpointMixin
from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.model.decoder import DecoderLayer

from .language import LanguageModel
from .storing import StoredModel, as_stored


class MlxVlmModel(CheckpointMixin):
    """Base of the two ``Model`` classes; they differ in their configs and in vision."""

    text_prefix = "language_model."
    config: Any
    language_model: LanguageModel

    @property
    def text_config(self) -> TextConfig:
        return self.language_model.args

    @property
    def loader_config(self) -> dict[str, Any]:
        return self.config.loader_config

    @property
    def layers(self) -> list[DecoderLayer]:
        """The layers that this process runs."""
        return self.language_model.layers

    def make_cache(self) -> list[Any]:
        return self.language_model.make_cache()

    def as_stored(self) -> tuple[StoredModel, dict[str, Any]]:
        """See :func:`.storing.as_stored`."""
        return as_stored(self, self.text_config, self.text_prefix)

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        self.language_model.shard(group)

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
