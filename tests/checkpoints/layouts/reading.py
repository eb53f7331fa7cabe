"""A checkpoint in any layout as the float32 model that it stands for."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.toolbox.checkpoint import Checkpoint, open_checkpoint
from mlx_m3_plugin.toolbox.precision import dequantized
from mlx_m3_plugin.weights.byte_ranges import TensorReader
from mlx_m3_plugin.weights.headers import INDEX
from mlx_m3_plugin.weights.layouts import plan_layout
from mlx_m3_plugin.weights.names import is_vision
from mlx_m3_plugin.weights.quantization import with_quantization

from .source import Source

_PARTS = ("scales", "biases", "global_scale")
_OF_FILES = ("config.json", INDEX, "README.md")


def source_of(directory: str | Path) -> Source:
    """Everything is read into memory: this is for small models.

    Raises:
        OSError, ValueError: see ``open_checkpoint``.
    """
    checkpoint = open_checkpoint(directory)
    with TensorReader(checkpoint.directory, checkpoint.headers.tensors) as reader:
        arrays = {name: _read(checkpoint, reader, name) for name in checkpoint.plan if _is_whole(name)}
    return Source(
        with_quantization(checkpoint.config, None),
        {name: array for name, array in arrays.items() if not is_vision(name)},
        {name: array for name, array in arrays.items() if is_vision(name)},
        {
            file.name: file.read_bytes()
            for file in sorted(checkpoint.directory.iterdir())
            if file.is_file() and file.suffix != ".safetensors" and file.name not in _OF_FILES
        },
    )


def _is_whole(name: str) -> bool:
    return name.rpartition(".")[2] not in _PARTS


def _read(checkpoint: Checkpoint, reader: TensorReader, name: str) -> mx.array:
    module = name.removesuffix(".weight")
    if module == name:
        return reader.read(checkpoint.plan[name]).astype(mx.float32)
    stored = {part: reader.read(tensor) for part, tensor in checkpoint.parts(module).items()}
    return dequantized(stored, checkpoint.spec(module), in_float32=True)


def map_weights(
    weights: Mapping[str, mx.array], config: TextConfig, prefix: str, *, vision: bool = False
) -> dict[str, mx.array]:
    """:func:`plan_layout` applied to lazy arrays, as a model's ``sanitize`` does it."""
    plan = plan_layout(weights, config, prefix, vision=vision)
    return {name: tensor.make(weights) for name, tensor in plan.items()}
