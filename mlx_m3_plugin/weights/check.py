"""The check before tensors go into a model.  Its errors name modules, not thousands of tensors."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

import mlx.core as mx
import mlx.nn as nn

from .dtypes import name_of
from .quantization import PARTS
from .tensor import HasShape

_NUMBER = re.compile(r"\.(\d+)(?=\.)")

ShapeAndKind = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class Differences:
    """Names of tensors that a model does not have, or lacks; of ``wrong`` also (stored, wanted)."""

    missing: set[str]
    left_over: set[str]
    wrong: dict[str, tuple[ShapeAndKind, ShapeAndKind]]


def shape_and_kind(tensor: HasShape) -> ShapeAndKind:
    return tuple(tensor.shape), kind_of(tensor.dtype)


def compare(tensors: Mapping[str, HasShape], expected: Mapping[str, ShapeAndKind | None]) -> Differences:
    """Compare tensors, loaded or planned, with what a model takes; None takes any shape and dtype."""
    wrong = {}
    for name in tensors.keys() & expected.keys():
        has, wants = shape_and_kind(tensors[name]), expected[name]
        if wants is not None and has != wants:
            wrong[name] = has, wants
    return Differences(expected.keys() - tensors.keys(), tensors.keys() - expected.keys(), wrong)


def check_weights(weights: Mapping[str, mx.array], parameters: Mapping[str, mx.array]) -> None:
    """Compare the tensors to load with the model's parameters.

    Raises:
        ValueError: tensors are missing, left over, or have another shape or kind of dtype than
            the model's.  Names that differ only in numbers share a line.
    """
    found = compare(weights, {name: shape_and_kind(array) for name, array in parameters.items()})
    shapes, dtypes = [], []
    for name, (has, wants) in sorted(found.wrong.items()):
        if has[0] != wants[0]:
            shapes.append(f"{name}: {has[0]} in the checkpoint, {wants[0]} in the model")
        if has[1] != wants[1]:
            stored, held = (name_of(arrays[name].dtype) for arrays in (weights, parameters))
            dtypes.append(f"{name}: {stored} in the checkpoint, {held} in the model")
    sections = [
        *_section("missing", len(found.missing), group_names(found.missing)),
        *_section("left over", len(found.left_over), group_names(found.left_over)),
        *_section("of the wrong shape", len(shapes), shapes),
        *_section("of the wrong dtype", len(dtypes), dtypes),
    ]
    if sections:
        head = "these weights do not fit this MiniMax-M3 model (mlx-m3-plugin)"
        raise ValueError("\n".join([head, *sections]))


def check_values(model: nn.Module) -> None:
    """Look for NaN and infinity where one of them spoils many outputs: in the scales and
    biases of quantized weights, and in norms.

    Reads them, one module at a time, so call it for weights that are going to be in memory anyway.

    Raises:
        ValueError: names the first tensors that hold such a value.
    """
    wrong = []
    for path, module in model.named_modules():
        suspects = {
            name: _not_numbers(array, getattr(module, "mode", None) if name == "scales" else None)
            for name, array in module.items()
            if isinstance(array, mx.array) and (name in PARTS[1:] or array.ndim == 1)
        }
        mx.eval(suspects)
        wrong += [f"{path}.{name}" for name, count in suspects.items() if count.item()]
    if wrong:
        raise ValueError("\n".join(_section("these tensors hold NaN or infinity", len(wrong), wrong)))


def _not_numbers(array: mx.array, mode: str | None) -> mx.array:
    """How many values are NaN or infinite; 8-bit scales have codes for that."""
    if mode in ("mxfp8", "mxfp4"):
        return (array == 255).sum()
    if mode == "nvfp4":
        return ((array & 127) == 127).sum()
    if not mx.issubdtype(array.dtype, mx.floating):
        return mx.array(0)
    return (~mx.isfinite(array)).sum()


def kind_of(dtype: mx.Dtype) -> str:
    """Any float may stand for another; packed values and 8-bit scales may not."""
    return "float" if mx.issubdtype(dtype, mx.floating) else name_of(dtype)


def _section(title: str, count: int, lines: Sequence[str]) -> list[str]:
    return [f"{title} ({count}):", *(f"  {line}" for line in shorten(lines, 15))] if lines else []


def shorten(lines: Sequence[str], most: int = 10) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - most
    return [*lines[:most], *([f"... and {more} more"] if more > 0 else [])]


def group_names(names: Iterable[str]) -> list[str]:
    """One line per module: ``layers.{3-59}.block_sparse_moe.experts.{0-127}.w1.weight (7296)``."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        # Every second piece is a number.
        pieces = _NUMBER.split(name)
        groups.setdefault(tuple(pieces[::2]), []).append(tuple(int(n) for n in pieces[1::2]))
    lines = []
    for texts, numbers in sorted(groups.items()):
        ranges = [f".{_in_braces(column)}" for column in zip(*numbers, strict=True)]
        line = "".join(text + range_ for text, range_ in zip_longest(texts, ranges, fillvalue=""))
        lines.append(line + (f" ({len(numbers)})" if len(numbers) > 1 else ""))
    return lines


def _in_braces(numbers: Iterable[int]) -> str:
    """``{3-59}`` for consecutive numbers, ``{0-2,5}`` otherwise, a bare number for one."""
    text = ",".join(ranges_of(numbers))
    return text if text.isdigit() else f"{{{text}}}"


def ranges_of(numbers: Iterable[int]) -> list[str]:
    """``["0-2", "5"]``."""
    # In a run of consecutive numbers, each differs from its place by the same.
    runs = groupby(enumerate(sorted(set(numbers))), lambda item: item[1] - item[0])
    ends = [(run[0][1], run[-1][1]) for run in ([*items] for _, items in runs)]
    return [str(first) if first == last else f"{first}-{last}" for first, last in ends]
