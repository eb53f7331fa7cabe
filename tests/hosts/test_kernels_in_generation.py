"""Generation with the Metal kernels, which here run on a CPU, is generation in the plain form."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_m3_plugin.msa import engine
from tests.hosts.test_batches import CHECKPOINT, VOCABULARY, together

PROMPT = [int(token) for token in mx.random.randint(0, VOCABULARY, (75,), key=mx.random.key(5)).tolist()]


def logits(mode: str) -> mx.array:
    """Of a prompt in two parts and of five more tokens, ``[80, vocabulary]``."""
    engine.configure(mode, strict=True)
    model: Any = load_model(CHECKPOINT)[0]
    engine.configure(mode, strict=True)
    cache = make_prompt_cache(model)
    parts = [PROMPT[:50], PROMPT[50:], *([token] for token in PROMPT[:5])]
    return mx.concatenate([model(mx.array([part]), cache=cache)[0] for part in parts])


def test_logits_are_those_of_the_plain_form(started_kernels: list[str]) -> None:
    expected = logits("plain")
    assert not started_kernels
    found = logits("kernels")
    assert any("attend_pairs" in name for name in started_kernels)
    assert any("choose_blocks" in name for name in started_kernels)
    assert mx.abs(found - expected).max().item() <= 1e-5


def test_rows_of_a_batch_are_those_of_the_plain_form(started_kernels: list[str]) -> None:
    requests = [(0, PROMPT[:40], 6), (0, PROMPT, 6), (2, PROMPT[5:60], 4)]
    rows = {}
    for mode in ("plain", "kernels"):
        engine.configure(mode, strict=True)
        model = load_model(CHECKPOINT)[0]
        engine.configure(mode, strict=True)
        started_kernels.clear()
        rows[mode] = together(model, requests)
        assert any("attend_pairs" in name for name in started_kernels) == (mode == "kernels")
    for expected, found in zip(rows["plain"], rows["kernels"], strict=True):
        assert [token for token, _ in found] == [token for token, _ in expected]
        for (_, ours), (_, plain) in zip(found, expected, strict=True):
            assert mx.abs(ours - plain).max().item() <= 1e-5
