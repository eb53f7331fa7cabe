"""The parameters that a model of a config has, how they are stored, and what is wrong with them.

Names are the published ones without a prefix, shapes those before any quantization.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...model.tensor_scales import scale_shape
from ...weights import group_names, infer_quantization
from ...weights.check import Stored, compare
from ...weights.shapes import Shapes
from ...weights.tensor import Tensor

_PACKED, _FLOAT = "uint32", "float"


@dataclass
class Precision:
    """One way in which weights are stored: quantized, with ``bits`` and ``group_size``, or as floats."""

    mode: str
    bits: int
    group_size: int | None
    modules: int = 0
    parameters: int = 0

    def __str__(self) -> str:
        return f"affine {self.bits}-bit g{self.group_size}" if self.mode == "affine" else self.mode


@dataclass
class _Shape:
    """What quantization is inferred from besides the stored parts."""

    shape: tuple[int, ...]
    dtype: Any = None


def quantized_modules(plan: Mapping[str, Tensor], shapes: Shapes) -> tuple[dict[str, Precision], list[str]]:
    """How each quantized module of ``shapes`` is, and a line for each that MLX could not have quantized."""
    quantized, problems = {}, []
    for name, scales in plan.items():
        module = name.removesuffix(".scales")
        weight = f"{module}.weight"
        if module == name or weight not in plan or weight not in shapes:
            continue
        parts = {weight: plan[weight], name: scales}
        try:
            found = infer_quantization(parts, {weight: _Shape(shapes[weight])})
        except (ValueError, IndexError, ZeroDivisionError) as error:
            problems.append(str(error))
            continue
        if found is not None:
            quantized[module] = Precision(found["mode"], found["bits"], found["group_size"])
    return quantized, problems


def differences(
    plan: Mapping[str, Tensor], shapes: Shapes, quantized: Mapping[str, Precision], prefix: str = ""
) -> list[str]:
    """What is missing, left over, or of another shape or kind of dtype, one line for each kind of module.

    Args:
        quantized: the modules that are, by their paths.
        prefix: what the model puts before the names of parameters, for those that are missing.
    """
    found = compare(plan, expected_parameters(plan, shapes, quantized))
    missing = group_names(prefix + name for name in found.missing)
    left_over = group_names(stored for name in found.left_over for stored in plan[name].stored_names())
    wrong: dict[str, list[str]] = defaultdict(list)
    for name, (has, wants) in found.wrong.items():
        wrong[f"is {_told(has)}, not {_told(wants)}"].append(prefix + name)
    return [
        *(f"missing: {line}" for line in missing),
        *(f"left over: {line}" for line in left_over),
        *(f"{line} {how}" for how, names in sorted(wrong.items()) for line in group_names(names)),
    ]


def expected_parameters(
    plan: Mapping[str, Tensor], shapes: Shapes, quantized: Mapping[str, Precision]
) -> dict[str, Stored | None]:
    """What a model of these shapes that is quantized so takes: the parameters of the loaded model.

    Returns:
        Name -> shape and kind of dtype; None where its quantization is wrong, which is reported elsewhere.
    """
    expected: dict[str, Stored | None] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        how = quantized.get(module)
        if how is None or how.group_size is None:
            if name in plan and f"{module}.scales" in plan:
                parts = (name, f"{module}.scales", f"{module}.biases", f"{module}.global_scale")
                expected |= dict.fromkeys(part for part in parts if part in plan)
            else:
                expected[name] = shape, _FLOAT
            continue
        *rows, width = shape
        groups = (*rows, width // how.group_size)
        expected[name] = (*rows, width * how.bits // 32), _PACKED
        expected[f"{module}.scales"] = groups, _FLOAT if how.mode == "affine" else "uint8"
        if how.mode == "affine":
            expected[f"{module}.biases"] = groups, _FLOAT
        if how.mode == "nvfp4" and f"{module}.global_scale" in plan:
            expected[f"{module}.global_scale"] = scale_shape(shape), _FLOAT
    return expected


def _told(stored: Stored) -> str:
    shape, kind = stored
    return f"{kind}{list(shape)}"
