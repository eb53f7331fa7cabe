"""The last look before tensors go into a model: an error by module, not by the thousand lines."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .tensor import HasShape

_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_LINES = 15


# Shape and kind of dtype.
Stored = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class Differences:
    """Of tensors from what a model takes: names, and under ``wrong`` what is stored and what is wanted."""

    missing: set[str]
    left_over: set[str]
    wrong: dict[str, tuple[Stored, Stored]]


def as_stored(tensor: HasShape) -> Stored:
    return tuple(tensor.shape), kind_of(tensor.dtype)


def compare(tensors: Mapping[str, HasShape], expected: Mapping[str, Stored | None]) -> Differences:
    """Hold tensors, loaded or planned, against what a model takes; None takes any shape and dtype."""
    wrong = {}
    for name in tensors.keys() & expected.keys():
        has, wants = as_stored(tensors[name]), expected[name]
        if wants is not None and has != wants:
            wrong[name] = has, wants
    return Differences(expected.keys() - tensors.keys(), tensors.keys() - expected.keys(), wrong)


def check_weights(weights: Mapping[str, mx.array], parameters: Mapping[str, mx.array]) -> None:
    """Compare the tensors to load with the model's parameters.

    Raises:
        ValueError: tensors are missing, left over, or have another shape or kind of dtype than
            the model's.  Names that differ only in numbers are told in one line.
    """
    found = compare(weights, {name: as_stored(array) for name, array in parameters.items()})
    if not (found.missing or found.left_over or found.wrong):
        return
    shapes = [
        f"{name}: {has[0]} in the checkpoint, {wants[0]} in the model"
        for name, (has, wants) in found.wrong.items()
        if has[0] != wants[0]
    ]
    dtypes = [
        f"{name}: {_dtype(weights[name])} in the checkpoint, {_dtype(parameters[name])} in the model"
        for name, (has, wants) in found.wrong.items()
        if has[1] != wants[1]
    ]
    lines = ["these weights do not make a MiniMax-M3 text model (mlx-m3-plugin)."]
    lines += _section("missing", found.missing)
    lines += _section("left over", found.left_over)
    if shapes:
        lines += [f"of the wrong shape ({len(shapes)}):", *_shorten(sorted(shapes))]
    if dtypes:
        lines += [f"of the wrong dtype ({len(dtypes)}):", *_shorten(sorted(dtypes))]
    raise ValueError("\n".join(lines))


def check_values(model: nn.Module) -> None:
    """Look for values that are not numbers, where one of them spoils a whole row: in the scales
    and biases of quantized weights, and in norms.

    Reads them, so it is for weights that are to be in memory anyway, and one module at a time.

    Raises:
        ValueError: names the first tensors that hold such a value.
    """
    wrong = []
    for path, module in model.named_modules():
        suspects = {
            name: _not_numbers(array, getattr(module, "mode", None) if name == "scales" else None)
            for name, array in module.items()
            if isinstance(array, mx.array) and (name in _SMALL or array.ndim == 1)
        }
        mx.eval(suspects)
        wrong += [f"{path}.{name}" for name, count in suspects.items() if count.item()]
    if wrong:
        raise ValueError("\n".join(["these tensors hold values that are not numbers:", *_shorten(wrong)]))


# Parts of a quantized module besides its packed values.
_SMALL = ("scales", "biases", "global_scale")


def _not_numbers(array: mx.array, mode: str | None) -> mx.array:
    """How many values are NaN or infinite; 8-bit scales have codes of their own for that."""
    if mode in ("mxfp8", "mxfp4"):
        return (array == 255).sum()
    if mode == "nvfp4":
        return ((array & 127) == 127).sum()
    if not mx.issubdtype(array.dtype, mx.floating):
        return mx.array(0)
    return (~mx.isfinite(array)).sum()


def kind_of(dtype: Any) -> str:
    """Any float may stand for another; packed values and 8-bit scales are what they are."""
    name = str(dtype).removeprefix("mlx.core.")
    return "float" if "float" in name else name


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _section(title: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return [f"{title} ({len(names)}):", *_shorten(group_names(names))] if names else []


def _shorten(lines: list[str]) -> list[str]:
    more = len(lines) - _LINES
    return [f"  {line}" for line in lines[:_LINES]] + ([f"  ... and {more} more"] if more > 0 else [])


def group_names(names: Iterable[str]) -> list[str]:
    """One line per module: ``layers.{3-59}.block_sparse_moe.experts.{0-127}.w1.weight (7296)``."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        # Every second piece is a number.
        pieces = _NUMBER.split(name)
        groups.setdefault(tuple(pieces[::2]), []).append(tuple(int(n) for n in pieces[1::2]))
    lines = []
    for texts, numbers in sorted(groups.items()):
        ranges = [f".{_ranges(column)}" for column in zip(*numbers, strict=True)]
        line = "".join(text + range_ for text, range_ in zip_longest(texts, ranges, fillvalue=""))
        lines.append(line + (f" ({len(numbers)})" if len(numbers) > 1 else ""))
    return lines


def _ranges(numbers: Iterable[int]) -> str:
    """``{3-59}`` for consecutive numbers, ``{0-2,5}`` otherwise, a bare number for one."""
    ordered = sorted(set(numbers))
    runs: list[list[int]] = []
    for n in ordered:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return text if len(ordered) == 1 else f"{{{text}}}"
