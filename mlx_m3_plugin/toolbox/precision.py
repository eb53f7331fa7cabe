"""How a matrix is stored, and conversions from one way to another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..model.tensor_scales import factor, scale_shape


@dataclass(frozen=True)
class Quantization:
    """How a matrix is stored: quantized by MLX, or in a float dtype.

    Attributes:
        bits, group_size, mode: of ``mx.quantize``; bits is None for floats.
        dtype: ``bfloat16``, ``float16``, ``float32``, or ``keep`` for the one it has.
        tensor_scales: of NVFP4, one more float32 scale for each matrix, which is kept or dropped, never made.
    """

    bits: int | None = None
    group_size: int = 64
    mode: str = "affine"
    dtype: str = "keep"
    tensor_scales: bool = False

    def bytes_of(self, size: int, itemsize: int = 2) -> int:
        """Of a matrix with ``size`` elements; ``itemsize``: bytes of its floats, or of its scales."""
        if self.bits is None:
            return size * (4 if self.dtype == "float32" else itemsize if self.dtype == "keep" else 2)
        per_group = 2 * itemsize if self.mode == "affine" else 1
        return size * self.bits // 8 + size // self.group_size * per_group

    def parts(self, shape: tuple[int, ...], dtype: mx.Dtype) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Part -> shape and dtype of a matrix, or a stack of them, ``[..., inputs]``.

        ``dtype``: of the floats that it was made from, and of affine scales.
        """
        if self.bits is None:
            return {"weight": (shape, dtype if self.dtype == "keep" else getattr(mx, self.dtype))}
        *rows, inputs = shape
        scales = (*rows, inputs // self.group_size), dtype if self.mode == "affine" else mx.uint8
        found = {"weight": ((*rows, inputs * self.bits // 32), mx.uint32), "scales": scales}
        if self.tensor_scales:
            found["global_scale"] = scale_shape(shape), mx.float32
        return {**found, "biases": scales} if self.mode == "affine" else found

    def as_quantization(self) -> dict[str, Any]:
        """The arguments of ``mx.quantize``."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def in_config(self) -> dict[str, Any]:
        """As in a config's ``quantization``."""
        words = self.as_quantization()
        return words | {"global_scale": True} if self.tensor_scales else words

    def __str__(self) -> str:
        if self.bits is None:
            return "as stored" if self.dtype == "keep" else self.dtype
        if self.mode == "affine":
            return f"{self.bits}-bit g{self.group_size}"
        return f"{self.mode} with tensor scales" if self.tensor_scales else self.mode


def converted(
    stored: Mapping[str, mx.array], source: Quantization, spec: Quantization
) -> dict[str, mx.array]:
    """A matrix, or some of its rows, stored like ``spec`` instead of like ``source``.  Lazy."""
    values = dequantized(stored, source)
    if spec.bits is None:
        return {"weight": values if spec.dtype == "keep" else values.astype(getattr(mx, spec.dtype))}
    made = mx.quantize(values, **spec.as_quantization())
    return dict(zip(("weight", "scales", "biases"), made, strict=False))


def dequantized(stored: Mapping[str, mx.array], source: Quantization, in_float32: bool = False) -> mx.array:
    """The values of a matrix, or of a stack of them; ``in_float32`` without rounding them to 16 bits."""
    if in_float32:
        stored = {
            part: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
            for part, array in stored.items()
        }
    if source.bits is None:
        return stored["weight"]
    parts = stored["weight"], stored["scales"], stored.get("biases")
    values = mx.dequantize(*parts, **source.as_quantization())
    if in_float32:
        # Without biases (MXFP8, MXFP4, NVFP4) they have few enough bits to be exact in bfloat16.
        values = values.astype(mx.float32)
    if "global_scale" not in stored:
        return values
    # One scale for all rows and columns of each matrix.
    values = values * factor(stored["global_scale"])[..., None, None]
    return values if in_float32 else values.astype(mx.bfloat16)


def computes_in_float32() -> bool:
    """Whether forward passes compute in float32, also with 16-bit and quantized weights.

    MLX's CPU kernels for quantized matrices add up 16-bit products in 16 bits.  A sum of thousands is off by
    as much as its value.  For many tokens they are also slower than a product in float32.
    """
    return bool(mx.default_device() == mx.cpu)
