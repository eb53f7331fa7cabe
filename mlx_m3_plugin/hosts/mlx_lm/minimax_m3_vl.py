"""``mlx_lm.models.minimax_m3_vl``: the text side of a MiniMax-M3 checkpoint.

mlx-lm executes this file under its own module name, so every import is absolute.
"""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_m3_plugin.hosts.loading import text_config_as_set
from mlx_m3_plugin.hosts.mlx_lm.host import MLX_LM
from mlx_m3_plugin.hosts.mlx_lm.model import MlxLmModel
from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.model.decoder import LanguageModel, TextModel

TextArgs = TextConfig


@dataclass
class ModelArgs:
    """``config.json`` of a checkpoint with ``text_config``, published or re-saved."""

    text_config: TextConfig
    model_type: str = "minimax_m3_vl"
    loader_config: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = TextConfig.from_dict(self.text_config)

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        return cls(text_config_as_set(params), params.get("model_type", cls.model_type), params)


class Model(MlxLmModel):
    """Token ids ``[B, L]`` to logits ``[B, L, vocab_size]``; the vision tower is not loaded."""

    text_prefix = "language_model."

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.text_config = args.text_config
        self.language_model = LanguageModel(args.text_config, MLX_LM)

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.language_model(inputs, cache, input_embeddings)

    @property
    def model(self) -> TextModel:
        # mlx_lm.utils.sharded_load reaches for model.model.pipeline().
        return self.text_model
