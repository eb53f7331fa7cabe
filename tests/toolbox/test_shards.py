"""Files are read and written in pieces: macOS refuses more than 2^31 - 1 bytes at once."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_m3_plugin.toolbox import shards
from mlx_m3_plugin.toolbox.forward_pass import HiddenStates
from mlx_m3_plugin.toolbox.shards import NewTensor, ShardWriter
from mlx_m3_plugin.weights import byte_ranges
from mlx_m3_plugin.weights.byte_ranges import TensorReader
from mlx_m3_plugin.weights.headers import read_headers, weight_files
from mlx_m3_plugin.weights.tensor import Tensor
from tests.checkpoints.tiny_layouts import LAYOUTS

LIMIT = 1000


def test_a_piece_is_less_than_macos_refuses() -> None:
    assert shards.LARGEST_PIECE <= 1 << 30


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's calls refuse more than ``LIMIT`` bytes, in the place of 2^31 - 1."""
    names = [name for name in ("pread", "pwrite", "preadv", "pwritev") if hasattr(os, name)]
    originals = {name: getattr(os, name) for name in names}

    def limited(name: str, size_of: Callable[[Any], int]) -> Callable[..., Any]:
        def call(descriptor: int, what: Any, *rest: Any) -> Any:
            if size_of(what) > LIMIT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return originals[name](descriptor, what, *rest)

        return call

    sizes: dict[str, Callable[[Any], int]] = {"pread": int, "pwrite": len}
    replaced = {
        name: limited(name, sizes.get(name, lambda buffers: sum(map(len, buffers)))) for name in names
    }
    for module in (byte_ranges, shards):
        monkeypatch.setattr(module, "os", SimpleNamespace(**vars(os) | replaced))
        monkeypatch.setattr(module, "LARGEST_PIECE", LIMIT)


@pytest.mark.usefixtures("small_limit")
def test_a_large_tensor_is_read(tmp_path: Path) -> None:
    LAYOUTS["published_float"].write(tmp_path)
    headers = read_headers(tmp_path).tensors
    loaded = {name: array for file in weight_files(tmp_path) for name, array in mx.load(str(file)).items()}
    assert sum(tensor.nbytes > LIMIT for tensor in headers.values()) > 10
    with TensorReader(tmp_path, headers) as reader:
        for name, stored in headers.items():
            assert mx.array_equal(reader.read(Tensor.stored(name, stored)), loaded[name]), name


@pytest.mark.usefixtures("small_limit")
def test_a_large_tensor_is_written(tmp_path: Path) -> None:
    values = mx.array(np.random.default_rng(0).standard_normal((30, 700), np.float32))
    with ShardWriter(tmp_path / "x.safetensors", [NewTensor("x", (30, 700), mx.float32)]) as writer:
        writer.write("x", 10, values[10:])
        writer.write("x", 0, values[:10])
        writer.finish()
    assert mx.array_equal(mx.load(str(tmp_path / "x.safetensors"))["x"], values)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_hidden_states_are_written_and_read(tmp_path: Path, dtype: str) -> None:
    rows = mx.random.normal((9, 700)).astype(getattr(mx, dtype))
    hidden = HiddenStates(tmp_path / "states.bin", 700, dtype)
    hidden.write(0, rows[:4])
    hidden.write(4, rows[4:])
    assert mx.array_equal(hidden.read(2, 9), rows[2:])
    with pytest.raises(OSError, match=r"states\.bin is cut off"):
        hidden.read(2, 10)


def test_a_shard_with_a_gap_does_not_get_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, [NewTensor("x", (4, 8), mx.float32)]) as writer:
        writer.write("x", 0, mx.ones((3, 8)))
        with pytest.raises(ValueError, match=r"x\.safetensors: 32 bytes of its tensors were not written"):
            writer.finish()
    assert not path.exists()


def test_a_second_writer_does_not_touch_the_first_ones_file(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", [NewTensor("x", (4, 8), mx.float32)]
    with ShardWriter(path, tensors) as first:
        first.write("x", 0, mx.ones((4, 8)))
        with ShardWriter(path, tensors) as second:
            with pytest.raises(OSError, match=r"x\.safetensors\.unfinished: another process"):
                first.finish()
            assert not path.exists()
            second.write("x", 0, mx.ones((4, 8)) * 2)
            second.finish()
    assert mx.array_equal(mx.load(str(path))["x"], mx.ones((4, 8)) * 2)
