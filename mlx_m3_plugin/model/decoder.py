"""The decoder: embedding, layers, final norm, and the language-model head."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import Attention
from .config import TextConfig
from .host import Host
from .kv_cache import keep_in_graph
from .moe import DenseMLP, SparseMoeBlock, SwiGLUOAI
from .norm import make_norm
from .pipeline import split_layers


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, layer: int, host: Host | None = None):
        super().__init__()
        self.self_attn = Attention(config, layer, host)
        self.is_moe = config.is_moe(layer)
        if self.is_moe:
            self.block_sparse_moe = SparseMoeBlock(config, host)
        else:
            self.mlp = DenseMLP(
                config.hidden_size, config.dense_intermediate_size, activation=SwiGLUOAI(config)
            )
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        feed_forward = self.block_sparse_moe if self.is_moe else self.mlp
        return x + feed_forward(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    """Token ids or embeddings to the last hidden states.

    The ``pipeline`` attributes are those of mlx-lm's ``PipelineMixin``, written out here because
    mlx-vlm has no such class, and mlx-lm's drops layers that do not divide evenly (until: mlx-lm 0.32).
    """

    def __init__(self, config: TextConfig, host: Host | None = None):
        super().__init__()
        self.config = config
        self.host = host = host or config.host
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, i, host) for i in range(config.num_hidden_layers)]
        self.norm = make_norm(config, config.hidden_size)
        self.pipeline_rank, self.pipeline_size = 0, 1
        self.start_idx = 0
        self.end_idx: int | None = None

    @property
    def pipeline_layers(self) -> list[DecoderLayer]:
        """The layers that this process runs."""
        return self.layers[self.start_idx : self.end_idx]

    def pipeline(self, group: mx.distributed.Group, split: Sequence[int] | None = None) -> None:
        """Keep this rank's layers, by ``split`` or by the config's; see :func:`.split_layers`."""
        n_layers = len(self.layers)
        self.start_idx, self.end_idx = split_layers(n_layers, group, split or self.config.pipeline_split)
        self.pipeline_rank, self.pipeline_size = group.rank(), group.size()
        # Layer numbers stay what they are in the checkpoint.
        self.layers = [None] * self.start_idx + self.pipeline_layers  # type: ignore[assignment]

    def __call__(
        self, inputs: mx.array, mask: None = None, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Token ids ``[B, L]``, or ``input_embeddings`` ``[B, L, D]`` -> ``[B, L, D]``.

        Raises:
            ValueError: for a ``mask``.  The argument stands where mlx-lm's models have it, but
                what is visible follows from the cache, on sparse layers in more than a mask.
        """
        if mask is not None:
            raise ValueError("MiniMax-M3 takes no mask: leave it out; the cache knows the padding")
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        return self.norm(self.run_layers(h, cache))

    def run_layers(
        self, h: mx.array, cache: Any = None, after_layer: Callable[[int, mx.array], None] | None = None
    ) -> mx.array:
        """Embeddings ``[B, L, D]`` -> hidden states ``[B, L, D]`` before the final norm.

        ``after_layer`` is called with each layer's number and output.
        """
        layers = self.pipeline_layers
        if cache is None:
            cache = [None] * len(layers)
        else:
            self.host.adopt(cache)
        dense_mask = self.host.attention_mask(h, self.host.kv_cache(cache[0]))

        if self.pipeline_rank < self.pipeline_size - 1:
            h = mx.distributed.recv_like(h, self.pipeline_rank + 1)
        for number, (layer, layer_cache) in enumerate(zip(layers, cache, strict=True), self.start_idx):
            h = layer(h, dense_mask, layer_cache)
            if after_layer is not None:
                after_layer(number, h)
        if self.pipeline_rank != 0:
            h = mx.distributed.send(h, self.pipeline_rank - 1)
            # Nothing else on this rank consumes what it has sent.
            keep_in_graph(self.host.kv_cache(cache[-1]), [h])
        if self.pipeline_size > 1:
            h = mx.distributed.all_gather(h)[: h.shape[0]]
        return h


class LanguageModel(nn.Module):
    """:class:`TextModel` with its head: token ids ``[B, L]`` to logits ``[B, L, vocab_size]``."""

    def __init__(
        self,
        config: TextConfig,
        host: Host | None = None,
        make_text_model: Callable[..., TextModel] = TextModel,
    ):
        super().__init__()
        self.tie_word_embeddings = config.tie_word_embeddings
        self.model = make_text_model(config, host)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.logits(self.model(inputs, cache=cache, input_embeddings=input_embeddings))

    def logits(self, h: mx.array) -> mx.array:
        """Normed hidden states ``[B, L, D]`` -> ``[B, L, vocab_size]``."""
        if self.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(h)
        return self.lm_head(h)
