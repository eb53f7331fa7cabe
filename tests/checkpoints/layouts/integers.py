"""Integers as compressed-tensors packs them, made with numpy alone."""

import mlx.core as mx
import numpy as np

from .source import Weights


def integers(array: mx.array, bits: int) -> tuple[Weights, mx.array]:
    """Of both signs, stored with half of their range added."""
    groups, half = _groups(array), 2 ** (bits - 1)
    scales = (np.abs(groups).max(-1, keepdims=True) / (half - 1)).astype(np.float32)
    values = np.clip(np.round(groups / scales), -half, half - 1)
    stored = {
        "weight_packed": _pack((values + half).reshape(array.shape), bits),
        "weight_scale": mx.array(scales[..., 0]),
        "weight_shape": mx.array(list(array.shape), mx.int64),
    }
    return stored, mx.array((values * scales).reshape(array.shape).astype(np.float32))


def with_zero_points(array: mx.array, bits: int) -> tuple[Weights, mx.array]:
    """Zero points are packed along the rows of the matrix."""
    groups, largest = _groups(array), 2**bits - 1
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scales = ((high - low) / largest).astype(np.float32)
    zeros = np.clip(np.round(-low / scales), 0, largest)
    values = np.clip(np.round(groups / scales) + zeros, 0, largest)
    stored = {
        "weight_packed": _pack(values.reshape(array.shape), bits),
        "weight_scale": mx.array(scales[..., 0]),
        "weight_zero_point": _pack(zeros[..., 0].T, bits).T,
        "weight_shape": mx.array(list(array.shape), mx.int64),
    }
    return stored, mx.array(((values - zeros) * scales).reshape(array.shape).astype(np.float32))


def _groups(array: mx.array) -> np.ndarray:
    return np.array(array).reshape(array.shape[0], -1, 32)


def _pack(values: np.ndarray, bits: int) -> mx.array:
    """Into int32 along the last axis, the first in the lowest bits."""
    words = values.astype(np.uint32).reshape(*values.shape[:-1], -1, 32 // bits)
    packed = (words << np.arange(0, 32, bits, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return mx.array(packed.view(np.int32))
