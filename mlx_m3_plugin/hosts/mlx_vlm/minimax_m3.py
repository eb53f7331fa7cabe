"""``mlx_vlm.models.minimax_m3``: a MiniMax-M3 that was extracted as a text-only checkpoint.

mlx-vlm executes this file under its own module name, so every import is absolute.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import mlx.core as mx
from mlx_vlm.models.base import InputEmbeddingsFeatures

from mlx_m3_plugin.hosts.mlx_vlm.parts import check_parts

check_parts()

from mlx_m3_plugin.hosts.loading import AnyLayout, text_config_as_set  # noqa: E402
from mlx_m3_plugin.hosts.mlx_vlm.language import LanguageModel  # noqa: E402
from mlx_m3_plugin.hosts.mlx_vlm.storing import StoredModel, as_stored  # noqa: E402
from mlx_m3_plugin.model.config import TextConfig  # noqa: E402
from mlx_m3_plugin.model.decoder import DecoderLayer  # noqa: E402

__all__ = ["LanguageModel", "Model", "ModelConfig", "TextConfig"]


@dataclass
class ModelConfig(TextConfig):
    """Flat: mlx-vlm's loader would overwrite an attribute ``text_config``."""

    loader_config: dict[str, Any] = field(default_factory=dict, repr=False)
    # What the loader asks for; the tensors tell.
    quantization: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelConfig":  # type: ignore[override]
        # The loader adds empty entries for parts that are not there.
        given = {key: value for key, value in params.items() if value != {}}
        text = text_config_as_set(given)
        made = cls(**{f.name: getattr(text, f.name) for f in fields(text)})
        made.model_type = params.get("model_type", "minimax_m3")
        made.loader_config = params
        params.pop("quantization_config", None)
        return made

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


class Model(AnyLayout):
    """Token ids ``[B, L]`` to ``LanguageModelOutput``."""

    text_prefix = "language_model."

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self.language_model = LanguageModel(config, config)

    @property
    def text_config(self) -> TextConfig:
        return self.config

    @property
    def loader_config(self) -> dict[str, Any]:
        return self.config.loader_config

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.language_model.layers

    def __call__(
        self,
        input_ids: mx.array,
        pixel_values: mx.array | None = None,
        mask: mx.array | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        self._refuse(pixel_values if pixel_values is not None else kwargs.get("pixel_values_videos"))
        return self.language_model(input_ids, mask=mask, cache=cache, **kwargs)

    def get_input_embeddings(
        self, input_ids: mx.array, pixel_values: mx.array | None = None, **kwargs: Any
    ) -> InputEmbeddingsFeatures:
        """Token embeddings.

        Raises:
            ValueError: there are pixels.
        """
        self._refuse(pixel_values if pixel_values is not None else kwargs.get("pixel_values_videos"))
        return InputEmbeddingsFeatures(inputs_embeds=self.language_model.model.embed_tokens(input_ids))

    def _refuse(self, pixel_values: mx.array | None) -> None:
        if pixel_values is not None:
            raise ValueError("this MiniMax-M3 checkpoint has no vision tower: it takes text only")

    def make_cache(self) -> list[Any]:
        return self.language_model.make_cache()

    def as_stored(self) -> tuple[StoredModel, dict[str, Any]]:
        """See :func:`~mlx_m3_plugin.hosts.mlx_vlm.storing.as_stored`."""
        return as_stored(self, self.text_config, self.text_prefix)

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        self.language_model.shard(group)

    def speculative_logits_from_hidden(self, hidden: mx.array) -> mx.array:
        return self.language_model.speculative_logits_from_hidden(hidden)

    def rollback_speculative_cache(self, *args: Any, **kwargs: Any) -> int:
        return self.language_model.rollback_speculative_cache(*args, **kwargs)
