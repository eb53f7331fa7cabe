"""Every decision of docs/tool-calls.md on text that is no well-formed block, and the parser's contract."""

import json
import logging
from typing import Any

import pytest

from mlx_m3_plugin.chat.reply import ReplyParser
from mlx_m3_plugin.chat.tool_calls import (
    RepairLog,
    ToolCallError,
    parse_tool_call,
    tool_call_end,
    tool_call_start,
)
from tests.chat.tool_rendering import marked
from tests.chat.tool_replies import read, read_block

PROPERTIES = {
    "a": {"type": "integer"},
    "s": {"type": "string"},
    "o": {"type": "object", "properties": {"b": {"type": "integer"}, "c": {"type": "string"}}},
    "l": {"type": "array", "items": {"type": "integer"}},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": PROPERTIES}}}]
GOOD = '§<invoke name="f">§<a>1§</a>§</invoke>'
CALL = ("f", {"a": 1})


def calls_of(text: str, tools: Any = TOOLS) -> list[tuple[str, Any]]:
    return [(call.name, call.arguments) for call in read_block(marked(text), tools).calls]


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
        '§<invoke name="f" id="1">§<a>1§</a>§</invoke>',
        '§\n<invoke name="f">§<a>1§</a>§ </invoke>',
        # The token is missing: on a parameter's tags, on the closing tag alone, on the invoke's end.
        '§<invoke name="f"><a>1</a>§</invoke>',
        '§<invoke name="f">§<a>1</a>§</invoke>',
        '§<invoke name="f">§<a>1§</a></invoke>',
        '§<invoke name="f">§<a>1</a></invoke>',
        '<invoke name="f">\n<parameter name="a">1</parameter>\n</invoke>',
        # The token by itself, in a value that can't have it.
        '§<invoke name="f">§<a>§1§</a>§</invoke>',
    ],
)
def test_what_is_read_as_one_call(text: str) -> None:
    reply = read_block(marked(text), TOOLS)
    assert ([(call.name, call.arguments) for call in reply.calls], reply.content) == ([CALL], "")


@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        # Not closed.
        (f'{GOOD}§<invoke name="g">§<a>1', [CALL], '§<invoke name="g">§<a>1'),
        ('§<invoke name="f">§<a>1§</a>', [], '§<invoke name="f">§<a>1§</a>'),
        ('§<invoke name="f', [], '§<invoke name="f'),
        ('§<invoke name="f">§<a>1§</tool_call>', [], '§<invoke name="f">§<a>1§</tool_call>'),
        # Text where there should be none.
        (f"oh {GOOD}", [CALL], "oh "),
        (f"{GOOD} oh", [CALL], " oh"),
        ('§<invoke name="f">oh§<a>1§</a>§</invoke>', [CALL], "oh"),
        # A tool that was not offered: the client decides.
        ('§<invoke name="g">§<a>1§</a>§</invoke>', [("g", {"a": "1"})], ""),
        # A tag that closes something else, with text after it: text of a string, and of nothing else.
        ('§<invoke name="f">§<s>1§</x>2§</s>§</invoke>', [("f", {"s": marked("1§</x>2")})], ""),
        ('§<invoke name="f">§<a>1§</x>2§</a>§</invoke>', [], '§<invoke name="f">§<a>1§</x>2§</a>§</invoke>'),
        # Nothing but text: the arguments as JSON, or no call.
        ('§<invoke name="f">{"a": 1}§</invoke>', [CALL], ""),
        ('§<invoke name="f">oh§</invoke>', [], '§<invoke name="f">oh§</invoke>'),
        # JSON that is no call.
        ('{"name": "nobody", "arguments": {}}', [], '{"name": "nobody", "arguments": {}}'),
        ('{"name": "f"', [], '{"name": "f"'),
        (f'{{"name": "f", "arguments": {{"a": 1}}}} {GOOD}', [CALL, CALL], ""),
        ('[{"name": "f", "arguments": "{\\"a\\": 1}"}]', [CALL], ""),
        ("", [], ""),
        ("no call", [], "no call"),
    ],
)
def test_what_is_no_call_is_text(text: str, calls: list[Any], content: str) -> None:
    reply = read_block(marked(text), TOOLS)
    assert [(call.name, call.arguments) for call in reply.calls] == calls
    assert reply.content == marked(content)


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
    assert calls_of(f'§<invoke name="f">{value}§</invoke>') == [("f", read_as)]


@pytest.mark.parametrize(
    ("value", "read_as"),
    [
        ("3", 3),
        ("-1.5e3", -1500.0),
        ("true", True),
        ("null", None),
        ('[1, {"b": 2}]', [1, {"b": 2}]),
        ('{"b": [null]}', {"b": [None]}),
        ("§<item>1§</item>§<item>x§</item>", [1, "x"]),
        (" x\n", " x\n"),
        ("007", "007"),
        ("NaN", "NaN"),
        ("1e999", "1e999"),
        ('"3"', '"3"'),
        ("", ""),
    ],
)
def test_without_tools_arguments_are_json(value: str, read_as: Any) -> None:
    text = marked(f'§<invoke name="f">§<p>{value}§</p>§</invoke>')
    made = parse_tool_call(text)
    assert json.dumps(made) == json.dumps({"name": "f", "arguments": {"p": read_as}})
    # Tools that are none are known to have no schema.
    if value == "3":
        assert parse_tool_call(text, []) == {"name": "f", "arguments": {"p": "3"}}


def test_the_parsers_contract_with_servers(caplog: pytest.LogCaptureFixture) -> None:
    """A dict for one call, a list for more, an error for none; repairs are logged."""
    one = {"name": "f", "arguments": {"a": 1}}
    with caplog.at_level(logging.INFO):
        assert parse_tool_call(marked(GOOD), TOOLS) == one
        assert parse_tool_call(marked(GOOD * 2), TOOLS) == [one, one]
        assert caplog.text == ""
        assert parse_tool_call(marked(GOOD.replace("§</a>", "§</secret>") * 2), TOOLS) == [one, one]
        assert [record.message for record in caplog.records] == [
            "mlx-m3-plugin: repaired a tool call: wrong closing tag, f"
        ]
    for text in ('§<invoke name="g">§<a>', "\n"):
        with pytest.raises(ToolCallError, match="no complete call"):
            parse_tool_call(marked(text), TOOLS)


def test_each_kind_of_repair_is_logged_once_without_values(caplog: pytest.LogCaptureFixture) -> None:
    log = RepairLog()
    text = marked('§<tool_call>§<invoke name="f">§<s>secret§</t>§<a>5§</invoke>§</tool_call>' * 3)
    with caplog.at_level(logging.INFO):
        log.add(read([text], tools=TOOLS)[1])
    kinds = ["wrong closing tag, f", "closing tag missing, f"]
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == kinds


@pytest.mark.parametrize(
    "text",
    [
        # What would be a tag is text where it can't be one.
        "§<invoke name='x'>§<y>1§</y>§</invoke> so",
        "a §</invoke> b",
        "a §<tool_call> b",
        "a §</tool_call> b",
        "a § b",
    ],
)
def test_the_token_in_a_value(text: str) -> None:
    whole = marked(f'§<tool_call>§<invoke name="f">§<s>{text}§</s>§</invoke>§</tool_call>')
    for pieces in ([whole], list(whole)):
        reply, _ = read(pieces, tools=TOOLS)
        assert [call.arguments for call in reply.calls] == [{"s": marked(text)}]
        assert reply.content == ""


def test_a_value_of_many_pieces_is_not_held_twice() -> None:
    """What is read of a long value is not read again with each piece."""
    parser = ReplyParser(TOOLS)
    parser.feed(marked('§<tool_call>§<invoke name="f">§<s>'))
    for _ in range(1000):
        parser.feed("some text ")
        assert len(parser._text) < 100
