"""A layer's experts, one in memory at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...model.moe import SwiGLUOAI
from ..checkpoint import Checkpoint
from ..shards import TensorReader
from .linear import Change, keep, parts_of, read_linear

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Called with the choices that the router has made: expert ids [N, k].
Record = Callable[[mx.array], None]


@dataclass
class StreamedExperts:
    """In place of a host's ``SwitchGLU``: tokens ``[N, D]``, expert ids ``[N, k]`` -> ``[N, k, D]``.

    Each expert is read once a call, for all tokens that go to it, and forgotten.
    """

    source: Checkpoint
    reader: TensorReader
    path: str
    change: Change = keep
    record: Record | None = None

    def __post_init__(self) -> None:
        self._activation = SwiGLUOAI(self.source.text_config)
        self._parts = {name: parts_of(self.source.plan, f"{self.path}.{name}") for name in _PROJECTIONS}

    def __call__(self, tokens: mx.array, experts: mx.array) -> mx.array:
        if self.record is not None:
            self.record(experts)
        chosen = np.array(experts).reshape(-1)
        order = np.argsort(chosen, kind="stable")
        numbers, starts = np.unique(chosen[order], return_index=True)
        results = []
        for number, slots in zip(numbers, np.split(order, starts[1:]), strict=True):
            rows = tokens[mx.array(slots // experts.shape[1])]
            results.append(self._expert(int(number), rows))
            mx.eval(results[-1])
        back = mx.array(np.argsort(order))
        return mx.concatenate(results)[back].reshape(*experts.shape, -1)

    def _expert(self, number: int, rows: mx.array) -> mx.array:
        gate, up, down = (self._read(name, number) for name in _PROJECTIONS)
        return down(self._activation(up(rows), gate(rows)))

    def _read(self, name: str, number: int) -> nn.Module:
        parts = {part: tensor.expert(number) for part, tensor in self._parts[name].items()}
        path = f"{self.path}.{name}"
        return read_linear(self.reader, parts, self.source.spec(path), path, self.change)
