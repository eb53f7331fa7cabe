"""The parts of an M3 computed straight from its files: embedding, layers, head.

The arithmetic is the model's own (:mod:`mlx_m3_plugin.model`).  What differs is memory: a layer's attention
is loaded whole, its experts one at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..hosts.mlx_lm.cache import make_layer_cache
from ..hosts.mlx_lm.model import MLX_LM
from ..model.attention import Attention
from ..model.decoder import DecoderLayer
from ..model.moe import SwiGLUOAI
from ..model.norm import make_norm
from ..model.tensor_scales import hold_scale
from ..weights.byte_ranges import TensorReader
from .checkpoint import Checkpoint
from .precision import Quantization, computes_in_float32, converted, dequantized

_EMBEDDING = "model.embed_tokens"
# Of a matrix's values in float32 at a time.
_BYTES_OF_VALUES = 256 << 20

# Module path and stored quantization -> the quantization to compute with, for trying other bits.
Change = Callable[[str, Quantization], Quantization]


class Embedding:
    """The embedding, of which only the needed rows are read."""

    def __init__(self, source: Checkpoint, reader: TensorReader):
        self._reader = reader
        self._parts = source.parts(_EMBEDDING)
        self._spec = source.spec(_EMBEDDING)
        self._vectors: dict[int, mx.array] = {}

    def __call__(self, tokens: Sequence[int]) -> mx.array:
        """``[N]`` -> ``[N, D]``."""
        for token in set(tokens) - self._vectors.keys():
            stored = {p: self._reader.read(t.taken(token, token + 1)) for p, t in self._parts.items()}
            self._vectors[token] = dequantized(stored, self._spec, computes_in_float32())
        return mx.concatenate([self._vectors[token] for token in tokens])


class Head:
    """The final norm and the head."""

    def __init__(self, source: Checkpoint):
        config = source.text_config
        self._norm = make_norm(config, config.hidden_size)
        path = _EMBEDDING if config.tie_word_embeddings else "lm_head"
        with source.reader() as reader:
            self._norm.weight = reader.read(source.plan["model.norm.weight"])
            self._head = _read_linear(source, reader, path)

    def __call__(self, hidden: mx.array) -> mx.array:
        """Hidden states ``[N, D]`` before the final norm -> logits ``[N, vocab_size]``."""
        logits: mx.array = self._head(self._norm(hidden))
        return logits


# --- layers ---


@dataclass
class Choices:
    """What the router and the indexer of a layer chose, in the order of the calls.

    Attributes:
        experts: ids ``[N, k]``.
        blocks: ids ``[1, G, L, k]``, or None where every block was attended.
    """

    experts: list[mx.array] = field(default_factory=list)
    blocks: list[mx.array | None] = field(default_factory=list)


class _RecordingAttention(Attention):
    """Keeps the blocks that its indexer chooses."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        self._choices.blocks.append(None)
        return super().__call__(x, mask, cache)

    def _select_blocks(self, *args: Any) -> mx.array:
        block_ids = super()._select_blocks(*args)
        self._choices.blocks[-1] = block_ids
        return block_ids


class StreamedLayer:
    """A decoder layer in two halves, so that tokens of many texts go through each expert together.

    Args:
        change: other bits for the weights, to measure what they would do.
    """

    def __init__(self, source: Checkpoint, reader: TensorReader, number: int, change: Change | None = None):
        def linear(path: str, expert: int | None = None) -> nn.Module:
            return _read_linear(source, reader, f"model.layers.{number}.{path}", change, expert)

        self.choices = Choices()
        self._layer = layer = DecoderLayer(source.text_config, number, MLX_LM)
        layer.self_attn.__class__ = _RecordingAttention
        layer.self_attn._choices = self.choices
        if layer.self_attn.is_sparse_attn and not source.indexers:
            layer.self_attn.drop_indexer()
        if layer.is_moe:
            del layer.block_sparse_moe.switch_mlp
        linears, arrays = [], []
        for path, module in layer.named_modules():
            if type(module) is nn.Linear:
                linears.append((path, linear(path)))
            elif path and "rope" not in path:
                names = [f"{path}.{name}" for name, value in module.items() if isinstance(value, mx.array)]
                arrays += [(n, reader.read(source.plan[f"model.layers.{number}.{n}"])) for n in names]
        layer.update(tree_unflatten(arrays))
        layer.update_modules(tree_unflatten(linears))
        if layer.is_moe:
            experts: Any = _StreamedExperts(linear, SwiGLUOAI(source.text_config), self.choices)
            layer.block_sparse_moe.switch_mlp = experts

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


@dataclass
class _StreamedExperts:
    """In place of a host's ``SwitchGLU``: tokens ``[N, D]``, expert ids ``[N, k]`` -> ``[N, k, D]``.

    Each call reads each expert once, for all tokens that go to it.
    """

    linear: Callable[[str, int], nn.Module]
    activation: SwiGLUOAI
    choices: Choices

    def __call__(self, tokens: mx.array, experts: mx.array) -> mx.array:
        self.choices.experts.append(experts)
        chosen = np.array(experts).reshape(-1)
        order = np.argsort(chosen, kind="stable")
        numbers, starts = np.unique(chosen[order], return_index=True)
        results = []
        for number, slots in zip(numbers, np.split(order, starts[1:]), strict=True):
            paths = (f"block_sparse_moe.switch_mlp.{name}_proj" for name in ("gate", "up", "down"))
            gate, up, down = (self.linear(path, int(number)) for path in paths)
            x = tokens[mx.array(slots // experts.shape[1])]
            results.append(down(self.activation(up(x), gate(x))))
            mx.eval(results[-1])
        back = mx.array(np.argsort(order))
        return mx.concatenate(results)[back].reshape(*experts.shape, -1)


# --- matrices ---


def _read_linear(
    source: Checkpoint,
    reader: TensorReader,
    path: str,
    change: Change | None = None,
    expert: int | None = None,
) -> nn.Module:
    """A matrix, or that of one expert, as a module that multiplies by it just as a loaded model does."""
    arrays = {
        part: reader.read(tensor if expert is None else tensor.expert(expert))
        for part, tensor in source.parts(path).items()
    }
    stored = source.spec(path)
    spec = change(path, stored) if change else stored
    if spec != stored:
        arrays = converted(arrays, stored, spec)
    mx.eval(arrays)
    if computes_in_float32():
        return _Float32Linear(arrays, spec)
    # The sizes do not matter: MLX is lazy, and the arrays are replaced before they are computed.
    linear: nn.Module = nn.Linear(1, 1, bias=False)
    if spec.bits is not None:
        linear = nn.QuantizedLinear(128, 128, bias=False, **spec.as_quantization())
    linear.update({part: array for part, array in arrays.items() if part != "global_scale"})
    return hold_scale(linear, arrays["global_scale"]) if "global_scale" in arrays else linear


class _Float32Linear(nn.Module):
    """On the CPU: multiplies by the values of a matrix in float32, some of its rows at a time.

    With numpy, whose BLAS is ten times and more as fast as the one in MLX's wheels.
    """

    def __init__(self, stored: Mapping[str, mx.array], spec: Quantization):
        super().__init__()
        self._stored, self._spec = stored, spec

    def __call__(self, x: mx.array) -> mx.array:
        inputs = np.asarray(x.reshape(-1, x.shape[-1]).astype(mx.float32))
        outputs = self._stored["weight"].shape[0]
        y = np.empty((len(inputs), outputs), np.float32)
        step = max(1, _BYTES_OF_VALUES // (4 * x.shape[-1]))
        for start in range(0, outputs, step):
            some = {
                # NVFP4's ``global_scale`` is one number for the whole matrix.
                name: array[start : start + step] if array.ndim == 2 else array
                for name, array in self._stored.items()
            }
            y[:, start : start + step] = inputs @ np.asarray(dequantized(some, self._spec, in_float32=True)).T
        return mx.array(y).reshape(*x.shape[:-1], outputs).astype(x.dtype)
