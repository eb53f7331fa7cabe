"""One decoder layer, read from its files: attention as a module, experts as they are needed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ...hosts.mlx_lm.cache import make_layer_cache
from ...hosts.mlx_lm.host import MLX_LM
from ...model.attention import Attention
from ...model.decoder import DecoderLayer
from ..checkpoint import Checkpoint
from ..shards import TensorReader
from .experts import StreamedExperts
from .linear import Change, keep, parts_of, read_linear


@dataclass
class Choices:
    """What a layer has chosen, in the order of its calls.

    Attributes:
        experts: ids ``[N, k]``.  blocks: ids ``[1, G, L, k]``, or None where all were taken.
    """

    experts: list[mx.array] = field(default_factory=list)
    blocks: list[mx.array | None] = field(default_factory=list)


class _RecordingAttention(Attention):
    """Keeps the blocks that it chooses."""

    def _select_blocks(self, x: mx.array, offset: Any, left_padding: Any, cache: Any) -> mx.array | None:
        block_ids = super()._select_blocks(x, offset, left_padding, cache)
        self._choices.blocks.append(block_ids)
        return block_ids


class StreamedLayer:
    """A layer in two halves, so that tokens of many texts go through each expert together.

    Args:
        change: other precisions for the weights, to try what they would do.
    """

    def __init__(self, source: Checkpoint, reader: TensorReader, number: int, change: Change = keep):
        self.choices = Choices()
        layer = DecoderLayer(source.text_config, number, MLX_LM)
        layer.self_attn.__class__ = _RecordingAttention
        layer.self_attn._choices = self.choices
        if layer.self_attn.is_sparse_attn and not source.indexers:
            layer.self_attn.drop_indexer()
        base = f"model.layers.{number}"
        if layer.is_moe:
            del layer.block_sparse_moe.switch_mlp
        self._read_weights(source, reader, layer, base, change)
        if layer.is_moe:
            experts: Any = StreamedExperts(
                source, reader, f"{base}.block_sparse_moe.switch_mlp", change, self.choices.experts.append
            )
            layer.block_sparse_moe.switch_mlp = experts
        self._layer = layer

    @staticmethod
    def _read_weights(
        source: Checkpoint, reader: TensorReader, layer: DecoderLayer, base: str, change: Change
    ) -> None:
        for path, module in layer.named_modules():
            full = f"{base}.{path}"
            if "rope" in path or not path or not _has_own_weights(module):
                continue
            owner, _, name = path.rpartition(".")
            if type(module).__name__ == "Linear":
                linear = read_linear(reader, parts_of(source.plan, full), source.spec(full), full, change)
                setattr(_at(layer, owner), name, linear)
                continue
            for parameter in [key for key, value in module.items() if isinstance(value, mx.array)]:
                setattr(module, parameter, reader.read(source.plan[f"{full}.{parameter}"]))

    @property
    def is_sparse(self) -> bool:
        return self._layer.self_attn.is_sparse_attn

    def attend(self, text: mx.array, step: int) -> Iterator[mx.array]:
        """The first half for one text ``[1, L, D]``, ``step`` tokens at a time."""
        cache = make_layer_cache(self._layer.self_attn.is_sparse_attn)
        for start in range(0, text.shape[1], step):
            x = text[:, start : start + step]
            mask = MLX_LM.attention_mask(x, MLX_LM.kv_cache(cache))
            h = x + self._layer.self_attn(self._layer.input_layernorm(x), mask, cache)
            mx.eval(h)
            yield h

    def feed_forward(self, tokens: mx.array) -> mx.array:
        """The second half, for tokens ``[N, D]`` of any texts."""
        layer = self._layer
        feed_forward = layer.block_sparse_moe if layer.is_moe else layer.mlp
        h = tokens + feed_forward(layer.post_attention_layernorm(tokens))
        mx.eval(h)
        return h


def _has_own_weights(module: Any) -> bool:
    return any(isinstance(value, mx.array) for value in module.values())


def _at(module: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        module = getattr(module, name)
    return module
