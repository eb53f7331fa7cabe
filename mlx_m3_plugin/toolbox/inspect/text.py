"""An :class:`Inspection` as lines of at most a hundred columns."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from ...weights import shorten
from ..common import size_in_words
from ..memory import Memory, is_mac
from . import AttentionSummary, Inspection
from .layout import Component, bits_per_weight

_COLUMNS = 100
_LABEL = 14
_MOST_PROBLEMS = 20
_WHY_SAMPLING = (
    "(with the sampling that MiniMax recommends: greedy decoding, the default of these commands, can make "
    "low-bit weights repeat themselves while thinking)"
)


def lines_of(found: Inspection) -> list[str]:
    lines = [found.name, *_what_it_is(found)]
    if found.components:
        lines += ["", *_component_table(found.components)]
    if found.memory is not None:
        lines += ["", "Memory", *_indented(memory_lines(found.memory))]
    if found.notes:
        lines += ["", "Notes", *_indented(found.notes)]
    if found.verified is not None:
        read = f"{_files(found.verified.files)}, {size_in_words(found.verified.bytes)}, read and compared"
        result = "they differ, see the problems" if found.verified.problems else "all match"
        lines += ["", "Checksums", *_indented([f"{read}: {result}"])]
    lines += ["", "Problems", *_indented(shorten(found.problems, _MOST_PROBLEMS) or ["none"])]
    if found.commands:
        lines += ["", "To run it", *map(_command, found.commands), *_indented([_WHY_SAMPLING])]
    return lines


def _what_it_is(found: Inspection) -> list[str]:
    stored = (f"{d.dtype} {d.tensors:,} tensors, {size_in_words(d.bytes)}" for d in found.dtypes)
    size = f"{found.bytes:,} bytes ({size_in_words(found.bytes)})"
    facts = {
        "model type": found.model_type,
        "layout": "; ".join(found.layout.in_words()),
        "opens in": _opens(found.opens),
        "stored as": "; ".join(stored),
        "size": f"{found.tensors:,} tensors in {_files(found.files)}, {size}",
        "quantization": _quantization(found),
        "vision": "yes" if found.vision else "none",
    }
    if found.attention is not None:
        facts |= _attention(found.attention)
    return [line for label, fact in facts.items() for line in _fact(label, fact)]


def _opens(opens: Mapping[str, bool]) -> str:
    yes, no = ([library for library in opens if opens[library] == answer] for answer in (True, False))
    parts = [f"{' and '.join(yes)}, with this plugin"] if yes else []
    parts += [f"not in {' and '.join(no)}: see the problems below"] if no else []
    return "; ".join(parts)


def _files(count: int) -> str:
    return f"{count:,} {'file' if count == 1 else 'files'}"


def _quantization(found: Inspection) -> str:
    if found.components is None:
        parts = found.layout.foreign_parts
        return f"unknown ({', '.join(parts)})" if parts else "unknown"
    quantized = [p for p in found.precisions if p.group_size is not None]
    kept = [p for p in found.precisions if p.group_size is None]
    unquantized = ", ".join(f"{p} {_count(p.parameters)}" for p in kept)
    if not quantized:
        return f"none: {unquantized}"
    return ", ".join(f"{p} {_count(p.parameters)}" for p in quantized) + f"; not quantized: {unquantized}"


def _attention(attention: AttentionSummary) -> dict[str, str]:
    sparse, layers = attention.with_indexer, attention.layers
    indexer = f"{len(sparse)} of {layers} layers" + (f" ({_ranges(sparse)})" if sparse else "")
    budget = f"{attention.budget:,} tokens, {attention.blocks} blocks of {attention.block_size}"
    context = f"{attention.context:,} tokens"
    if attention.yarn is not None:
        factor, original = map(attention.yarn.get, ("factor", "original_max_position_embeddings"))
        context += f", by YaRN ({factor} x {original})"
    return {"indexer": indexer, "block budget": budget, "context": context}


def _component_table(components: Sequence[Component]) -> list[str]:
    table = [("Component", "parameters", "bytes", "bits/weight", "stored as")]
    for c in components:
        table.append(
            (c.name, *_amounts(c.parameters, c.bytes), ", ".join(c.stored_as).replace("affine ", ""))
        )
    parameters, size = sum(c.parameters for c in components), sum(c.bytes for c in components)
    table.append(("total", *_amounts(parameters, size), ""))
    names, *numbers = [max(len(line[column]) for line in table) for column in range(4)]
    lines = []
    for name, *cells, stored_as in table:
        aligned = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, numbers, strict=True))
        line = f"{name:{names}}  {aligned}  "
        lines.append((line + textwrap.shorten(stored_as, _COLUMNS - len(line), placeholder=" ...")).rstrip())
    return lines


def _amounts(parameters: int, size: int) -> tuple[str, str, str]:
    bits = bits_per_weight(size, parameters)
    return f"{parameters:,}", f"{size:,}", "" if bits is None else f"{bits:.2f}"


def memory_lines(memory: Memory) -> list[str]:
    kv_8 = "--kv-bits 8" + ("" if memory.kv_group_size == 64 else f" --kv-group-size {memory.kv_group_size}")
    lines = [f"context costs {memory.per_token:,} bytes per token, {memory.per_token_kv_8:,} with {kv_8}"]
    if memory.machine is None:
        return lines
    here = f"{size_in_words(memory.weights)} of weights, {size_in_words(memory.machine)} of memory here"
    if not memory.context_kv_8:
        return [*lines, f"does not fit this machine: {here}"]
    lines.append(
        f"{here}, {size_in_words(memory.reserve)} of it reserved for the system: "
        f"{memory.context:,} tokens fit, {memory.context_kv_8:,} with {kv_8}"
    )
    if is_mac() and memory.wired_limit_mb is not None:
        lines.append(
            f"to let the GPU use that much: sudo sysctl iogpu.wired_limit_mb={memory.wired_limit_mb}"
        )
    return lines


def _command(command: str) -> str:
    """On two lines if one is too long, still ready to paste."""
    line = f"  {command}"
    return line if len(line) <= _COLUMNS else line.replace(" --max-tokens", " \\\n    --max-tokens")


def _count(count: int) -> str:
    return next(
        (f"{count / n:,.3f} {unit}" for n, unit in ((10**9, "B"), (10**6, "M")) if count >= n), f"{count:,}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """``3-59``, or ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _fact(label: str, fact: str) -> list[str]:
    return _wrapped(fact, f"  {label:{_LABEL}}", " " * (_LABEL + 2))


def _indented(lines: Iterable[str]) -> list[str]:
    return [wrapped for line in lines for wrapped in _wrapped(line, "  ", "    ")]


def _wrapped(text: str, first: str, following: str) -> list[str]:
    # Paths and tensor names are not broken.
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )
