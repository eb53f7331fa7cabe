"""``mlx_vlm.models.minimax_m3``: a MiniMax-M3 that was extracted as a text-only checkpoint.

mlx-vlm executes this file under its own module name, so every import is absolute.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import mlx.core as mx
from mlx_vlm.models.base import InputEmbeddingsFeatures

from mlx_m3_plugin.hosts.mlx_vlm.parts import check_parts

check_parts()

from mlx_m3_plugin.hosts.loading import text_config_as_set  # noqa: E402
from mlx_m3_plugin.hosts.mlx_vlm.language import LanguageModel  # noqa: E402
from mlx_m3_plugin.hosts.mlx_vlm.model import MlxVlmModel, refuse_pixels  # noqa: E402
from mlx_m3_plugin.model.config import TextConfig  # noqa: E402

__all__ = ["LanguageModel", "Model", "ModelConfig", "TextConfig"]


@dataclass
class ModelConfig(TextConfig):
    """Flat: mlx-vlm's loader would overwrite an attribute ``text_config``, so this one cannot be set."""

    loader_config: dict[str, Any] = field(default_factory=dict, repr=False)
    # The loader asks for these; we read them from the tensors.
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

    # until: mlx-vlm 0.6.4, whose loader asks for it where a module has a ``LanguageModel``.
    @property
    def text_config(self) -> "ModelConfig":
        return self

    @text_config.setter
    def text_config(self, value: Any) -> None:
        pass

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


class Model(MlxVlmModel):
    """Token ids ``[B, L]`` to ``LanguageModelOutput``."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self.language_model = LanguageModel(config, config)

    def __call__(
        self,
        input_ids: mx.array,
        pixel_values: mx.array | None = None,
        mask: mx.array | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        refuse_pixels(pixel_values, kwargs)
        return self.language_model(input_ids, mask=mask, cache=cache, **kwargs)

    def get_input_embeddings(
        self, input_ids: mx.array, pixel_values: mx.array | None = None, **kwargs: Any
    ) -> InputEmbeddingsFeatures:
        """Token embeddings.

        Raises:
            ValueError: there are pixels.
        """
        refuse_pixels(pixel_values, kwargs)
        return InputEmbeddingsFeatures(inputs_embeds=self.language_model.model.embed_tokens(input_ids))
