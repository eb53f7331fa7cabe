"""What goes wrong with a disk ends in an error that names the file and the tensor, and in no wrong token."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_m3_plugin.offload.slots import Slots
from mlx_m3_plugin.weights import byte_ranges
from mlx_m3_plugin.weights.headers import read_headers
from tests.checkpoints.tiny_layouts import LAYOUTS
from tests.offload.disk_models import assert_same_bits, load_on_disk, load_with, logits, memory_for

TOKENS = np.random.default_rng(5).integers(0, 600, (2, 60))
LENGTHS = [40, 1, 1, 8]
Read = Callable[[int, list[memoryview], int], int]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    LAYOUTS["mlx_unfused_4bit"].write(tmp_path)
    return tmp_path


@pytest.fixture
def pair(directory: Path) -> tuple[Any, Any]:
    resident = load_with("mlx_lm", directory)
    return resident, load_on_disk("mlx_lm", directory, memory_for(resident, 2))


def reads_with(monkeypatch: pytest.MonkeyPatch, read: Read) -> None:
    monkeypatch.setattr(byte_ranges, "os", SimpleNamespace(**vars(os) | {"preadv": read}))


def test_short_reads(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def short(descriptor: int, buffers: list[memoryview], start: int) -> int:
        calls.append(start)
        return os.preadv(descriptor, [buffers[0][: 1 + len(buffers[0]) // 3]], start)

    reads_with(monkeypatch, short)
    assert_same_bits(*pair, TOKENS, LENGTHS)
    assert len(calls) > 100


def test_a_disk_that_fails_for_a_while(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read may fail; a model that has seen the error goes on rightly."""
    resident, on_disk = pair
    good, failed = [10], []

    def failing(descriptor: int, buffers: list[memoryview], start: int) -> int:
        good[0] -= 1
        if good[0] < 0:
            buffers[0][:4] = b"junk"
            failed.append(start)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, start)

    with monkeypatch.context() as patch:
        reads_with(patch, failing)
        for good_reads in (10, 3, 0, 1):
            good[0] = good_reads
            message = r"model.*\.safetensors: cannot read .*switch_mlp.*: Input/output error"
            with pytest.raises(OSError, match=message):
                mx.eval(logits(on_disk, TOKENS))
    assert failed
    assert_same_bits(resident, on_disk, TOKENS, LENGTHS)


def test_a_file_that_is_cut_off_and_one_that_vanishes(pair: tuple[Any, Any], directory: Path) -> None:
    resident, on_disk = pair
    mx.eval(logits(resident, TOKENS))
    files = {path: shutil.copy(path, f"{path}.copy") for path in directory.glob("model*.safetensors")}
    for path in files:
        os.truncate(path, 100)
    with pytest.raises(OSError, match=r"cannot read .*: the file ends [\d,]+ bytes before the tensor does"):
        mx.eval(logits(on_disk, TOKENS))
    for path, copy in files.items():
        path.write_bytes(Path(copy).read_bytes())
        path.unlink()
        path.write_bytes(b"another file of this name")
    # The files that were opened are still there.
    assert_same_bits(resident, on_disk, TOKENS, LENGTHS)


def test_ctrl_c(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """While reads are on the way."""
    resident, on_disk = pair
    left, wait = [0], Slots.wait

    def interrupted(slots: Slots, wanted: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        wait(slots, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "wait", interrupted)
        for number in (4, 2, 1):
            left[0] = number
            with pytest.raises(KeyboardInterrupt):
                mx.eval(logits(on_disk, TOKENS))
    assert_same_bits(resident, on_disk, TOKENS, LENGTHS)


@pytest.mark.parametrize("layout", ["mlx_unfused_4bit", "mxfp8_official"])
def test_nan_in_scales(layout: str, tmp_path: Path) -> None:
    """A resident model is not even loaded."""
    LAYOUTS[layout].write(tmp_path)
    resident = load_with("mlx_lm", tmp_path)
    headers = read_headers(tmp_path).tensors
    name = next(n for n in headers if "scale" in n and ("experts.1." in n or "switch_mlp" in n))
    tensor = headers[name]
    with (tmp_path / tensor.file).open("r+b") as file:
        file.seek(tensor.start)
        file.write(b"\xff" * 4)
    with pytest.raises(ValueError, match=r"hold NaN"):
        load_with("mlx_lm", tmp_path)
    on_disk = load_on_disk("mlx_lm", tmp_path, memory_for(resident, 2))
    with pytest.raises(ValueError, match=rf"{name} holds NaN or infinity"):
        mx.eval(logits(on_disk, TOKENS))
