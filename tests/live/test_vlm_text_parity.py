"""Text logits of stock mlx-vlm with the plugin against transformers, at every position.

Rows are compared with transformers' single pass over each of them alone, however mlx-vlm came to
its logits.  Rows on which transformers' own choice of blocks meets a true tie are replaced.
"""

import json
from typing import Any

import pytest
from mlx_vlm.utils import load_model

from tests.live import oracle, vlm_oracle
from tests.live.vlm_ways import WAYS, differences

TOLERANCE = 1e-4

worst: dict[str, float] = dict.fromkeys(WAYS, 0.0)
n_positions = [0]


@pytest.fixture(scope="module", params=oracle.SHAPES)
def case(request: pytest.FixtureRequest, seed: int, tmp_path_factory: pytest.TempPathFactory) -> Any:
    expected = vlm_oracle.text_rows(oracle.SHAPES[request.param], seed)
    path = tmp_path_factory.mktemp("checkpoint")
    oracle.save_model(expected.model, path)
    model = load_model(path)
    # Loaded by stock mlx-vlm, by the name in the config, and served from our file.
    assert type(model).__module__ == "mlx_vlm.models.minimax_m3_vl"
    assert type(model.language_model).__module__.startswith("mlx_m3_plugin.")
    assert 0.5 < expected.logits[0].std() < 2
    n_positions[0] += sum(map(len, expected.tokens))
    return expected, model


@pytest.mark.parametrize("way", WAYS)
def test_logits(case: Any, way: str) -> None:
    expected, model = case
    found = differences(WAYS[way](model, expected.tokens), expected.logits)
    worst[way] = max(worst[way], *found.values())
    assert max(found.values()) <= TOLERANCE, found


def test_zz_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs last: true ties are as rare as chance makes them."""
    with capsys.disabled():
        report = {"largest differences": worst, "positions": n_positions[0], **vlm_oracle.counts}
        print("\n" + json.dumps(report))
    assert n_positions[0] > 0
    vlm_oracle.assert_ties_are_rare()
