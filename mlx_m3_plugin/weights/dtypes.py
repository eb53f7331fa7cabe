"""Dtypes: what safetensors calls each of them, what MLX makes of it, and how its elements are bytes."""

import json
import math
from functools import cache
from io import BytesIO
from typing import Any

import mlx.core as mx
import numpy as np

# safetensors' name -> the dtype that ``mx.load`` gives.  MLX has no 8-bit floats: it gives their bytes.
# It reads no other dtype; F8_E8M0 not before MLX 0.32.
FLOAT8, EXPONENTS = "F8_E4M3", "F8_E8M0"
MLX_DTYPES: dict[str, mx.Dtype] = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U64": mx.uint64,
    "I64": mx.int64,
    FLOAT8: mx.uint8,
    EXPONENTS: mx.uint8,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
    "C64": mx.complex64,
}
# The name under which a dtype is written.
STORED_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items() if name not in (FLOAT8, EXPONENTS)}


@cache
def mlx_reads(stored_dtype: str) -> bool:
    """Whether the installed MLX loads tensors of this dtype.  until: mlx 0.32"""
    header = json.dumps({"x": {"dtype": stored_dtype, "shape": [0], "data_offsets": [0, 0]}}).encode()
    file = BytesIO(len(header).to_bytes(8, "little") + header)
    try:
        mx.load(file, format="safetensors")
    except (RuntimeError, ValueError):
        return False
    return True


def name_of(dtype: mx.Dtype) -> str:
    """``bfloat16``, as in ``mx.bfloat16``."""
    return str(dtype).removeprefix("mlx.core.")


def from_bytes(data: bytes | bytearray, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array of the little-endian elements in ``data``."""
    return mx.array(np.frombuffer(data, _numpy(dtype)).reshape(shape)).view(dtype)


def to_bytes(array: mx.array) -> bytes:
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(raw, copy=False), _numpy(array.dtype)).tobytes()


def _numpy(dtype: mx.Dtype) -> "np.dtype[Any]":
    # numpy has no bfloat16.
    return np.dtype("uint16" if dtype == mx.bfloat16 else name_of(dtype)).newbyteorder("<")


def size_in_bytes(shape: tuple[int, ...], dtype: mx.Dtype) -> int:
    return math.prod(shape) * dtype.size
