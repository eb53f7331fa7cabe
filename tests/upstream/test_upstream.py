"""The faults that ``docs/upstream.md`` tells of are still there.

Each test fails when a release has mended its fault: then the document, and the patch that it names, can go.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from packaging.version import Version

from mlx_m3_plugin.toolbox.inspect import inspect, lines_of
from tests.checkpoints.edits import edit_json
from tests.checkpoints.random_model import write_random_model
from tests.upstream import stock_faults

# Before it mlx-lm has no M3 class, and mlx-vlm one that changes from release to release.
pytestmark = pytest.mark.skipif(
    Version(version("mlx-lm")) < Version("0.32.2"), reason="of the newest releases only"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_random_model(tmp_path / "m3", vision=True)
    return tmp_path / "m3"


def stock(fault: str, model: Path) -> Any:
    """What the stock library gives, in a process that the plugin leaves alone."""
    out = model.parent / "out.json"
    command = [sys.executable, stock_faults.__file__, fault, str(model), str(out)]
    done = subprocess.run(command, env=os.environ | {"MLX_M3_PLUGIN": "off"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_mlx_vlm_has_one_list_of_blocks_for_all_groups(model: Path) -> None:
    """mlx-lm's class is right here, so it is the measure, beside ours."""
    ours = np.array(stock_faults.logits(load_model(model)[0], stock_faults.PROMPT))
    budget = 32
    lm, vlm = (np.array(stock(name, model)) for name in ("lm_logits", "vlm_logits"))
    assert np.abs(lm - ours).max() < 1e-4
    assert np.abs(vlm - ours)[:budget].max() < 1e-4
    assert np.abs(vlm - ours)[budget:].max() > 0.1


@pytest.mark.parametrize("library", ["lm", "vlm"])
@pytest.mark.parametrize("init_blocks", [0, 1])
def test_inspect_says_who_is_wrong_past_the_budget(init_blocks: int, library: str, model: Path) -> None:
    def set_init_blocks(config: dict[str, Any]) -> None:
        config["text_config"]["sparse_attention_config"]["sparse_init_block"] = init_blocks

    edit_json(model / "config.json", set_init_blocks)
    ours = np.array(stock_faults.logits(load_model(model)[0], stock_faults.PROMPT))
    theirs = np.array(stock(f"{library}_logits", model))
    found = inspect(model)
    assert found.attention is not None
    budget = found.attention.budget
    assert np.abs(ours - theirs)[:budget].max() < 1e-4
    is_wrong = bool(np.abs(ours - theirs)[budget:].max() > 0.1)
    assert is_wrong or np.abs(ours - theirs).max() < 1e-4
    assert (f"mlx-{library}" in found.wrong_without_plugin) == is_wrong
    said = [line for line in lines_of(found) if "not right past 32 tokens without the plugin" in line]
    assert bool(said) == bool(found.wrong_without_plugin)


@pytest.mark.parametrize("library", ["lm", "vlm"])
def test_blocks_start_at_slots(library: str, model: Path) -> None:
    assert stock(f"{library}_blocks_start_at_slots", model) > 0.1


def test_mlx_lm_ignores_kv_bits(model: Path) -> None:
    assert stock("lm_ignores_kv_bits", model) is True


def test_mlx_lm_takes_another_parser_for_tools(model: Path) -> None:
    assert stock("lm_tool_parser", model) == "json_tools"


def test_neither_knows_the_markers_of_reasoning(model: Path) -> None:
    assert stock("lm_think_marker", model) != "<mm:think>"
    reasoning, content = stock("vlm_think_marker", model)
    assert reasoning is None
    assert "<mm:think>" in content


def test_mlx_vlm_has_no_draft_head_of_m31(model: Path) -> None:
    assert stock("vlm_module_of_draft_head", model) == "mlx_vlm.models.minimax_m3_vl"


def test_mlx_vlm_takes_a_token_for_cached_that_is_not(model: Path) -> None:
    assert stock("vlm_tokens_of_cache", model) == 5


def test_mlx_vlm_ignores_penalties_with_drafts(model: Path) -> None:
    assert stock("vlm_processed_with_drafts", model) < 8


def test_mlx_lm_sends_the_role_with_every_delta(model: Path) -> None:
    assert stock("lm_roles_of_deltas", model) == ["assistant", "assistant"]


def test_mlx_lm_masks_grow_with_heads(model: Path) -> None:
    """At least a byte for each query head and four for each index head; the demo has 8 and 4."""
    assert stock("lm_masks_grow_with_heads", model) >= 8 + 4 * 4


def test_mlx_lm_shares_what_lacks_weights(model: Path) -> None:
    assert stock("lm_leaves_weights_random", model) is True


def test_mlx_vlm_cannot_share_it(model: Path) -> None:
    assert "does not support tensor parallelism" in stock("vlm_cannot_be_shared", model)


def test_dequantizing_loses_tensor_scales(model: Path) -> None:
    assert stock("lm_dequantizes_without_tensor_scales", model) is True


def test_drafts_leave_the_last_token_out_of_the_cache(model: Path) -> None:
    assert stock("lm_drafts_leave_out_the_last_token", model) is True


def test_mlx_vlm_trains_without_tools(model: Path) -> None:
    assert stock("vlm_trains_without_tools", model) is True


def test_ours_has_none_of_them(model: Path) -> None:
    """The same functions in this process, where the plugin is."""
    assert stock_faults.lm_blocks_start_at_slots(str(model)) < 1e-4
    assert stock_faults.vlm_blocks_start_at_slots(str(model)) < 1e-4
    lm = mx.array(stock_faults.lm_logits(str(model)))
    assert mx.abs(lm - mx.array(stock_faults.vlm_logits(str(model)))).max().item() < 1e-4
    assert not stock_faults.lm_ignores_kv_bits(str(model))
    assert stock_faults.lm_think_marker(str(model)) == "<mm:think>"
    with pytest.raises(ValueError, match=r"self_attn\.o_proj"):
        stock_faults.lm_leaves_weights_random(str(model))
