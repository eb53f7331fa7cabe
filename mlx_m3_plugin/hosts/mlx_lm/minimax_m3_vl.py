"""``mlx_lm.models.minimax_m3_vl``: the text side of a MiniMax-M3 checkpoint.

mlx-lm executes this file under its own module name, so every import is absolute.
"""

from typing import Any

import mlx.core as mx

from mlx_m3_plugin.hosts.mlx_lm.model import MLX_LM, MlxLmModel, ModelArgs, TextArgs
from mlx_m3_plugin.model.attention import Attention
from mlx_m3_plugin.model.decoder import DecoderLayer, LanguageModel, TextModel
from mlx_m3_plugin.model.moe import DenseMLP, SparseMoeBlock
from mlx_m3_plugin.model.norm import GemmaRMSNorm

# The names in upstream's module.
__all__ = [
    "Attention",
    "DecoderLayer",
    "DenseMLP",
    "GemmaRMSNorm",
    "LanguageModel",
    "Model",
    "ModelArgs",
    "SparseMoeBlock",
    "TextArgs",
    "TextModel",
]


class Model(MlxLmModel):
    """Token ids ``[B, L]`` to logits ``[B, L, vocab_size]``; the vision tower is not loaded."""

    text_prefix = "language_model."

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.language_model = LanguageModel(args.text_config, MLX_LM)

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.language_model(inputs, cache, input_embeddings)

    @property
    def model(self) -> TextModel:
        # mlx_lm.utils.sharded_load reaches for model.model.pipeline().
        return self.language_model.model
