"""A layer's slots: memory for some of its experts, inside the arrays that the expert layer multiplies by."""

from collections.abc import Callable, Iterable, Iterator, Mapping
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
# Of bytes, and what they are called.
Check = Callable[[memoryview, str], None]
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

    def start(
        self, spans: Iterable[Span], memory: memoryview, check: Check | None
    ) -> Iterator["Future[None]"]:
        """Begin to fill ``memory`` with the bytes of ``spans`` and to ``check`` them."""
        done = 0
        for span in spans:
            end = done + size_in_bytes(span.shape, self._tensors[span.name].dtype)
            yield self._threads.submit(self._read, span, memory[done:end], check)
            done = end

    def _read(self, span: Span, memory: memoryview, check: Check | None) -> None:
        self.reader.read_into(memory, span)
        if check is not None:
            check(memory, span.name)


class _Part(NamedTuple):
    """One of the tensors that an expert consists of.

    Attributes:
        of_expert: the planned tensor of each expert, and where it is stored; None if it is computed.
        memory: bytes ``[slots, bytes of an expert]``, of an array that the layer computes with.
        check: for values that spoil many outputs, when an expert is read for the first time.
    """

    of_expert: list[tuple[Tensor, list[Span] | None]]
    memory: "np.ndarray[Any, Any]"
    check: Check | None


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
            check = None if name.endswith("weight") else _check_for_nan(tensor.dtype, experts, name)
            self._parts.append(_Part([(one, spans_of(one)) for one in one_by_one], memory, check))
        experts.update(tree_unflatten(list(arrays.items())))
        # Expert -> its slot or -1, and the other way round.
        self.of_expert = np.full(total, -1)
        self._holds = np.full(count, -1)
        self._usage = np.zeros(total)
        # Slot -> reads into it that nobody has waited for yet.
        self._reads: dict[int, list[Future[None]]] = {}
        # Complete when all outputs are that were computed with the slots.
        self._computed = mx.array(0)
        self._checked: set[int] = set()
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

    def are_here(self, wanted: Ids) -> bool:
        """Whether nobody has to wait for any of these experts."""
        return not any(slot < 0 or self._is_being_read(slot) for slot in self.of_expert[wanted].tolist())

    def wait(self, wanted: Ids) -> None:
        """Until these experts, which are here or being read, are here.

        Raises:
            OSError: one of them cannot be read; names the file and the tensor.
            ValueError: its scales hold NaN or infinity.
        """
        began = perf_counter()
        for expert in wanted.tolist():
            slot = int(self.of_expert[expert])
            if slot not in self._reads:
                continue
            try:
                for read in self._reads[slot]:
                    read.result()
                self._make_computed_parts(expert)
            except Exception:
                # Others that were read at the same time may have failed, too.
                for other in self._reads:
                    self._forget(other)
                raise
            del self._reads[slot]
            self._checked.add(expert)
        self.seconds_waited += perf_counter() - began

    def in_groups(self, wanted: Ids, one_by_one: bool) -> Iterator[Ids]:
        """All of these experts, some at a time.  Each group is here while the caller computes with it.

        The next ones are read at the same time, where there are slots for them.

        Args:
            one_by_one: computes with each expert as soon as it is read.

        Raises:
            OSError: see :meth:`wait`.
        """
        mx.eval(self._computed)
        size = 1 if one_by_one else max(1, self.count // 4)
        here = np.array([self.are_here(wanted[n : n + 1]) for n in range(len(wanted))], bool)
        here, missing = wanted[here], wanted[~here]
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
        """Begin to read those of ``wanted`` that are not here, in place of others than ``kept``."""
        for expert in wanted[self.of_expert[wanted] < 0].tolist():
            slot = self._free_slot(kept)
            reads = self._reads[slot] = []
            for part in self._parts:
                spans, memory = part.of_expert[expert][1] or (), memoryview(part.memory[slot])
                check = None if expert in self._checked else part.check
                reads += self._files.start(spans, memory, check)
            self.of_expert[expert], self._holds[slot] = slot, expert

    def _make_computed_parts(self, expert: int) -> None:
        for part in self._parts:
            tensor, spans = part.of_expert[expert]
            if spans is None:
                data = to_bytes(self._files.reader.read(tensor))
                part.memory[self.of_expert[expert]] = np.frombuffer(data, np.uint8)
                if part.check is not None:
                    part.check(memoryview(data), str(tensor))

    def _free_slot(self, kept: Ids) -> int:
        """An empty slot, or the one of the least used expert that is not among ``kept``."""
        slots = np.flatnonzero(~np.isin(self._holds, kept))
        experts = self._holds[slots]
        usage = np.where(experts < 0, -1, self._usage[experts])
        being_read = np.array([self._is_being_read(slot) for slot in slots.tolist()])
        slot = int(slots[np.lexsort([usage, being_read])[0]])
        self._forget(slot)
        wait(self._reads.pop(slot, ()))
        return slot

    def _is_being_read(self, slot: int) -> bool:
        return not all(read.done() for read in self._reads.get(slot, ()))

    def _forget(self, slot: int) -> None:
        """Nothing is in this slot any more, though reads into it may not be complete."""
        expert = int(self._holds[slot])
        if expert >= 0:
            self.of_expert[expert] = self._holds[slot] = -1


def _writable(count: int, stack: Tensor) -> tuple[mx.array, "np.ndarray[Any, Any]"]:
    """An array of ``count`` entries like those of ``stack``, and its memory ``[count, bytes]``.

    Raises:
        RuntimeError: what is written there does not reach the array on this device.
    """
    size = size_in_bytes(stack.shape[1:], stack.dtype)
    # In two axes, because MLX counts an axis in 32 bits.
    raw = mx.zeros((count, size), mx.uint8)
    array = raw.view(stack.dtype).reshape(count, *stack.shape[1:])
    mx.eval(raw, array)
    memory = np.array(raw, copy=False)
    for value in (255, 0):
        memory[-1, -1] = value
        if array.reshape(-1)[-1:].view(mx.uint8)[-1].item() != value:
            raise RuntimeError(
                "experts cannot be read into the memory of arrays on this device: unset "
                "MLX_M3_PLUGIN_EXPERT_MEMORY"
            )
    return array, memory


def _check_for_nan(dtype: mx.Dtype, experts: Any, name: str) -> Check:
    """As :func:`~mlx_m3_plugin.weights.check_values`: bits of which not all may be set, in each value."""
    word, bits = {
        mx.float32: (np.uint32, 0x7F800000),
        mx.bfloat16: (np.uint16, 0x7F80),
        mx.float16: (np.uint16, 0x7C00),
        mx.uint8: (np.uint8, 127 if experts[name.partition(".")[0]].mode == "nvfp4" else 255),
    }[dtype]

    def check(memory: memoryview, what: str) -> None:
        if ((np.frombuffer(memory, word) & bits) == bits).any():
            raise ValueError(f"{what} holds NaN or infinity")

    return check
