"""Greedy answers with drafts are those without, token by token, and leave the caches as these do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_vlm.speculative.drafters.dspark", reason="this mlx-vlm has no DSpark")

from tests.drafts.runs import assert_same_tokens, drafted, make_knowing, random_drafter
from tests.vlm.vlm_runs import BUDGET, Prompt, alone, text


def test_one_request(model: Any, tmp_path: Path, fresh_seed: int, count: Callable[[int, int], int]) -> None:
    random = np.random.default_rng(fresh_seed)
    rates = []
    for case in range(count(6, 200)):
        drafter = random_drafter(tmp_path / str(case), int(random.integers(2**31)))
        length = int(random.choice([BUDGET // 2, BUDGET - 3, 2 * BUDGET, 4 * BUDGET, 16 * BUDGET]))
        prompt = text(length + int(random.integers(5)), int(random.integers(2**31)))
        expected = alone(model, prompt, 24)
        if case % 3:
            make_knowing(drafter, [expected], fresh_seed, float(random.choice([0.5, 0.8, 1.0])))
        options = {"draft_block_size": int(random.integers(2, 9)), "prefill_step_size": 48}
        assert_same_tokens(drafted(model, prompt, 24, drafter, **options), expected)
        rates.append(sum(drafter.accept_lens) / sum(drafter.draft_lens))
    assert min(rates) < 0.1
    assert max(rates) > 0.5


def test_later_requests_on_one_cache(
    model: Any, tmp_path: Path, fresh_seed: int, count: Callable[[int, int], int]
) -> None:
    """As a chat goes on: some replies are cut, some are drafted, some caches are quantized."""
    from mlx_vlm.generate import PromptCacheState

    random = np.random.default_rng(fresh_seed)
    drafter = random_drafter(tmp_path, fresh_seed)
    for _ in range(count(8, 500)):
        state = PromptCacheState()
        tokens: list[int] = text(int(random.integers(5, 80)), int(random.integers(2**31))).tokens
        for _ in range(3):
            expected = alone(model, Prompt(tokens), int(random.integers(2, 12)))
            make_knowing(drafter, [expected], fresh_seed, float(random.random()))
            options: dict[str, Any] = {
                "prompt_cache_state": state,
                "draft_block_size": int(random.integers(2, 9)),
            }
            if random.random() < 0.2:
                options["draft_model"] = None
            said = drafted(model, Prompt(tokens), len(expected.tokens), drafter, **options)
            assert_same_tokens(said, expected)
            kept = len(said) if random.random() < 0.6 else int(random.integers(len(said)))
            tokens = (
                tokens + said[:kept] + text(int(random.integers(1, 30)), int(random.integers(2**31))).tokens
            )
