"""The expert layer whose experts are on the disk."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .slots import Ids, Slots

# Both hosts' ``SwitchGLU`` sorts tokens by expert from so many rows on.
_SORTED_FROM = 64
# MLX's Metal kernel for sorted rows of quantized experts serves from so many rows on, and so many per expert
# (``GatherQMM::eval_gpu`` of mlx 0.32).
_FEWEST_ROWS, _FEWEST_PER_EXPERT = 16, 4


class ExpertsOnDisk(nn.Module):
    """In place of a host's ``SwitchGLU``: tokens ``[N, D]``, expert ids ``[N, k]`` -> ``[N, k, D]``.

    Gives the bits of that layer with all experts in memory: the same matrices in the same kernels.
    It has no parameters: the slots hold now these experts, now others.
    """

    def __init__(self, slots: Slots):
        super().__init__()
        self.slots = slots

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """
        Raises:
            OSError: an expert cannot be read; names the file and the tensor.
            NotImplementedError: in training.
        """
        if self.training:
            raise NotImplementedError("experts on disk cannot be trained: unset MLX_M3_PLUGIN_EXPERT_MEMORY")
        # The only wait of the host in this layer.
        mx.eval(indices)
        slots = self.slots
        chosen = np.array(indices)
        wanted = np.unique(chosen)
        slots.count_usage(chosen)
        is_prompt = chosen.size >= _SORTED_FROM
        if is_prompt or not slots.are_here(wanted):
            output = self._in_groups(x, chosen, slots.in_groups(wanted, one_by_one=not is_prompt))
        else:
            slots.wait(wanted)
            of_choice = mx.array(slots.of_expert[chosen], mx.uint32)
            output = self._multiply(mx.expand_dims(x, (-2, -3)), of_choice, chosen.size)
        return slots.computing(output)

    def _in_groups(self, x: mx.array, chosen: Ids, groups: Iterable[Ids]) -> mx.array:
        """Some experts at a time, with the rows that go to them, sorted as the host's layer sorts all."""
        fewest = max(_FEWEST_ROWS, _FEWEST_PER_EXPERT * self.slots.count)
        outputs, places = [], []
        for group in groups:
            place = np.flatnonzero(np.isin(chosen, group))
            place = place[np.argsort(self.slots.of_expert[chosen.ravel()[place]], kind="stable")]
            places.append(place)
            if self._is_dense(chosen.size):
                place = np.pad(place, (0, max(0, fewest - len(place))), "edge")
            rows = x[mx.array(place // chosen.shape[1])][:, None]
            of_row = mx.array(self.slots.of_expert[chosen.ravel()[place]], mx.uint32)
            y = self._multiply(rows, of_row, chosen.size)[: len(places[-1])]
            outputs.append(self.slots.computing(y))
        back = mx.array(np.argsort(np.concatenate(places)))
        return mx.concatenate(outputs)[back].reshape(*chosen.shape, -1)

    def _multiply(self, rows: mx.array, slots: mx.array, total: int) -> mx.array:
        """Rows ``[..., 1, D]`` by the experts in ``slots``: a part of ``total`` rows -> ``[..., D]``."""

        def by(linear: Any, x: mx.array) -> mx.array:
            is_sorted = self._is_dense(total) if "scales" in linear else total >= _SORTED_FROM
            y: mx.array = linear(x, slots, sorted_indices=is_sorted)
            return y

        experts: Any = self.slots.experts
        hidden = experts.activation(by(experts.up_proj, rows), by(experts.gate_proj, rows))
        return by(experts.down_proj, hidden).squeeze(-2)

    def _is_dense(self, total: int) -> bool:
        """Whether the kernel for many sorted rows serves quantized experts, with all of them in memory."""
        return total >= _SORTED_FROM and total // len(self.slots.of_expert) >= _FEWEST_PER_EXPERT
