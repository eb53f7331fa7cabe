"""``mlx_lm.models.minimax_m3``: a MiniMax-M3 that was extracted as a text-only checkpoint.

mlx-lm executes this file under its own module name, so every import is absolute.
"""

from dataclasses import dataclass, field
from typing import Any

from mlx_m3_plugin.hosts.loading import text_config_as_set
from mlx_m3_plugin.hosts.mlx_lm.host import MLX_LM
from mlx_m3_plugin.hosts.mlx_lm.model import MlxLmModel
from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.model.decoder import LanguageModel

TextArgs = TextConfig


@dataclass
class ModelArgs:
    """``config.json`` of a text-only checkpoint: flat, or with a ``text_config``."""

    text_config: TextConfig
    model_type: str = "minimax_m3"
    loader_config: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        return cls(text_config_as_set(params), params.get("model_type", cls.model_type), params)


class Model(LanguageModel, MlxLmModel):
    """Token ids ``[B, L]`` to logits ``[B, L, vocab_size]``, with ``model.*`` and ``lm_head.*`` on top."""

    text_prefix = ""

    def __init__(self, args: ModelArgs):
        super().__init__(args.text_config, MLX_LM)
        self.args = args
        self.model_type = args.model_type
        self.text_config = args.text_config

    @property
    def language_model(self) -> LanguageModel:  # type: ignore[override]
        return self
