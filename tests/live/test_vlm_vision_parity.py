"""Logits for images and videos of stock mlx-vlm with the plugin against transformers.

From pictures, through mlx-vlm's own processor, to logits past the block budget.  transformers has
no processor without torchvision, so it gets the same pixel values, with the rows of the videos'
grid cut as its own processor cuts them.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import mlx_vlm
import numpy as np
import pytest

from tests.live import vlm_oracle
from tests.live.vlm_pictures import PROMPTS, WAYS, Prompt
from tests.live.vlm_ways import differences

TOLERANCE = 1e-3

worst: dict[str, dict[str, float]] = {name: {} for name in PROMPTS}


@dataclass
class Case:
    """One random model in both libraries, with prompts and what transformers says of them."""

    oracle_model: Any
    model: Any
    prompts: list[Prompt]
    logits: list[np.ndarray]


@pytest.fixture(scope="module")
def case(seed: int, tmp_path_factory: pytest.TempPathFactory) -> Case:
    oracle_model = vlm_oracle.vision_model(seed)
    path = tmp_path_factory.mktemp("checkpoint")
    vlm_oracle.save_checkpoint(oracle_model, path)
    model, processor = mlx_vlm.load(str(path))
    # Loaded by stock mlx-vlm, by the name in the config, and served from our file.
    assert type(model).__module__ == "mlx_vlm.models.minimax_m3_vl"
    assert type(model.language_model).__module__.startswith("mlx_m3_plugin.")
    made = [
        vlm_oracle.prompt_with_pictures(oracle_model, processor, parts, seed) for parts in PROMPTS.values()
    ]
    return Case(oracle_model, model, [prompt for prompt, _ in made], [logits for _, logits in made])


@pytest.mark.parametrize("way", WAYS)
def test_logits(case: Case, way: str) -> None:
    found = differences(WAYS[way](case.model, case.prompts), case.logits)
    named = {name: found[n] for n, name in enumerate(PROMPTS) if n in found}
    for name, difference in named.items():
        worst[name][way] = max(worst[name].get(way, 0.0), difference)
    assert max(found.values()) <= TOLERANCE, named


def test_pictures_are_seen(case: Case) -> None:
    """Other pixels, and other cuts of a video, change the logits by far more than the tolerance."""
    for prompt, logits, parts in zip(case.prompts, case.logits, PROMPTS.values(), strict=True):
        assert 0.5 < logits.std() < 2
        pixels = {k: np.flip(v, 0).copy() if "pixel" in k else v for k, v in prompt.pictures.items()}
        flipped = vlm_oracle.logits_of(case.oracle_model, replace(prompt, pictures=pixels))
        assert np.abs(flipped - logits).max() > 100 * TOLERANCE
        if any(vlm_oracle.is_cut(part) for part in parts):
            whole = vlm_oracle.logits_of(case.oracle_model, prompt, cut_videos=False)
            assert np.abs(whole - logits).max() > 100 * TOLERANCE


def test_zz_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs last: every prompt was compared, and true ties are as rare as chance makes them."""
    with capsys.disabled():
        print("\n" + json.dumps({"largest differences": worst, **vlm_oracle.counts}))
    assert all(worst.values())
    vlm_oracle.assert_ties_are_rare()
