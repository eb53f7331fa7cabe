"""``benchmarks/kernel_bytes.py`` counts what the kernels read and write when they run."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_m3_plugin.msa.kernels import attend, scores
from tests.msa import kernel_cases, metal_on_cpu
from tests.msa.kernel_cases import Case, Model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernel_bytes

MODEL = Model(mx.bfloat16, 64, 32, 32, block_size=16, heads=8, topk=4)
QUANTIZED = Model(mx.bfloat16, 64, 32, 32, block_size=16, heads=8, topk=4, quantization=(8, 32))
# A whole number of blocks, and no slots without a key: the formulas know of neither.
CASES = [
    Case(MODEL, seed=1, groups=4, length=1, n_keys=320, batch=3),
    Case(MODEL, seed=1, groups=2, length=4, n_keys=320),
    Case(QUANTIZED, seed=1, groups=2, length=3, n_keys=192),
    Case(MODEL, seed=1, groups=2, length=32, n_keys=192, batch=2),
    Case(QUANTIZED, seed=1, groups=2, length=32, n_keys=192),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.length}")
def test_counted_as_measured(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, int] = {}

    def metal_kernel(name: str, **options: Any) -> Callable[..., list[mx.array]]:
        kernel = metal_on_cpu.metal_kernel(name, **options)
        [cost] = [cost for start, cost in kernel_bytes.COSTS.items() if name.startswith(start)]

        def run(**call: Any) -> list[mx.array]:
            outputs = list(zip(call["output_shapes"], call["output_dtypes"], strict=True))
            template = dict(call["template"])
            counted[name], _ = cost(SimpleNamespace(**call | {"outputs": outputs, "template": template}))
            return kernel(**call)

        return run

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    # Several tiles in these small cases, too.
    monkeypatch.setattr(scores, "MANY_GROUPS", 4)
    monkeypatch.setattr(attend, "SORTED_GROUPS", 16)
    metal_on_cpu.bytes_moved.clear()
    kernel_cases.check(case)

    assert len(counted) == 4
    for name, count in counted.items():
        # Counted, but not read: scores of forced blocks, keys in the future of a tile of queries, and a block
        # once more where two threadgroups don't share it.
        assert 0.9 * count <= metal_on_cpu.bytes_moved[name] <= count, name


def test_what_the_kernels_are_made_for() -> None:
    """In GB, at M3's sizes in 16 bits: scores, choice and attention of 64 heads in 4 groups."""

    def of_all(length: int, n_keys: int) -> float:
        common = {"batch": 1, "length": length}
        sizes = {"dims": 128, "block_size": 128, "itemsize": 2, "n_keys": n_keys, "groups": 4}
        attention = {"heads": 64, "k": 16, "value_dims": 128}
        moved = kernel_bytes.block_scores_bytes(**common, **sizes)
        moved += kernel_bytes.choose_blocks_bytes(**common, groups=4, n_blocks=n_keys // 128, k=16)
        moved += kernel_bytes.attend_pairs_bytes(**common, **sizes, **attention)
        moved += kernel_bytes.merge_pairs_bytes(**common, **attention, itemsize=2)
        return moved / 1e9

    assert of_all(2048, 32768) <= 3.0
    assert of_all(512, 8192) <= 0.8
    # One token: the index keys once, and K and V of 16 blocks in 4 groups once.
    for n_keys in (32768, 131072):
        assert of_all(1, n_keys) <= 1.2 * (n_keys * 256 + 16 * 128 * 4 * 512) / 1e9
