"""Every decision of docs/tool-calls.md on text that is no well-formed block."""

import logging
from typing import Any

import pytest

from mlx_m3_plugin.chat.tool_calls import (
    MOST_PROBLEMS,
    ToolCallError,
    parse_block,
    parse_tool_call,
    tool_call_end,
    tool_call_start,
)
from tests.chat.tool_rendering import marked

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "s": {"type": "string"},
                    "o": {
                        "type": "object",
                        "properties": {"b": {"type": "integer"}, "c": {"type": "string"}},
                    },
                    "l": {"type": "array", "items": {"type": "integer"}},
                },
            },
        },
    }
]
GOOD = '§<invoke name="f">§<a>1§</a>§</invoke>'
CALL = ("f", {"a": 1})


def read(text: str, tools: Any = TOOLS) -> tuple[list[tuple[str, Any]], list[str]]:
    block = parse_block(marked(text), tools)
    return [(call.name, call.arguments) for call in block.calls], block.problems


def test_the_markers_are_the_two_tokens() -> None:
    assert (tool_call_start, tool_call_end) == ("]<]minimax[>[<tool_call>", "]<]minimax[>[</tool_call>")


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n{GOOD}\n",
        f"§<tool_call>\n{GOOD}\n§</tool_call>",
        f"§ <tool_call>{GOOD}§\n</tool_call>",
        # Names in any quotes, or in none.
        "§<invoke name='f'>§<a>1§</a>§</invoke>",
        "§<invoke name=f>§<a>1§</a>§</invoke>",
        '§<invoke  name = "f" >§<a>1§</a>§</invoke>',
        '§<invoke to="f">§<a>1§</a>§</invoke>',
        '§\n<invoke name="f">§<a>1§</a>§ </invoke>',
        # The token is missing: on a parameter's tags, on the closing tag alone, on the invoke's end.
        '§<invoke name="f"><a>1</a>§</invoke>',
        '§<invoke name="f">§<a>1</a>§</invoke>',
        '§<invoke name="f">§<a>1§</a></invoke>',
        '§<invoke name="f">§<a>1</a></invoke>',
        # The token by itself, within a value.
        '§<invoke name="f">§<a>§1§</a>§</invoke>',
    ],
)
def test_what_is_read_without_a_word(text: str) -> None:
    assert read(text) == ([CALL], [])


@pytest.mark.parametrize(
    ("text", "calls", "problems"),
    [
        # Not closed.
        (f'{GOOD}§<invoke name="g">§<a>1', [CALL], ["the call of g is not closed"]),
        ('§<invoke name="f">§<a>1§</a>', [], ["the call of f is not closed"]),
        (f'§<invoke name="g">§<a>1{GOOD}', [CALL], ["the call of g is not closed"]),
        ('§<invoke name="f">§<a>1§</invoke>', [], ["the call of f does not close <a>"]),
        ('§<invoke name="f', [], ["""text that belongs to no call: '<invoke name="f'"""]),
        # A tag that closes something else.
        ('§<invoke name="f">§<a>1§</b>§</invoke>', [], ["the call of f has </b> where </a> was to come"]),
        (
            f'§<invoke name="g">§</a>§</invoke>{GOOD}',
            [CALL],
            ["the call of g has </a> where a parameter or </invoke> was to come"],
        ),
        # Text where there should be none.
        (f"oh {GOOD}", [CALL], ["text that belongs to no call: 'oh'"]),
        (f"{GOOD} oh", [CALL], ["text that belongs to no call: 'oh'"]),
        (
            '§<invoke name="f">oh§<a>1§</a>§</invoke>',
            [CALL],
            ["text between the parameters of f: 'oh'"],
        ),
        # A tool that was not offered.
        (
            '§<invoke name="g">§<a>1§</a>§</invoke>',
            [("g", {"a": "1"})],
            ["g is none of the tools that were offered"],
        ),
        ("", [], []),
        ("no call", [], ["text that belongs to no call: 'no call'"]),
    ],
)
def test_what_is_complete_is_kept_and_the_rest_reported(
    text: str, calls: list[Any], problems: list[str]
) -> None:
    assert read(text) == (calls, problems)


@pytest.mark.parametrize(
    ("value", "read_as"),
    [
        # Objects and lists whose tags lack the token, in part or all of them.
        ("§<o>§<b>1§</b>§<c>x§</c>§</o>", {"o": {"b": 1, "c": "x"}}),
        ("§<o><b>1</b><c>x</c>§</o>", {"o": {"b": 1, "c": "x"}}),
        ("§<o>§<b>1</b>§<c>x</c></o>", {"o": {"b": 1, "c": "x"}}),
        ("§<l>§<item>1§</item>§<item>2§</item>§</l>", {"l": [1, 2]}),
        ("§<l><item>1</item><item>2</item>§</l>", {"l": [1, 2]}),
        # In a string, tags without the token are the string's.
        ("§<s><b>1</b>§</s>", {"s": "<b>1</b>"}),
        ("§<s></s>§</s>", {"s": "</s>"}),
        ("§<s> \n x <§</s>", {"s": " \n x <"}),
        # A repeated tag is a list.
        ("§<l>1§</l>§<l>2§</l>", {"l": [1, 2]}),
    ],
)
def test_values_with_and_without_the_token(value: str, read_as: dict[str, Any]) -> None:
    assert read(f'§<invoke name="f">{value}§</invoke>') == ([("f", read_as)], [])


def test_the_parsers_contract_with_servers(caplog: pytest.LogCaptureFixture) -> None:
    """A dict for one call, a list for more, an error for none; what is wrong beside them is logged."""
    one = {"name": "f", "arguments": {"a": 1}}
    with caplog.at_level(logging.WARNING):
        assert parse_tool_call(marked(GOOD), TOOLS) == one
        assert parse_tool_call(marked(GOOD * 2), TOOLS) == [one, one]
        assert caplog.text == ""
        assert parse_tool_call(marked(GOOD + '§<invoke name="g">'), TOOLS) == one
        assert "the call of g is not closed" in caplog.text
    with pytest.raises(ToolCallError, match="the call of g is not closed"):
        parse_tool_call(marked('§<invoke name="g">'), TOOLS)
    with pytest.raises(ToolCallError, match="the tool-call block is empty"):
        parse_tool_call("\n", TOOLS)


def test_problems_without_end_are_not_all_told() -> None:
    calls, problems = read("§x" * 1000 + GOOD)
    assert calls == [CALL]
    assert len(problems) == MOST_PROBLEMS
