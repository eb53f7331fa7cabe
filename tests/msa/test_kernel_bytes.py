"""``benchmarks/kernel_bytes.py`` counts what the kernels read and write when they run."""

import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_m3_plugin.msa.kernels import attend, scores
from tests.msa import kernel_cases, metal_on_cpu
from tests.msa.kernel_cases import Case, Model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernel_bytes

MODEL = Model(mx.bfloat16, 64, 32, 32, block_size=16, heads=8, topk=4)
QUANTIZED = Model(mx.bfloat16, 64, 32, 32, block_size=16, heads=8, topk=4, quantization=(8, 32))
# A whole number of blocks, and no row shorter than another: the formulas know of no partly visible block.
CASES = [
    Case(MODEL, seed=1, groups=4, length=1, n_keys=320, batch=3),
    Case(MODEL, seed=1, groups=2, length=4, n_keys=320),
    Case(QUANTIZED, seed=1, groups=2, length=3, n_keys=192),
    Case(MODEL, seed=1, groups=2, length=32, n_keys=192, batch=2),
    Case(QUANTIZED, seed=1, groups=2, length=32, n_keys=192),
]


def measured(case: Case) -> Counter[str]:
    metal_on_cpu.bytes_moved.clear()
    kernel_cases.check(case)
    return Counter({name.removeprefix("mlx_m3_plugin_"): n for name, n in metal_on_cpu.bytes_moved.items()})


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.length}")
def test_counted_as_measured(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_on_cpu.metal_kernel)
    monkeypatch.setattr(scores, "MANY_GROUPS", 4)
    monkeypatch.setattr(attend, "SORTED_GROUPS", 16)
    m, found = case.model, measured(case)
    common = {"batch": case.batch, "groups": case.groups, "length": case.length}
    n_blocks = case.n_keys // m.block_size

    counted = kernel_bytes.block_scores_bytes(
        **common, n_keys=case.n_keys, dims=m.index_dims, block_size=m.block_size, itemsize=2
    )
    assert 0.95 * counted <= found["block_scores_few"] + found["block_scores_many"] <= counted
    counted = kernel_bytes.choose_blocks_bytes(**common, n_blocks=n_blocks, k=m.topk)
    assert 0.9 * counted <= found["choose_blocks"] <= counted  # the scores of forced blocks are not read
    # Eight bits and two 16-bit numbers for each 32.
    token_bytes = (m.dims + m.value_dims) * 9 // 8 if m.quantization else None
    counted = kernel_bytes.attend_bytes(
        **common,
        heads=case.groups * m.heads,
        n_keys=case.n_keys,
        k=m.topk,
        dims=m.dims,
        value_dims=m.value_dims,
        block_size=m.block_size,
        itemsize=2,
        token_bytes=token_bytes,
    )
    total = sum(found[name] for name in ("attend_pairs", "attend_pairs_quantized", "merge_pairs"))
    assert 0.9 * counted <= total <= counted
