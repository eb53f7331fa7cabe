"""Trained weights, and prompts of many block budgets: stock mlx-lm with the plugin is transformers."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import needles
import numpy as np
import pytest
import score
import torch
from answers import WAYS, prompt_of
from mlx_lm import load
from sizes import BUDGET
from transformers import MiniMaxM3SparseForConditionalGeneration

from mlx_m3_plugin.toolbox.demo import NANO
from tests.checkpoints.layouts import LAYOUTS
from tests.checkpoints.layouts.reading import source_of
from tests.live import oracle

TIMES = (1, 4, 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """M3-nano's values in float32, as transformers reads them."""
    directory = tmp_path_factory.mktemp("nano") / "m3"
    LAYOUTS["published_float"].write(directory, source_of(NANO))
    return directory


@pytest.mark.parametrize("times", TIMES)
def test_logits_at_every_position(whole: Path, fresh_seed: int, times: int) -> None:
    model, tokenizer = load(str(whole))[:2]
    reference = MiniMaxM3SparseForConditionalGeneration.from_pretrained(whole, dtype=torch.float32).eval()

    # A trained model meets ties often: one prompt in three of this length has one.
    for attempt in range(20):
        (case,) = needles.draw(
            random.Random(fresh_seed + attempt), times * BUDGET, lambda text: len(text.split())
        )
        ids = np.array(tokenizer.encode(prompt_of(tokenizer, case), add_special_tokens=False))
        with oracle.recorded_ties(reference) as ties:
            expected = oracle.forward(reference, ids)
        if not ties:
            break
    assert not ties
    assert len(ids) > 3 * BUDGET
    logits = np.array(model(mx.array(ids[None]))[0])
    # Trained logits are of the order of ten, so rounding is, too.
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max() + 1e-4


def test_all_say_the_same(whole: Path, fresh_seed: int, count: Any) -> None:
    cases = [cases[0] for cases in score.held_out(1, fresh_seed, lambda text: len(text.split())).values()]
    cases = random.Random(fresh_seed).sample(cases, count(4, len(cases)))
    texts = [case for case in cases if not case.pictures]
    said = {by: WAYS[by](whole)(cases) for by in ("transformers", "mlx_vlm")}
    assert said["mlx_vlm"] == said["transformers"]
    expected = [text for case, text in zip(cases, said["transformers"], strict=True) if not case.pictures]
    for by in ("mlx_lm", "mlx_lm_in_batches"):
        assert WAYS[by](whole)(texts) == expected, by
