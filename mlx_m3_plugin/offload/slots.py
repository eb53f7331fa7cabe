"""A layer's slots: memory for some of its experts, inside the arrays that the expert layer multiplies by."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..weights.byte_ranges import Span, TensorReader, spans_of
from ..weights.dtypes import size_in_bytes, to_bytes
from ..weights.headers import StoredTensor
from ..weights.tensor import Tensor, TensorPlan

Ids = np.ndarray[Any, Any]
# Several reads at once are needed for an SSD's full speed.
THREADS = 8
# Of an expert's usage, at each call of its layer: the last 50 calls count most.
DECAY = 0.98


class ExpertFiles:
    """Reads experts from a checkpoint's files, several parts at the same time."""

    def __init__(self, directory: Path, tensors: Mapping[str, StoredTensor], plan: TensorPlan):
        self._tensors = tensors
        self.reader = TensorReader(directory, tensors)
        self.reader.open_uncached({name for tensor in plan.values() for name in tensor.stored_names()})
        self._threads = ThreadPoolExecutor(THREADS, "m3-experts")

    def start(self, spans: Iterable[Span], memory: memoryview) -> Iterator["Future[None]"]:
        """Begin to fill ``memory`` with the bytes of ``spans``, one after the other."""
        done = 0
        for span in spans:
            end = done + size_in_bytes(span.shape, self._tensors[span.name].dtype)
            yield self._threads.submit(self.reader.read_into, memory[done:end], span)
            done = end


class _Part(NamedTuple):
    """One of the tensors that an expert consists of.

    Attributes:
        of_expert: the planned tensor of each expert, and where it is stored; None if it is computed.
        memory: bytes ``[slots, bytes of an expert]``, of an array that the layer computes with.
    """

    of_expert: list[tuple[Tensor, list[Span] | None]]
    memory: "np.ndarray[Any, Any]"


class Slots:
    """Which experts are in memory, and the reads that are on the way.

    An array's memory is written while MLX may still have to compute with it, so whoever computes with
    the slots says with :meth:`computing` what must be complete before another expert is read into one.

    Args:
        experts: the host's ``SwitchGLU``, as it is quantized.  Its parameters become the slots.
        plan: its parameters as they are stored, by their names in ``experts``.
        count: slots.
    """

    def __init__(self, experts: nn.Module, plan: TensorPlan, count: int, files: ExpertFiles):
        self.experts, self.count = experts, count
        self._files = files
        total = next(iter(plan.values())).shape[0]
        arrays, self._parts = {}, []
        for name, tensor in plan.items():
            arrays[name], memory = _writable(count, tensor)
            one_by_one = [tensor.expert(number) for number in range(total)]
            self._parts.append(_Part([(one, spans_of(one)) for one in one_by_one], memory))
        experts.update(tree_unflatten(list(arrays.items())))
        # Expert -> its slot or -1, and the other way round.
        self.of_expert = np.full(total, -1)
        self._holds = np.full(count, -1)
        self._usage = np.zeros(total)
        # Expert -> reads that nobody has waited for yet.
        self._reads: dict[int, list[Future[None]]] = {}
        # Complete when all outputs are that were computed with the slots.
        self._computed = mx.array(0)
        self.hits, self.misses, self.seconds_waited = 0, 0, 0.0

    def count_usage(self, chosen: Ids) -> None:
        """Expert ids ``[N, k]`` that a call has chosen."""
        times = np.bincount(chosen.ravel(), minlength=len(self._usage))
        self._usage = DECAY * self._usage + times / len(chosen)
        wanted = times > 0
        self.misses += int((wanted & (self.of_expert < 0)).sum())
        self.hits += int((wanted & (self.of_expert >= 0)).sum())

    def computing(self, output: mx.array) -> mx.array:
        """``output``, which is computed with experts in the slots."""
        # After the output before, which nobody may have asked for yet.
        output, self._computed = mx.depends([output, self._computed], [output])
        return output

    def start(self, wanted: Ids) -> None:
        """Begin to read those of these experts that are not here; at most as many as there are slots."""
        if (self.of_expert[wanted] < 0).any():
            mx.eval(self._computed)
            self._start(wanted, wanted)

    def wait(self, wanted: Ids) -> None:
        """Until these experts, all of which have been started, are here.

        Raises:
            OSError: one of them cannot be read; names the file and the tensor.
        """
        began = perf_counter()
        for expert in wanted.tolist():
            reads = self._reads.get(expert)
            if reads is None:
                continue
            try:
                for read in reads:
                    read.result()
                self._make_computed_parts(expert)
            except Exception:
                self._forget(int(self.of_expert[expert]))
                raise
            del self._reads[expert]
        self.seconds_waited += perf_counter() - began

    def in_groups(self, wanted: Ids) -> Iterator[Ids]:
        """All of these experts, some at a time.  Each group is here while the caller computes with it.

        The next ones are read at the same time, where there are slots for them.

        Raises:
            OSError: see :meth:`wait`.
        """
        mx.eval(self._computed)
        size = max(1, self.count // 4)
        here, missing = wanted[self.of_expert[wanted] >= 0], wanted[self.of_expert[wanted] < 0]
        # The least used first: their slots are then read into.
        here = here[np.argsort(self._usage[here], kind="stable")]
        split = 2 * size if len(missing) else len(here)
        groups = [group for group in (here[:split], here[split:]) if len(group)]
        started, finished = len(groups), 0
        groups += [missing[i : i + size] for i in range(0, len(missing), size)]
        outputs: list[mx.array] = []
        for number, group in enumerate(groups):
            while started < len(groups):
                kept = np.concatenate(groups[finished : started + 1])
                if len(kept) <= self.count:
                    self._start(groups[started], kept)
                    started += 1
                elif finished < number - 1 or started == number:
                    mx.eval(outputs[finished])
                    finished += 1
                else:
                    # There is something to compute, and the group before is not complete yet.
                    break
            self.wait(group)
            yield group
            outputs.append(self._computed)
            mx.async_eval(self._computed)

    def _start(self, wanted: Ids, kept: Ids) -> None:
        for expert in wanted[self.of_expert[wanted] < 0].tolist():
            slot = self._free_slot(kept)
            reads: list[Future[None]] = []
            try:
                for part in self._parts:
                    reads += self._files.start(part.of_expert[expert][1] or (), memoryview(part.memory[slot]))
            except BaseException:
                wait(reads)
                raise
            self._reads[expert] = reads
            self.of_expert[expert], self._holds[slot] = slot, expert

    def _make_computed_parts(self, expert: int) -> None:
        for part in self._parts:
            tensor, spans = part.of_expert[expert]
            if spans is None:
                array = self._files.reader.read(tensor)
                part.memory[self.of_expert[expert]] = np.frombuffer(to_bytes(array), np.uint8)

    def _free_slot(self, kept: Ids) -> int:
        """An empty slot, or the one of the least used expert that is not among ``kept``."""
        slots = np.flatnonzero(~np.isin(self._holds, kept))
        experts = self._holds[slots]
        usage = np.where(experts < 0, -1, self._usage[experts])
        being_read = np.array([self._is_being_read(expert) for expert in experts.tolist()])
        slot = int(slots[np.lexsort([usage, being_read])[0]])
        self._forget(slot)
        return slot

    def _is_being_read(self, expert: int) -> bool:
        return not all(read.done() for read in self._reads.get(expert, ()))

    def _forget(self, slot: int) -> None:
        expert = int(self._holds[slot])
        if expert >= 0:
            wait(self._reads.get(expert, ()))
            self._reads.pop(expert, None)
            self.of_expert[expert] = self._holds[slot] = -1


def _writable(count: int, stack: Tensor) -> tuple[mx.array, "np.ndarray[Any, Any]"]:
    """An array of ``count`` entries like those of ``stack``, and its memory ``[count, bytes]``.

    Raises:
        RuntimeError: what is written there does not reach the array on this device.
    """
    size = size_in_bytes(stack.shape[1:], stack.dtype)
    raw = mx.zeros(count * size, mx.uint8)
    array = raw.view(stack.dtype).reshape(count, *stack.shape[1:])
    mx.eval(raw, array)
    memory = np.array(raw, copy=False).reshape(count, size)
    for value in (255, 0):
        memory[-1, -1] = value
        if array.reshape(-1)[-1:].view(mx.uint8)[-1].item() != value:
            raise RuntimeError(
                "experts cannot be read into the memory of arrays on this device: unset "
                "MLX_M3_PLUGIN_EXPERT_MEMORY"
            )
    return array, memory
