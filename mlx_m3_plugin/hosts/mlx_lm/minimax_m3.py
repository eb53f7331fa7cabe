"""``mlx_lm.models.minimax_m3``: a MiniMax-M3 that was extracted as a text-only checkpoint.

mlx-lm executes this file under its own module name, so every import is absolute.
"""

from dataclasses import dataclass

from mlx_m3_plugin.hosts.mlx_lm import model
from mlx_m3_plugin.model.decoder import LanguageModel

TextArgs = model.TextArgs


@dataclass
class ModelArgs(model.ModelArgs):
    model_type: str = "minimax_m3"


class Model(model.MlxLmModel, LanguageModel):
    """Token ids ``[B, L]`` to logits ``[B, L, vocab_size]``, with ``model.*`` and ``lm_head.*`` on top."""

    text_prefix = ""

    def __init__(self, args: ModelArgs):
        super().__init__(args.text_config, model.MLX_LM)
        self.args = args

    @property
    def language_model(self) -> LanguageModel:  # type: ignore[override]
        return self
