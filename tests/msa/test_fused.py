"""Elementwise chains that are compiled on a GPU: the same compiled for a CPU, where they run as they are."""

import shutil
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_m3_plugin.msa import attend, common, select_blocks
from mlx_m3_plugin.msa.attend import FORMS
from tests.hosts.test_batches import CHECKPOINT, VOCABULARY
from tests.msa.test_tiles import arrays, positions

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU MLX compiles with g++")


def sparse_attention(case: dict, form: str) -> tuple[mx.array, mx.array]:
    q, k, v, iq, ik = arrays(case)
    (offset, padding), _ = positions(case)
    size = case["block_size"]
    ids = select_blocks(iq, ik, offset, padding, block_size=size, topk_blocks=4, init_blocks=1)
    return ids, attend(q, k, v, ids, offset, padding, block_size=size, scale=0.2, form=form)


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
def test_compiled_for_several_shapes(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: what is compiled for the first must not be used wrongly for the next."""
    shapes = [
        {"batch": 1, "length": 40, "n_keys": 90, "block_size": 8, "padded": False},
        {"batch": 2, "length": 7, "n_keys": 101, "block_size": 5, "padded": True},
        {"batch": 2, "length": 40, "n_keys": 333, "block_size": 16, "padded": False},
    ]
    common_sizes = {"groups": 2, "heads": 2, "spare": 5, "padding": [3, 40], "seed": 7}
    cases: list[dict[str, Any]] = [common_sizes | shape for shape in shapes]
    expected = [sparse_attention(case, form) for case in cases]
    mx.eval(expected)
    monkeypatch.setattr(common, "on_gpu", lambda: True)
    for case, (ids, out) in zip(cases, expected, strict=True):
        found_ids, found = sparse_attention(case, form)
        assert mx.array_equal(mx.sort(found_ids, axis=-1), mx.sort(ids, axis=-1))
        assert mx.abs(found - out).max().item() <= 1e-6


@needs_compiler
def test_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model(CHECKPOINT)[0]
    tokens = mx.random.randint(0, VOCABULARY, (2, 75), key=mx.random.key(1))
    expected = model(tokens)
    mx.eval(expected)
    monkeypatch.setattr(common, "on_gpu", lambda: True)
    assert mx.abs(model(tokens) - expected).max().item() <= 1e-5
