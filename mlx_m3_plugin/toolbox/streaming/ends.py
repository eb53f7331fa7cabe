"""The two ends of the model: embeddings by the row, and the head."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ...model.norm import make_norm
from ...weights.reading import TensorReader
from ..checkpoint import Checkpoint
from ..precision import dequantized
from .linear import parts_of, read_linear

_EMBEDDING = "model.embed_tokens"


class Embedding:
    """Rows of the embedding, of which a text needs few; with ``dtype``, computed in it and not as stored."""

    def __init__(self, source: Checkpoint, reader: TensorReader, dtype: mx.Dtype | None = None):
        self._dtype = dtype
        self._reader = reader
        self._parts = parts_of(source.plan, _EMBEDDING)
        self._how = source.how(_EMBEDDING)
        self._rows: dict[int, mx.array] = {}

    def __call__(self, tokens: Sequence[int]) -> mx.array:
        """``[N]`` -> ``[N, D]``."""
        for token in set(tokens) - self._rows.keys():
            stored = {p: self._reader.read(t.taken(token, token + 1)) for p, t in self._parts.items()}
            self._rows[token] = self._computed(stored)
        return mx.concatenate([self._rows[token] for token in tokens])

    def _computed(self, stored: dict[str, mx.array]) -> mx.array:
        if self._dtype is None:
            return dequantized(stored, self._how)
        for part, array in stored.items():
            if mx.issubdtype(array.dtype, mx.floating):
                stored[part] = array.astype(self._dtype)
        return dequantized(stored, self._how).astype(self._dtype)


class Head:
    """The final norm, and logits."""

    def __init__(self, source: Checkpoint, reader: TensorReader):
        config = source.text_config
        self._norm = make_norm(config, config.hidden_size)
        self._norm.weight = reader.read(source.plan["model.norm.weight"])
        path = _EMBEDDING if config.tie_word_embeddings else "lm_head"
        self._head: nn.Module = read_linear(reader, parts_of(source.plan, path), source.how(path), path)

    def __call__(self, states: mx.array) -> mx.array:
        """Hidden states ``[N, D]`` before the final norm -> logits ``[N, vocab_size]``."""
        return self._head(self._norm(states))
