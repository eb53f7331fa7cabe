"""Logits of stock mlx-lm with the plugin against transformers, at every position.

Every way of computing the same logits is compared with the oracle's single pass.  Prompts on
which the oracle's own choice of blocks meets a true tie are replaced, and counted.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.utils import load_model

from tests.live import oracle

TOLERANCE = 1e-4
# Seven ways to feed the prompt: token counts of the pieces, the rest as the last one.  The
# blocks hold 4 to 8 tokens, so most of these cut inside a block.
SPLITS = [(1,), (8, 8, 8), (3, 64), (75, 1, 1, 1), (149,), (13,) * 11, (1,) * 45]
KINDS = ("one pass", "splits", "decode", "trim", "saved cache")

worst: dict[str, float] = dict.fromkeys(KINDS, 0.0)
n_positions = [0]


@pytest.fixture(scope="module", params=oracle.SHAPES)
def case(request: pytest.FixtureRequest, seed: int, tmp_path_factory: pytest.TempPathFactory) -> Any:
    reference = oracle.make_oracle(oracle.SHAPES[request.param], seed)
    path = tmp_path_factory.mktemp("checkpoint")
    reference.save(path)
    model, _ = load_model(path)
    # Loaded by stock mlx-lm, by the name in the config, and served from our file.
    assert type(model).__module__ == "mlx_lm.models.minimax_m3_vl"
    assert "mlx_m3_plugin" in type(model).load_weights.__module__
    assert 0.5 < reference.logits.std() < 2
    assert not reference.ties
    n_positions[0] += len(reference.tokens)
    return reference, model


def feed(model: Any, tokens: np.ndarray, cache: Any = None) -> np.ndarray:
    return np.array(model(mx.array(tokens)[None], cache=cache)[0])


def assert_equal(kind: str, logits: np.ndarray, reference: oracle.Oracle, start: int = 0) -> None:
    difference = np.abs(logits - reference.logits[start : start + len(logits)]).max(axis=-1)
    worst[kind] = max(worst[kind], float(difference.max()))
    assert difference.max() <= TOLERANCE, f"position {start + int(difference.argmax())}: {difference.max()}"


def test_one_pass(case: Any) -> None:
    reference, model = case
    assert_equal("one pass", feed(model, reference.tokens), reference)


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: "-".join(map(str, s[:4])))
def test_any_split_of_the_prompt(case: Any, split: tuple[int, ...]) -> None:
    reference, model = case
    cache = make_prompt_cache(model)
    pieces = np.split(reference.tokens, [c for c in np.cumsum(split) if c < len(reference.tokens)])
    assert_equal("splits", np.concatenate([feed(model, piece, cache) for piece in pieces]), reference)


def test_decode_after_prefill(case: Any) -> None:
    reference, model = case
    cache = make_prompt_cache(model)
    feed(model, reference.tokens[:83], cache)
    logits = np.concatenate([feed(model, t[None], cache) for t in reference.tokens[83:]])
    assert_equal("decode", logits, reference, start=83)


@pytest.mark.parametrize("trimmed", [1, 7, 40])
def test_trim_and_continue(case: Any, trimmed: int) -> None:
    reference, model = case
    cache = make_prompt_cache(model)
    # The trimmed tokens are others than those that follow: nothing of them may stay behind.
    other = (reference.tokens[-trimmed:] + 1) % model.text_config.vocab_size
    feed(model, np.concatenate([reference.tokens[:90], other]), cache)
    assert trim_prompt_cache(cache, trimmed) == trimmed
    assert_equal("trim", feed(model, reference.tokens[90:], cache), reference, start=90)


def test_saved_and_loaded_prompt_cache(case: Any, tmp_path: Path) -> None:
    reference, model = case
    cache = make_prompt_cache(model)
    feed(model, reference.tokens[:77], cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    cache = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert_equal("saved cache", feed(model, reference.tokens[77:], cache), reference, start=77)


def test_zz_ties_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs last: no position is left out, and true ties are as rare as chance makes them."""
    tied = sum(len(ties) for _, ties in oracle.replaced)
    with capsys.disabled():
        report = {"largest differences": worst, "positions": n_positions[0], "true ties replaced": tied}
        print("\n" + json.dumps(report))
    assert n_positions[0] > 0
    assert tied <= max(1, n_positions[0] / 1000)
