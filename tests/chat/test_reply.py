"""Replies as they stream: the same however they are cut, and every decision on what is out of place."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from mlx_m3_plugin.chat.calls import ToolCall
from mlx_m3_plugin.chat.prompt import thinking_mode
from mlx_m3_plugin.chat.reply import Event, ReplyParser
from tests.chat.tool_rendering import marked
from tests.chat.tool_replies import MARKERS, Reply, read, sample
from tests.chat.tool_shapes import SHAPES, TOOLS, growth

CALL = '§<tool_call>\n§<invoke name="f">§<a>1§</a>§</invoke>\n§</tool_call>'
INVOKE = '§<invoke name="f">§<a>1§</a>§</invoke>'
CALLED = [ToolCall("f", {"a": "1"})]


def test_cuts_change_nothing(count: Callable[[int, int], int], fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(count(30, 2000)):
        made = sample(rng)
        text, in_reasoning = made.text, made.in_reasoning
        whole, _ = read([text], in_reasoning, [])
        # White space beside calls may be dropped.
        assert solid(whole.reasoning) == solid(made.says.reasoning), text
        assert solid(whole.content) == solid(made.says.content), text
        assert whole.calls == made.says.calls, text
        assert not (whole.repairs and made.is_well_formed), (text, whole.repairs)

        cuts = [[at] for at in range(len(text) + 1)] + [list(range(len(text)))]
        cuts += [sorted(rng.choices(range(len(text) + 1), k=rng.randint(2, 12))) for _ in range(10)]
        for cut in cuts:
            pieces = [text[begin:end] for begin, end in zip([0, *cut], [*cut, len(text)], strict=True)]
            reply, events = read(pieces, in_reasoning, [])
            assert reply == whole, pieces
            assert not any(
                marker in event.text for event in events for marker in MARKERS[:2] if is_text(event)
            )


def solid(text: str) -> str:
    return "".join(text.split())


def is_text(event: Event) -> bool:
    return event.kind in ("reasoning", "content")


def test_nothing_is_returned_that_later_becomes_a_marker(fresh_seed: int) -> None:
    """What was returned after some of the text is the beginning of what is returned after all of it."""
    rng = random.Random(fresh_seed)
    for _ in range(30):
        made = sample(rng)
        whole, _ = read([made.text], made.in_reasoning, [])
        parser, reply = ReplyParser([], made.in_reasoning), Reply()
        for piece in made.text:
            for event in parser.feed(piece):
                reply.add(event)
            assert whole.content.startswith(reply.content)
            assert whole.reasoning.startswith(reply.reasoning)
            assert whole.calls[: len(reply.calls)] == reply.calls


def test_only_what_may_be_a_marker_is_held_back() -> None:
    parser = ReplyParser()
    assert parser.feed("a < b <m") == [Event("content", "a < b ")]
    assert parser.feed("m:thin") == []
    assert parser.feed("g") == [Event("content", "<mm:thing")]
    assert parser.feed(marked("x§")[:-1]) == [Event("content", "x")]
    assert parser.feed("!") == [Event("content", marked("§")[:-1] + "!")]
    assert parser.feed("</mm:think") == []
    assert parser.finish() == [Event("content", "</mm:think")]
    assert parser.finish() == []


def test_a_call_is_returned_when_its_invoke_closes() -> None:
    parser = ReplyParser(TOOLS)
    assert parser.feed("x" + marked(CALL.split("§</invoke>")[0] + "§</invoke")) == [Event("content", "x")]
    assert parser.feed(">") == [Event("call", call=ToolCall("f", {"a": 1}))]
    assert parser.feed(marked("\n§</tool_call> y")) == [Event("content", " y")]


@pytest.mark.parametrize("size", [1, 4])
def test_what_is_certain_is_not_held_back(size: int) -> None:
    name = "longer_than_any_marker"
    quoting = f'§<tool_call>§<invoke name="f">§<{name}>see §</tool_call>§</{name}>§</invoke>'
    quoted = ToolCall("f", {name: marked("see §</tool_call>")})
    json_text = '{"b": "c"} !'
    for text, content, calls in (
        (marked(quoting), "", [quoted]),
        (marked(CALL.replace("\n§</tool_call>", json_text)), json_text, CALLED),
    ):
        parser = ReplyParser([])
        events = [e for at in range(0, len(text), size) for e in parser.feed(text[at : at + size])]
        assert "".join(event.text for event in events) == content
        assert [event.call for event in events if event.call] == calls


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        # Reasoning.
        ("<mm:think>why</mm:think>hi", "why", "hi", 0),
        ("<mm:think>\nwhy\n</mm:think>\n\nhi", "\nwhy\n", "\n\nhi", 0),
        ("</mm:think>hi", "", "hi", 0),
        ("hi</mm:think> you</mm:think>", "", "hi you", 0),
        ("hi<mm:think>why", "why", "hi", 0),
        ("<mm:think>a<mm:think>b</mm:think>c", "ab", "c", 0),
        ("<mm:think>a</mm:think>b<mm:think>c</mm:think>d", "ac", "bd", 0),
        ("<think>hi</think>", "", "<think>hi</think>", 0),
        ("", "", "", 0),
        # Calls.
        (f"hi{CALL}", "", "hi", 1),
        (f"hi\n{CALL}\nyou{CALL}.", "", "hi\n\nyou.", 2),
        # Reasoning goes on after a call in it.
        (f"<mm:think>why{CALL}hm</mm:think>hi", "whyhm", "hi", 1),
        (f"<mm:think>why</mm:think>{CALL}<mm:think>and</mm:think>hi", "whyand", "hi", 1),
        (f"§<tool_call>{INVOKE}{INVOKE}§</tool_call>", "", "", 2),
        (f"§ \n<tool_call>{INVOKE}§\t</tool_call>", "", "", 1),
        # Blocks that are not whole.
        (f"hi§<tool_call>{INVOKE}\n", "", "hi", 1),
        (f"hi§<tool_call>{INVOKE}§", "", "hi§", 1),
        ('hi§<tool_call>§<invoke name="f">§<a>1', "", 'hi§<tool_call>§<invoke name="f">§<a>1', 0),
        ('hi§<tool_call>§<invoke name="f">§</tool_call>you', "", "hiyou", 1),
        ("hi§<tool_call>§</tool_call>you", "", "hi§<tool_call>§</tool_call>you", 0),
        (f"hi§<tool_call>oh{INVOKE}§</tool_call>you", "", "hiohyou", 1),
        (f"hi§<tool_call>{INVOKE}oh§</tool_call>you", "", "hiohyou", 1),
        (f"hi§<tool_call>§<tool_call>{INVOKE}§</tool_call>", "", "hi", 1),
        ("hi§<tool_c", "", "hi§<tool_c", 0),
        ("hi§ ", "", "hi§ ", 0),
        ("hi§</tool_call>", "", "hi§</tool_call>", 0),
        # Markers that are talked about.
        ("<mm:think>a §<tool_call> b</mm:think>c", "a §<tool_call> b", "c", 0),
        (f"a §<tool_call> b<mm:think>c</mm:think>{CALL}d", "c", "a §<tool_call> bd", 1),
        ('<mm:think>§<invoke name="f">§<a>1</mm:think>c', '§<invoke name="f">§<a>1', "c", 0),
        (f'<mm:think>§<invoke name="f"> b</mm:think>c{CALL}', '§<invoke name="f"> b', "c", 1),
        # Without a block around it, a call is a call, and text after it is text.
        (f"hi{INVOKE} you", "", "hi you", 1),
        (f"{INVOKE}{INVOKE}§</tool_call>x", "", "x", 2),
        # The token by itself.
        ("hi§ you", "", "hi§ you", 0),
        ("hi§<b>", "", "hi§<b>", 0),
        ("<mm:think>hm§ so</mm:think>hi", "hm§ so", "hi", 0),
        (f"§{' ' * 9}<tool_call>", "", f"§{' ' * 9}<tool_call>", 0),
        # Tags without the token are text.
        ("<tool_call><invoke></invoke></tool_call>", "", "<tool_call><invoke></invoke></tool_call>", 0),
        # Markers in a call are its text.
        (CALL.replace("1", "</mm:think>"), "", "", 1),
    ],
)
def test_what_a_reply_says(text: str, reasoning: str, content: str, calls: int) -> None:
    for pieces in ([marked(text)], list(marked(text))):
        reply, _ = read(pieces, tools=[])
        assert (reply.reasoning, reply.content) == (marked(reasoning), marked(content))
        assert [call.name for call in reply.calls] == ["f"] * calls


def test_a_reply_may_begin_inside_reasoning() -> None:
    for text, reasoning, content in (
        ("why</mm:think>hi", "why", "hi"),
        ("<mm:think>why</mm:think>hi", "why", "hi"),
        ("why", "why", ""),
        ("</mm:think>hi", "", "hi"),
    ):
        reply, _ = read([text], in_reasoning=True)
        assert (reply.reasoning, reply.content) == (reasoning, content)
    reply, _ = read([marked(f"why{CALL}")], in_reasoning=True, tools=[])
    assert (reply.reasoning, reply.content, reply.calls) == ("why", "", CALLED)


def test_calls_have_the_types_of_their_tools() -> None:
    reply, _ = read([marked(CALL)], tools=TOOLS)
    assert reply.calls == [ToolCall("f", {"a": 1})]


@pytest.mark.some(20)
@pytest.mark.parametrize("piece", [4, 10**9], ids=["by tokens", "whole"])
@pytest.mark.parametrize("shape", SHAPES)
def test_time_grows_as_the_text(shape: str, piece: int, count: Callable[[int, int], int]) -> None:
    def work(text: str) -> Any:
        parser = ReplyParser(TOOLS)
        for begin in range(0, len(text), piece):
            parser.feed(text[begin : begin + piece])
        parser.finish()

    assert growth(work, SHAPES[shape], count(100_000, 1_000_000)) < 3


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ({}, None),
        ({"thinking_mode": "enabled"}, "enabled"),
        ({"thinking_mode": "disabled"}, "disabled"),
        ({"thinking_mode": "adaptive"}, "adaptive"),
        ({"thinking_mode": None}, None),
        ({"enable_thinking": True}, "enabled"),
        ({"enable_thinking": False}, "disabled"),
        ({"enable_thinking": None}, None),
        ({"enable_thinking": "yes"}, None),
        ({"enable_thinking": 1}, None),
        ({"thinking_mode": "adaptive", "enable_thinking": False}, "adaptive"),
        ({"thinking_mode": None, "enable_thinking": False}, "disabled"),
    ],
)
def test_thinking_mode(arguments: dict[str, Any], mode: str | None) -> None:
    assert thinking_mode(arguments) == mode


@pytest.mark.parametrize("mode", ["on", "Enabled", "", True, False, 5, ["enabled"]])
def test_another_thinking_mode_is_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match="thinking_mode must be one of enabled, disabled, adaptive"):
        thinking_mode({"thinking_mode": mode, "enable_thinking": True})
