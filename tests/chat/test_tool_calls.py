"""Tool calls: round trips through the chat template, and every decision on malformed text."""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings

from tests.chat.tool_rendering import block_of
from tests.chat.tool_replies import read_block
from tests.chat.tool_schemas import calls
from tests.chat.tool_values import exactly, pruned


def test_what_the_template_writes_is_read_back(count: Callable[[int, int], int]) -> None:
    @settings(max_examples=count(150, 20_000), deadline=None, suppress_health_check=list(HealthCheck))
    @given(calls())
    def check(case: tuple[list[Any], list[dict[str, Any]]]) -> None:
        tools, made = case
        if not made:
            return
        block = read_block(block_of(made), tools)
        assert (block.repairs, block.content) == ([], "")
        assert [call.name for call in block.calls] == [call["name"] for call in made]
        for call, expected in zip(block.calls, made, strict=True):
            assert exactly(call.arguments, pruned(expected["arguments"])), (call.arguments, expected)

    check()
