"""An :class:`~mlx_m3_plugin.toolbox.inspect.Inspection` as lines of at most a hundred columns."""

import textwrap
from collections.abc import Iterable, Sequence

from ...weights import shorten
from ..sizes import size_in_words
from . import running
from .describe import Component, bits_per_weight
from .inspection import Attention, Inspection
from .readers import Reader, Verdict

_COLUMNS = 100
_LABEL = 14
_MOST_PROBLEMS = 20


def lines_of(found: Inspection) -> list[str]:
    lines = [found.name, *_what_it_is(found)]
    if found.components:
        lines += ["", *_component_table(found.components)]
    lines += ["", *_reader_table(found.readers)]
    if found.memory is not None:
        lines += ["", "Memory", *_indented(running.memory_lines(found.memory))]
    if found.notes:
        lines += ["", "Notes", *_indented(found.notes)]
    if found.verified is not None:
        read = f"{_files(found.verified.files)}, {size_in_words(found.verified.bytes)}, read and compared"
        result = "not as written, see the problems" if found.verified.problems else "as written"
        lines += ["", "Checksums", *_indented([f"{read}: {result}"])]
    lines += ["", "Problems", *_indented(shorten(found.problems, _MOST_PROBLEMS) or ["none"])]
    if found.commands:
        lines += ["", "To run it", *map(_command, found.commands)]
        lines += _indented([f"(sampling as MiniMax recommends it: {running.WHY_SAMPLING})"])
    return lines


def _what_it_is(found: Inspection) -> list[str]:
    stored = (f"{d.dtype} {d.tensors:,} tensors, {size_in_words(d.bytes)}" for d in found.dtypes)
    size = f"{found.bytes:,} bytes ({size_in_words(found.bytes)})"
    facts = {
        "model type": found.model_type,
        "layout": "; ".join(found.layout.in_words()),
        "stored as": "; ".join(stored),
        "size": f"{found.tensors:,} tensors in {_files(found.files)}, {size}",
        "quantization": _quantization(found),
        "vision": "yes" if found.vision else "none",
    }
    if found.attention is not None:
        facts |= _attention(found.attention)
    return [line for label, fact in facts.items() for line in _fact(label, fact)]


def _files(count: int) -> str:
    return f"{count:,} {'file' if count == 1 else 'files'}"


def _quantization(found: Inspection) -> str:
    if found.components is None:
        parts = found.layout.foreign_parts
        return f"unclear ({', '.join(parts)})" if parts else "unclear"
    quantized = [p for p in found.precisions if p.group_size is not None]
    kept = [p for p in found.precisions if p.group_size is None]
    in_floats = ", ".join(f"{p} {_count(p.parameters)}" for p in kept)
    if not quantized:
        return f"none: {in_floats}"
    return ", ".join(f"{p} {_count(p.parameters)}" for p in quantized) + f"; not quantized: {in_floats}"


def _attention(attention: Attention) -> dict[str, str]:
    sparse, layers = attention.with_indexer, attention.layers
    indexer = f"{len(sparse)} of {layers} layers" + (f" ({_ranges(sparse)})" if sparse else "")
    budget = f"{attention.budget:,} tokens, {attention.blocks} blocks of {attention.block_size}"
    context = f"{attention.context:,} tokens"
    if attention.yarn is not None:
        factor, original = (
            attention.yarn.get("factor"),
            attention.yarn.get("original_max_position_embeddings"),
        )
        context += f", by YaRN ({factor} x {original})"
    return {"indexer": indexer, "block budget": budget, "context": context}


def _component_table(components: Sequence[Component]) -> list[str]:
    rows = [("Component", "parameters", "bytes", "bits/weight", "stored as")]
    for c in components:
        rows.append((c.name, *_amounts(c.parameters, c.bytes), ", ".join(c.stored_as).replace("affine ", "")))
    parameters, size = sum(c.parameters for c in components), sum(c.bytes for c in components)
    rows.append(("total", *_amounts(parameters, size), ""))
    names, *numbers = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, *cells, stored_as in rows:
        aligned = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, numbers, strict=True))
        line = f"{name:{names}}  {aligned}  "
        lines.append((line + textwrap.shorten(stored_as, _COLUMNS - len(line), placeholder=" ...")).rstrip())
    return lines


def _amounts(parameters: int, size: int) -> tuple[str, str, str]:
    bits = bits_per_weight(size, parameters)
    return f"{parameters:,}", f"{size:,}", "" if bits is None else f"{bits:.2f}"


def _reader_table(readers: Sequence[Reader]) -> list[str]:
    names = [f"{r.library} {r.version}" + ("" if r.installed else " (not installed)") for r in readers]
    width = max(map(len, names))
    lines = ["Opens with"]
    for name, reader in zip(names, readers, strict=True):
        without = f"  {name:{width}}  without the plugin  "
        lines += _wrapped(_verdict(reader.without_plugin), without, " " * len(without))
        lines.append(f"  {'':{width}}  with the plugin     {_verdict(reader.with_plugin)}")
    return lines


def _verdict(verdict: Verdict) -> str:
    if verdict.not_yet:
        return "not yet: as without"
    return "yes" if verdict.opens else f"no: {verdict.reason}"


def _command(command: str) -> str:
    """In two lines where one is too long, and ready to paste all the same."""
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
    # Paths and names of tensors stay in one piece.
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )
