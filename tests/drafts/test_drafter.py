"""M3.1's draft head: loaded as published, compared with its description, and refused where it is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm.speculative.drafters.dspark", reason="this mlx-vlm has no DSpark")

from tests.drafts import checkpoint as drafts
from tests.drafts.reference import Reference

TOLERANCE = 5e-5


def load(directory: Path) -> Any:
    from mlx_vlm.speculative.drafters import load_drafter

    drafter, kind = load_drafter(str(directory))
    assert kind == "dflash"
    return drafter


def run(drafter: Any, features: mx.array, splits: list[int], anchor: int, n: int) -> tuple[list[int], Any]:
    """Drafts after all features, given in pieces, and their logits."""
    context, logits, given = drafter.make_cache(), [], 0

    def sampler(step: mx.array) -> mx.array:
        logits.append(step[0])
        return mx.argmax(step, axis=-1)

    for end in splits:
        logits.clear()
        drafted = drafter.draft_block(anchor, features[:, given:end], context, n + 1, sampler)
        given = end
    return drafted[0].tolist(), logits


@pytest.mark.parametrize("stored", ["mxfp8", "bfloat16", "affine"])
def test_logits_equal_the_description(
    stored: str,
    model: Any,
    tmp_path: Path,
    fresh_seed: int,
    count: Callable[[int, int], int],
) -> None:
    """Whatever pieces the context comes in, before the window of 24 and past it."""
    random = np.random.default_rng(fresh_seed)
    text = model.language_model
    target = [np.array(a) for a in (text.model.embed_tokens.weight, text.lm_head.weight)]
    seen = set()
    for case in range(count(3, 30)):
        causal = bool(case % 3 == 2)
        config = drafts.config(dspark_causal=causal)
        weights = drafts.values(config["text_config"], int(random.integers(2**31)))
        stands_for = drafts.write(tmp_path / str(case), config, weights, stored)
        drafter = load(tmp_path / str(case)).bind(model)
        reference = Reference({k: np.array(v) for k, v in stands_for.items()}, config["text_config"], *target)
        length, n = int(random.integers(1, 70)), int(random.integers(1, 8))
        features = random.standard_normal((length, 2 * drafts.HIDDEN)).astype(np.float32)
        cuts = random.choice(length, size=min(length, int(random.integers(0, 12))), replace=False)
        splits = sorted({*(int(cut) for cut in cuts if cut), length})
        anchor = int(random.integers(640))
        tokens, logits = run(drafter, mx.array(features[None]), splits, anchor, n)
        expected, expected_logits, sure = reference.draft(features, anchor, n)
        worst = max(float(abs(np.array(a) - b).max()) for a, b in zip(logits, expected_logits, strict=True))
        assert worst <= TOLERANCE
        assert tokens == expected
        normed = drafter.block_hidden(mx.array([anchor]), mx.array(features[None]), drafter.make_cache())
        confidence = drafter.confidence(normed[:, :n], mx.array([anchor]), mx.array([tokens]))
        assert float(abs(np.array(confidence)[0] - sure).max()) <= TOLERANCE
        seen.add((causal, length > 24))
    assert len(seen) > 1
