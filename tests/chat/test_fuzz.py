"""Random and mutated input: no exception but the documented one, and nothing that never ends."""

import json
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from mlx_m3_plugin.chat.markers import calls_in
from mlx_m3_plugin.chat.rewriting import ReplyRewriter
from mlx_m3_plugin.chat.tool_calls import ToolCallError, parse_tool_call
from tests.chat import tool_fuzz
from tests.chat.tool_replies import Reply, read, read_block

# Of one draw of tools and blocks.
CASES = 50


def test_no_input_does_harm(
    count: Callable[[int, int], int], fresh_seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    # Pytest would keep the warnings of a million texts: gigabytes.
    caplog.set_level(logging.CRITICAL)
    rng = random.Random(fresh_seed)
    for _ in range(count(2_000, 1_000_000) // CASES):
        tools, blocks = tool_fuzz.tools(rng), [tool_fuzz.block(rng) for _ in range(4)]
        for _ in range(CASES):
            text = tool_fuzz.text(rng, blocks)
            try:
                _check(rng, text, tools)
            except Exception as error:
                raise AssertionError(f"{error!r} for {text!r} with {tools!r}") from error


def _check(rng: random.Random, text: str, tools: Any) -> None:
    block = read_block(text, tools)
    for call in block.calls:
        # What a server sends on: JSON, with no NaN in it.
        json.dumps(call.arguments, allow_nan=False)
    _check_what_servers_get(text, tools, block)
    whole, cut = _reply([text], tools), _reply(tool_fuzz.pieces(rng, text), tools)
    assert cut == whole
    rewriter = ReplyRewriter(tools)
    rewritten = "".join(map(rewriter.feed, tool_fuzz.pieces(rng, text))) + rewriter.finish()
    assert [parse_tool_call(call, tools) for call in calls_in(rewritten)] == [
        call.as_dict() for call in whole.calls
    ]


def _check_what_servers_get(text: str, tools: Any, block: Reply) -> None:
    """The one documented exception, where there is no complete call, and only there."""
    if not block.calls:
        with pytest.raises(ToolCallError, match=r"\w"):
            parse_tool_call(text, tools)
        return
    calls = parse_tool_call(text, tools)
    assert (calls if isinstance(calls, list) else [calls]) == [call.as_dict() for call in block.calls]


def _reply(pieces: list[str], tools: Any) -> Reply:
    return read(pieces, tools=tools)[0]


@pytest.mark.parametrize("depth", [101, 10_000])
def test_what_is_nested_too_deep_is_refused(depth: int) -> None:
    nested = "".join(f"{tool_fuzz.NS}<a>" for _ in range(depth)) + "x"
    nested += "".join(f"{tool_fuzz.NS}</a>" for _ in range(depth))
    call = f'{tool_fuzz.NS}<invoke name="f">{{}}{tool_fuzz.NS}</invoke>'
    reply = _reply([f"{tool_fuzz.NS}<tool_call>{call.format(nested)}{call.format('')}"], None)
    assert [call.arguments for call in reply.calls] == [{}]
    assert reply.content == call.format(nested)
