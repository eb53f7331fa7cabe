"""How to run a checkpoint with the stock commands, and how much context fits into memory."""

import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ...model.config import TextConfig
from ..machine import is_mac
from ..memory import (
    PREFILL_STEP,
    bytes_per_token,
    context_that_fits,
    kv_group_size,
    reserve_of,
    transient_bytes,
    wired_limit,
)
from ..sizes import size_in_words

WHY_SAMPLING = "greedy decoding, their default, can make low-bit weights think in circles"
_SAMPLING = "--temp 1.0 --top-p 0.95"
_ENOUGH_TO_THINK = "--max-tokens 4096"


@dataclass(frozen=True)
class Memory:
    """What a context costs, and what this machine has.

    Attributes:
        weights: bytes that mlx-lm loads; it leaves vision out.
        per_token, per_token_kv_8: bytes of context at 16 bits, and with K and V in 8 bits.
        kv_group_size: of ``--kv-bits``; the head size has to be a multiple of it.
        machine: bytes of memory, None where it cannot be told.
        reserve: bytes left to everything else.
        context, context_kv_8: tokens that fit, at most as many as the model knows; 0 when the
            weights alone do not fit.
        wired_limit_mb: what ``iogpu.wired_limit_mb`` has to be on a Mac for ``context`` tokens, if
            macOS's own limit is too low.
    """

    weights: int
    per_token: int
    per_token_kv_8: int
    kv_group_size: int
    machine: int | None
    reserve: int
    context: int
    context_kv_8: int
    wired_limit_mb: int | None


def memory_for(config: TextConfig, weights: int, sparse_layers: int, machine: int | None) -> Memory:
    """``sparse_layers``: how many layers keep index keys beside K and V."""
    kv_16, kv_8 = bytes_per_token(config, sparse_layers), bytes_per_token(config, sparse_layers, 8)
    memory = machine or 0
    reserve = reserve_of(memory)
    context, context_kv_8 = (
        context_that_fits(config, kv, memory - reserve - weights) for kv in (kv_16, kv_8)
    )
    total = weights + kv_16 * context + transient_bytes(config, PREFILL_STEP, context)
    return Memory(
        weights=weights,
        per_token=kv_16,
        per_token_kv_8=kv_8,
        kv_group_size=kv_group_size(config),
        machine=machine,
        reserve=reserve,
        context=context,
        context_kv_8=context_kv_8,
        wired_limit_mb=wired_limit(memory, total) if context else None,
    )


def commands(name: str, *, mlx_lm: bool, mlx_vlm: bool) -> list[str]:
    """Stock command lines with M3's recommended sampling, ready to paste.

    ``mlx_lm``, ``mlx_vlm``: for which to give them.
    """
    model = f"--model {shlex.quote(name)}"
    lines = []
    if mlx_lm:
        lines += [
            f'mlx_lm.generate {model} --prompt "Hello" {_ENOUGH_TO_THINK} {_SAMPLING} --top-k 40',
            # It has no --top-k.
            f"mlx_lm.chat {model} {_ENOUGH_TO_THINK} {_SAMPLING}",
            f"mlx_lm.server {model} {_ENOUGH_TO_THINK} {_SAMPLING} --top-k 40",
        ]
    if mlx_vlm:
        sampling = _SAMPLING.replace("--temp ", "--temperature ") + " --top-k 40"
        if _is_before("mlx-vlm", (0, 7)):
            # It takes the others from generation_config.json only.
            sampling = "--temperature 1.0"
        question = '--image photo.jpg --prompt "What is this?"'
        lines.append(f"mlx_vlm.generate {model} {question} {_ENOUGH_TO_THINK} {sampling}")
    return lines


def _is_before(package: str, release: tuple[int, int]) -> bool:
    """Whether an older one is installed."""
    try:
        installed = version(package).split(".")
    except PackageNotFoundError:
        return False
    return tuple(int(part) for part in installed[:2]) < release


def memory_lines(memory: Memory) -> list[str]:
    """What to tell of :class:`Memory`."""
    costs = f"{memory.per_token:,} bytes per token, {memory.per_token_kv_8:,} with {_kv_bits(memory)}"
    lines = [f"context costs {costs}"]
    if memory.machine is None:
        return lines
    here = f"{size_in_words(memory.weights)} of weights, {size_in_words(memory.machine)} of memory here"
    if not memory.context_kv_8:
        return [*lines, f"does not fit this machine: {here}"]
    lines.append(
        f"{here}, {size_in_words(memory.reserve)} of it left to the rest: "
        f"{memory.context:,} tokens fit, {memory.context_kv_8:,} with {_kv_bits(memory)}"
    )
    if is_mac() and memory.wired_limit_mb is not None:
        lines.append(
            f"for the GPU to keep all that: sudo sysctl iogpu.wired_limit_mb={memory.wired_limit_mb}"
        )
    return lines


def _kv_bits(memory: Memory) -> str:
    return "--kv-bits 8" + ("" if memory.kv_group_size == 64 else f" --kv-group-size {memory.kv_group_size}")
