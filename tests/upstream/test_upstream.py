"""The faults that ``docs/upstream.md`` tells of are still there.

Each test fails when a release has mended its fault: then the document, and the patch that it names, can go.
"""

import json
import shutil
from collections.abc import Callable
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
from tests.end_to_end.environments import here
from tests.upstream import stock_faults

# Before it mlx-lm has no M3 class, and mlx-vlm one that changes from release to release.
pytestmark = pytest.mark.skipif(
    Version(version("mlx-lm")) < Version("0.32.2"), reason="of the newest releases only"
)


INIT_BLOCKS = (0, 1)
SPOILED = "spoiled"
Measured = Callable[..., Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """A random model: one to read, two that differ in their first blocks, one to spoil."""
    directory = tmp_path_factory.mktemp("upstream")
    write_random_model(directory / "None", vision=True)
    for name in (*INIT_BLOCKS, SPOILED):
        shutil.copytree(directory / "None", directory / str(name))
    for number in INIT_BLOCKS:
        edit_json(
            directory / str(number) / "config.json",
            lambda config, number=number: config["text_config"]["sparse_attention_config"].update(
                sparse_init_block=number
            ),
        )
    return {name: directory / str(name) for name in (None, *INIT_BLOCKS, SPOILED)}


@pytest.fixture
def model(models: dict[Any, Path]) -> Path:
    return models[None]


@pytest.fixture(scope="module")
def stock(models: dict[Any, Path]) -> Measured:
    """What the stock libraries give, all in one process, which the plugin leaves alone."""
    faults = [name for name in vars(stock_faults) if name.startswith(("lm_", "vlm_"))]
    asked = [(name, SPOILED if name == "lm_leaves_weights_random" else None) for name in faults]
    asked += [(name, number) for name in ("lm_logits", "vlm_logits") for number in INIT_BLOCKS]
    asked_file, out = models[None].with_name("asked.json"), models[None].with_name("out.json")
    asked_file.write_text(json.dumps([(name, str(models[which])) for name, which in asked]))
    here().run(stock_faults.__file__, asked_file, out, env={"MLX_M3_PLUGIN": "off"})
    found = dict(zip(asked, json.loads(out.read_text()), strict=True))

    def measured(fault: str, which: Any = None) -> Any:
        answer = found[fault, which]
        assert not (isinstance(answer, dict) and "failed" in answer), answer["failed"]
        return answer

    return measured


def test_mlx_vlm_has_one_list_of_blocks_for_all_groups(stock: Measured, model: Path) -> None:
    """mlx-lm's class is right here, so it is the measure, beside ours."""
    ours = np.array(stock_faults.logits(load_model(model)[0], stock_faults.PROMPT))
    budget = 32
    lm, vlm = (np.array(stock(name)) for name in ("lm_logits", "vlm_logits"))
    assert np.abs(lm - ours).max() < 1e-4
    assert np.abs(vlm - ours)[:budget].max() < 1e-4
    assert np.abs(vlm - ours)[budget:].max() > 0.1


@pytest.mark.parametrize("init_blocks", INIT_BLOCKS)
def test_inspect_says_who_is_wrong_past_the_budget(
    init_blocks: int, stock: Measured, models: dict[Any, Path]
) -> None:
    model = models[init_blocks]
    ours = np.array(stock_faults.logits(load_model(model)[0], stock_faults.PROMPT))
    found = inspect(model)
    assert found.attention is not None
    budget = found.attention.budget
    for library in ("lm", "vlm"):
        theirs = np.array(stock(f"{library}_logits", init_blocks))
        assert np.abs(ours - theirs)[:budget].max() < 1e-4
        is_wrong = bool(np.abs(ours - theirs)[budget:].max() > 0.1)
        assert is_wrong or np.abs(ours - theirs).max() < 1e-4
        assert (f"mlx-{library}" in found.wrong_without_plugin) == is_wrong
    said = [line for line in lines_of(found) if "not right past 32 tokens without the plugin" in line]
    assert bool(said) == bool(found.wrong_without_plugin)


@pytest.mark.parametrize("library", ["lm", "vlm"])
def test_blocks_start_at_slots(library: str, stock: Measured) -> None:
    assert stock(f"{library}_blocks_start_at_slots") > 0.1


def test_mlx_lm_ignores_kv_bits(stock: Measured) -> None:
    assert stock("lm_ignores_kv_bits") is True


def test_mlx_lm_takes_another_parser_for_tools(stock: Measured) -> None:
    assert stock("lm_tool_parser") == "json_tools"


def test_neither_knows_the_markers_of_reasoning(stock: Measured) -> None:
    assert stock("lm_think_marker") != "<mm:think>"
    reasoning, content = stock("vlm_think_marker")
    assert reasoning is None
    assert "<mm:think>" in content


def test_mlx_vlm_has_no_draft_head_of_m31(stock: Measured) -> None:
    assert stock("vlm_module_of_draft_head") == "mlx_vlm.models.minimax_m3_vl"


def test_mlx_vlm_takes_a_token_for_cached_that_is_not(stock: Measured) -> None:
    assert stock("vlm_tokens_of_cache") == 5


def test_mlx_vlm_ignores_penalties_with_drafts(stock: Measured) -> None:
    assert stock("vlm_processed_with_drafts") < 8


def test_mlx_lm_sends_the_role_with_every_delta(stock: Measured) -> None:
    assert stock("lm_roles_of_deltas") == ["assistant", "assistant"]


def test_mlx_lm_masks_grow_with_heads(stock: Measured) -> None:
    """At least a byte for each query head and four for each index head; the demo has 8 and 4."""
    assert stock("lm_masks_grow_with_heads") >= 8 + 4 * 4


def test_mlx_lm_shares_what_lacks_weights(stock: Measured) -> None:
    assert stock("lm_leaves_weights_random", SPOILED) is True


def test_mlx_vlm_cannot_share_it(stock: Measured) -> None:
    assert "does not support tensor parallelism" in stock("vlm_cannot_be_shared")


def test_dequantizing_loses_tensor_scales(stock: Measured) -> None:
    assert stock("lm_dequantizes_without_tensor_scales") is True


def test_drafts_leave_the_last_token_out_of_the_cache(stock: Measured) -> None:
    assert stock("lm_drafts_leave_out_the_last_token") is True


def test_mlx_vlm_trains_without_tools(stock: Measured) -> None:
    assert stock("vlm_trains_without_tools") is True


def test_ours_has_none_of_them(model: Path, models: dict[Any, Path]) -> None:
    """The same functions in this process, where the plugin is."""
    assert stock_faults.lm_blocks_start_at_slots(str(model)) < 1e-4
    assert stock_faults.vlm_blocks_start_at_slots(str(model)) < 1e-4
    lm = mx.array(stock_faults.lm_logits(str(model)))
    assert mx.abs(lm - mx.array(stock_faults.vlm_logits(str(model)))).max().item() < 1e-4
    assert not stock_faults.lm_ignores_kv_bits(str(model))
    assert stock_faults.lm_think_marker(str(model)) == "<mm:think>"
    with pytest.raises(ValueError, match=r"self_attn\.o_proj"):
        stock_faults.lm_leaves_weights_random(str(models[SPOILED]))
