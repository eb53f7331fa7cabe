"""The table of dtypes is what MLX itself writes and reads."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_m3_plugin.weights.dtypes import MLX_DTYPES, STORED_NAMES, from_bytes, to_bytes
from mlx_m3_plugin.weights.headers import read_header

# MLX has no arrays of float64 on all devices.
DTYPES = [dtype for dtype in STORED_NAMES if dtype not in (mx.float64, mx.complex64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_is_stored_as_mlx_stores_it(dtype: mx.Dtype, tmp_path: Path) -> None:
    array = mx.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    file = tmp_path / "x.safetensors"
    mx.save_safetensors(str(file), {"x": array})
    stored = read_header(file)["x"]
    assert (stored.stored_dtype, stored.dtype, stored.nbytes) == (STORED_NAMES[dtype], dtype, array.nbytes)
    data = file.read_bytes()[stored.start :]
    assert to_bytes(array) == data
    assert from_bytes(data, array.shape, dtype).dtype == dtype
    assert mx.array_equal(from_bytes(data, array.shape, dtype), array)


def test_eight_bit_floats_are_read_as_their_bytes() -> None:
    assert MLX_DTYPES["F8_E4M3"] == mx.uint8
    assert STORED_NAMES[mx.uint8] == "U8"
