"""``mlx_vlm.models.minimax_m3``: a MiniMax-M3 that was extracted as a text-only checkpoint.

mlx-vlm executes this file under its own module name, so every import is absolute.
"""

from typing import Any

import mlx.core as mx
from mlx_vlm.models.base import InputEmbeddingsFeatures

from mlx_m3_plugin.hosts.mlx_vlm.parts import check_parts

check_parts()

from mlx_vlm.models.minimax_m3_vl.config import _sanitize_quantization_config  # noqa: E402

from mlx_m3_plugin.hosts.loading import text_config_as_set  # noqa: E402
from mlx_m3_plugin.hosts.mlx_vlm.language import LanguageModel, TextConfig  # noqa: E402
from mlx_m3_plugin.hosts.mlx_vlm.model import MlxVlmModel, refuse_pixels  # noqa: E402

__all__ = ["LanguageModel", "Model", "ModelConfig", "TextConfig"]


class ModelConfig(TextConfig):
    """Flat: mlx-vlm's loader would overwrite an attribute ``text_config``, so this one cannot be set.

    Attributes:
        quantization: as the checkpoint has it, by mlx-vlm's names; as the tensors are, once they are known.
        quantization_config: the same.
    """

    def __init__(
        self,
        quantization: Any = None,
        quantization_config: Any = None,
        loader_config: Any = None,
        **text: Any,
    ):
        super().__init__(**{"model_type": "minimax_m3", **text})
        self.loader_config: dict[str, Any] = {} if loader_config is None else loader_config
        self.quantization = _sanitize_quantization_config(quantization)
        self.quantization_config = (
            self.quantization
            if quantization_config == quantization
            else _sanitize_quantization_config(quantization_config)
        )

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelConfig":  # type: ignore[override]
        # The loader adds empty entries for parts that are not there.
        text = vars(text_config_as_set({key: value for key, value in params.items() if value != {}}))
        own = {key: params.get(key) for key in ("quantization", "quantization_config")}
        made = cls(**text | own)
        made.loader_config = params
        made.model_type = params.get("model_type", "minimax_m3")
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
