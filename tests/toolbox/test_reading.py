"""Tensors read by their bytes equal those that MLX loads; what is taken of a plan equals its rows."""

import json
import random
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_m3_plugin.model.config import text_config_of
from mlx_m3_plugin.weights.byte_ranges import TensorReader
from mlx_m3_plugin.weights.headers import MODEL_TYPES, read_headers, weight_files
from mlx_m3_plugin.weights.layouts import plan_layout
from mlx_m3_plugin.weights.tensor import Tensor
from tests.checkpoints.conversions import Written
from tests.checkpoints.tiny_layouts import LAYOUTS


def planned(directory: Path) -> dict[str, Tensor]:
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] in MODEL_TYPES
    return plan_layout(read_headers(directory).tensors, text_config_of(config), "", vision=True)


def loaded(directory: Path) -> dict[str, mx.array]:
    return {name: array for file in weight_files(directory) for name, array in mx.load(str(file)).items()}


def same(one: mx.array, other: mx.array) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and mx.array_equal(one, other, equal_nan=True)
    )


def test_what_is_read_is_what_mlx_loads(layout_name: str, tiny: Written, fresh_seed: int) -> None:
    directory = tiny(layout_name)
    plan, weights, rng = planned(directory), loaded(directory), random.Random(fresh_seed)
    with TensorReader(directory, read_headers(directory).tensors) as reader:
        for name, tensor in plan.items():
            whole = tensor.make(weights)
            assert same(reader.read(tensor), whole), name
            for axis in range(len(tensor.shape) - 1):
                start = rng.randrange(tensor.shape[axis])
                stop = rng.randint(start + 1, tensor.shape[axis])
                part = tensor.taken(start, stop, axis)
                index = (slice(None),) * axis + (slice(start, stop),)
                assert part.shape == whole[index].shape
                assert same(reader.read(part), whole[index]), (name, axis, start, stop)
                assert same(part.make(weights), whole[index]), (name, axis, start, stop)
            if len(tensor.shape) == 3:
                number = rng.randrange(tensor.shape[0])
                assert same(reader.read(tensor.expert(number)), whole[number]), name
                half = tensor.expert(number).taken(0, tensor.shape[1] // 2)
                assert same(reader.read(half), whole[number][: tensor.shape[1] // 2]), name
                check_that_one_expert_is_read_alone(directory, name, tensor)


def check_that_one_expert_is_read_alone(directory: Path, name: str, tensor: Tensor) -> None:
    with TensorReader(directory, read_headers(directory).tensors) as reader:
        array = reader.read(tensor.expert(1))
        # Biases made from zero points need these besides the scales: 4 bits for each of 32.
        has_zero_points = "zero points" in operations(tensor)
        assert reader.bytes_read == array.nbytes + (array.nbytes // 8 if has_zero_points else 0), name


def operations(tensor: Tensor) -> set[str]:
    return {tensor.operation}.union(*map(operations, tensor.sources))


def test_a_shard_that_goes_or_is_cut_off_is_named(tmp_path: Path) -> None:
    LAYOUTS["published_float"].write(tmp_path / "m3")
    headers = read_headers(tmp_path / "m3").tensors
    name = "language_model.lm_head.weight"
    file = tmp_path / "m3" / headers[name].file
    content = file.read_bytes()
    with TensorReader(tmp_path / "m3", headers) as reader:
        file.write_bytes(content[: headers[name].start + 8])
        with pytest.raises(OSError, match=rf"{file.name}: cannot read {name}: the file ends .* bytes before"):
            reader.read(Tensor.stored(name, headers[name]))
    shutil.rmtree(tmp_path / "m3")
    with (
        TensorReader(tmp_path / "m3", headers) as reader,
        pytest.raises(OSError, match=f"cannot read {name}: No such file"),
    ):
        reader.read(Tensor.stored(name, headers[name]))
