"""Tiny checkpoints that cannot be opened exactly, in formats that people do publish."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from tests.checkpoints.layouts.arrange import nested, published
from tests.checkpoints.layouts.experts import compressed_tensors
from tests.checkpoints.layouts.formats import MXFP8, Checkpoint, official, plain
from tests.checkpoints.layouts.source import Json, Source, Weights, as_published


def foreign(
    source: Source, parts_of: Callable[[mx.array], Weights], quantization: Json, float8: bool = False
) -> Checkpoint:
    """Every linear layer that the official checkpoint quantizes, in parts that say nothing true."""
    tensors, weights = {}, []
    for name, array in published(source.parameters).items():
        module = name.removesuffix(".weight")
        if array.ndim != 2 or official(module) is None:
            tensors[nested(name)] = array
            continue
        tensors |= {nested(f"{module}.{part}"): a for part, a in parts_of(array).items()}
        weights.append(nested(name))
    config = as_published(source.config) | {"quantization_config": quantization}
    return Checkpoint(tensors | source.vision, config, {}, weights if float8 else ())


def fp8_blocks(*, source: Source) -> Checkpoint:
    """One float32 scale for each block of 128 x 128."""

    def parts_of(array: mx.array) -> Weights:
        rows, columns = (-(-size // 128) for size in array.shape)
        weight = mx.quantize(array, **MXFP8)[0].view(mx.uint8)
        return {"weight": weight, "weight_scale_inv": mx.full((rows, columns), 0.01)}

    blocks = {"weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    return foreign(source, parts_of, {"quant_method": "fp8", **blocks}, float8=True)


def gptq(*, source: Source) -> Checkpoint:
    def parts_of(array: mx.array) -> Weights:
        rows, columns = array.shape
        return {
            "qweight": mx.zeros((columns // 8, rows), mx.int32),
            "qzeros": mx.zeros((columns // 32, rows // 8), mx.int32),
            "scales": mx.full((columns // 32, rows), 0.01, mx.float16),
            "g_idx": mx.array(np.arange(columns, dtype=np.int32) // 32),
        }

    return foreign(source, parts_of, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False})


def awq(*, source: Source) -> Checkpoint:
    def parts_of(array: mx.array) -> Weights:
        rows, columns = array.shape
        return {
            "qweight": mx.zeros((columns, rows // 8), mx.int32),
            "qzeros": mx.zeros((columns // 32, rows // 8), mx.int32),
            "scales": mx.full((columns // 32, rows), 0.01, mx.float16),
        }

    return foreign(source, parts_of, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})


def compressed_tensors_channels(*, source: Source) -> Checkpoint:
    def parts_of(array: mx.array) -> Weights:
        rows, columns = array.shape
        return {
            "weight_packed": mx.zeros((rows, columns // 4), mx.int32),
            "weight_scale": mx.full((rows, 1), 0.01, mx.bfloat16),
            "weight_shape": mx.array([rows, columns], mx.int64),
        }

    group = {"num_bits": 8, "type": "int", "group_size": None, "strategy": "channel"}
    return foreign(source, parts_of, compressed_tensors(("pack-quantized", "Linear", group)))


def unknown_tensor(*, source: Source) -> Checkpoint:
    return plain(source=source, extra={nested("model.layers.1.self_attn.surprise.weight"): mx.ones((2, 3))})


def stray_duplicate(*, source: Source) -> Checkpoint:
    """One tensor under two spellings of its name, with two values."""
    stray = source.parameters["model.layers.0.self_attn.q_proj.weight"] + 1
    return plain(source=source, extra={"model.language_model.layers.0.self_attn.q_proj.weight": stray})
