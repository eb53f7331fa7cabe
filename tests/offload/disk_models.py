"""One checkpoint loaded twice: resident, and with experts on the disk."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

VARIABLE = "MLX_M3_PLUGIN_EXPERT_MEMORY"


def load_with(host: str, directory: Path) -> Any:
    if host == "mlx_lm":
        from mlx_lm.utils import load_model

        return load_model(directory)[0]
    from mlx_vlm.utils import load_model as load_vlm_model

    return load_vlm_model(directory)


def experts_of(model: Any) -> list[Any]:
    return [layer.block_sparse_moe.switch_mlp for layer in model.layers if layer.is_moe]


def memory_for(resident: Any, slots: int) -> int:
    """Bytes for so many experts of each layer."""
    layers = experts_of(resident)
    total = sum(array.nbytes for layer in layers for _, array in tree_flatten(layer.parameters()))
    return math.ceil(total * slots / layers[0].gate_proj.weight.shape[0])


def load_on_disk(host: str, directory: Path, memory: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"{memory}B")
        return load_with(host, directory)


def logits(model: Any, tokens: Any, cache: Any = None) -> mx.array:
    output = model(mx.array(tokens), cache=cache)
    return getattr(output, "logits", output)


def split(model: Any, tokens: Any, lengths: list[int]) -> list[mx.array]:
    """Logits of parts of a batch of prompts, one after the other, through a cache."""
    cache, outputs, start = model.make_cache(), [], 0
    for length in lengths:
        outputs.append(logits(model, tokens[:, start : start + length], cache))
        start += length
    return outputs


def assert_same_bits(left: Any, right: Any, tokens: "np.ndarray[Any, Any]", lengths: list[int]) -> None:
    """Two models give the same bits: a whole batch of prompts, one row, and split."""
    cases: list[Callable[[Any], list[mx.array]]] = [
        lambda model: [logits(model, tokens)],
        lambda model: split(model, tokens[:1], lengths),
        lambda model: split(model, tokens, lengths),
    ]
    for number, case in enumerate(cases):
        for one, other in zip(case(left), case(right), strict=True):
            assert bool(mx.array_equal(one, other)), number
