"""How to run a checkpoint with the stock commands, and how much context fits into memory."""

import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ...model.config import TextConfig
from ..sizes import size_in_words

_GIB = 1 << 30
# For the system and for the working memory of a prompt's chunk.
_LEAST_RESERVE = 8 * _GIB
_RESERVED_SHARE = 1 / 16
# What macOS lets the GPU keep in memory, unless it is told otherwise.
_WIRED_SHARE = 0.75

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
    """

    weights: int
    per_token: int
    per_token_kv_8: int
    kv_group_size: int
    machine: int | None
    reserve: int
    context: int
    context_kv_8: int


def memory_for(config: TextConfig, weights: int, sparse_layers: int, machine: int | None) -> Memory:
    """``sparse_layers``: how many layers keep index keys beside K and V."""
    kv_16, kv_8 = bytes_per_token(config, sparse_layers), bytes_per_token(config, sparse_layers, 8)
    group_size = kv_group_size(config)
    reserve = max(_LEAST_RESERVE, int((machine or 0) * _RESERVED_SHARE))
    free = max(0, (machine or 0) - weights - reserve)
    most = config.max_position_embeddings
    return Memory(
        weights, kv_16, kv_8, group_size, machine, reserve, min(most, free // kv_16), min(most, free // kv_8)
    )


def bytes_per_token(config: TextConfig, sparse_layers: int, kv_bits: int | None = None) -> int:
    """What a token of context takes in the cache; ``kv_bits`` None is 16 bits."""
    keys_values = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    # Never quantized.
    index_keys = 2 * sparse_layers * config.index_head_dim
    if kv_bits is None:
        return 2 * keys_values + index_keys
    # A scale and a bias of 16 bits for each group.
    return keys_values * kv_bits // 8 + keys_values // kv_group_size(config) * 4 + index_keys


def kv_group_size(config: TextConfig) -> int:
    return 64 if config.head_dim % 64 == 0 else 32


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
    if sys.platform == "darwin" and memory.weights > _WIRED_SHARE * memory.machine:
        megabytes = (memory.machine - memory.reserve) >> 20
        lines.append(f"for the GPU to keep it all: sudo sysctl iogpu.wired_limit_mb={megabytes}")
    return lines


def _kv_bits(memory: Memory) -> str:
    return "--kv-bits 8" + ("" if memory.kv_group_size == 64 else f" --kv-group-size {memory.kv_group_size}")
