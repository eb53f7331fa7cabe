"""The two ends of the model: embeddings by the row, and the head."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ...model.norm import make_norm
from ..checkpoint import Checkpoint
from ..precision import computes_in_float32, dequantized, float32_values
from ..shards import TensorReader
from .linear import parts_of, read_linear

_EMBEDDING = "model.embed_tokens"


class Embedding:
    """Rows of the embedding, of which a text needs few."""

    def __init__(self, source: Checkpoint, reader: TensorReader):
        self._reader = reader
        self._parts = parts_of(source.plan, _EMBEDDING)
        self._spec = source.spec(_EMBEDDING)
        self._rows: dict[int, mx.array] = {}

    def __call__(self, tokens: Sequence[int]) -> mx.array:
        """``[N]`` -> ``[N, D]``."""
        values = float32_values if computes_in_float32() else dequantized
        for token in set(tokens) - self._rows.keys():
            stored = {p: self._reader.read(t.taken(token, token + 1)) for p, t in self._parts.items()}
            self._rows[token] = values(stored, self._spec)
        return mx.concatenate([self._rows[token] for token in tokens])


class Head:
    """The final norm, and logits."""

    def __init__(self, source: Checkpoint, reader: TensorReader):
        config = source.text_config
        self._norm = make_norm(config, config.hidden_size)
        self._norm.weight = reader.read(source.plan["model.norm.weight"])
        path = _EMBEDDING if config.tie_word_embeddings else "lm_head"
        self._head: nn.Module = read_linear(reader, parts_of(source.plan, path), source.spec(path), path)

    def __call__(self, states: mx.array) -> mx.array:
        """Hidden states ``[N, D]`` before the final norm -> logits ``[N, vocab_size]``."""
        return self._head(self._norm(states))
