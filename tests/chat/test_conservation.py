"""Every character of a reply is in its reasoning, its content or a call, but for what is a marker."""

import json
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_m3_plugin.chat.reply import Event, ReplyParser
from mlx_m3_plugin.chat.tool_calls import parse_tool_call
from mlx_m3_plugin.hosts.mlx_vlm.replies import _rewriter, _RewrittenTokens
from tests.chat import damaged_replies, tool_fuzz
from tests.chat.conservation import accounts_for
from tests.chat.damaged_replies import TOOLS
from tests.chat.tool_rendering import marked
from tests.hosts.test_tokenizer import taken_apart
from tests.vlm import test_vlm_chat as vlm

Sides = tuple[str, str, list[tuple[str, Any]]]


def test_nothing_is_lost(count: Callable[[int, int], int], fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(count(300, 100_000)):
        text, in_reasoning = damaged_replies.reply(rng), rng.random() < 0.3
        tools = rng.choice([TOOLS, TOOLS, [], None])
        whole = events_of([text], in_reasoning, tools)
        assert accounts_for(text, whole, in_reasoning), (text, in_reasoning, tools)
        pieces = tool_fuzz.pieces(rng, text)
        for cut in (pieces, list(text)):
            assert joined(events_of(cut, in_reasoning, tools)) == joined(whole), (text, cut)
        assert as_mlx_lm_splits(pieces, in_reasoning, tools) == sides(whole), (text, in_reasoning, tools)
        if not tools:
            # Where a request offers none, mlx-vlm's server makes no call.
            whole = events_of([text], in_reasoning, tools, calls_are_text=True)
            assert accounts_for(text, whole, in_reasoning)
        for shown in as_mlx_vlm_splits(pieces, in_reasoning, tools):
            assert without_blanks(shown) == without_blanks(sides(whole)), (text, in_reasoning, tools)


ARRAY_OR_OTHERS = {"anyOf": [{"type": "number"}, {"type": "array"}, {"type": "object"}]}
ANY_TOOLS = [{"name": "f", "parameters": {"type": "object", "properties": {"b": ARRAY_OR_OTHERS}}}]


@pytest.mark.parametrize("tools", [TOOLS, ANY_TOOLS], ids=["array", "array or others"])
@pytest.mark.parametrize(
    "value",
    [
        # Tags without their token, seen only once the whole value is there.
        '§<parameter name="b"><b>§</tool_call></b>§</parameter>',
        "§<b><item>§</tool_call></item>§</b>",
        "§<b><item>x</item>§</b>",
        '§<parameter name="b"><parameter name="b">x</parameter>§</parameter>',
    ],
)
def test_tags_without_their_token_in_a_value(value: str, tools: Any) -> None:
    text = marked(f'§<invoke name="f">{value}§</invoke>')
    for pieces in ([text], list(text)):
        events = events_of(pieces, False, tools)
        assert [event.text for event in events if event.kind == "repair"][-1] == "token missing, f"
        assert accounts_for(text, events)


HARMS = ["lost", "doubled", "moved", "no repair", "other channel", "a changed call"]


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_lost_is_found(harm: str) -> None:
    text = marked(
        "<mm:think>why</mm:think>So §<tool_call>§<invoke name='f'>§<a>one§</c>§</invoke>§</tool_call>!"
    )
    events = events_of([text], False, TOOLS)
    assert accounts_for(text, events)
    kinds = [event.kind for event in joined_events(events)]
    assert kinds == ["reasoning", "content", "repair", "call", "content"]
    reasoning, content, repair, call, last = joined_events(events)
    assert call.call
    harmed = {
        "lost": [reasoning, Event("content", "S "), repair, call, last],
        "doubled": [reasoning, Event("content", "Soo "), repair, call, last],
        "moved": [reasoning, content, Event("content", "!"), repair, call],
        "no repair": [reasoning, content, call, last],
        "other channel": [Event("content", "why"), content, repair, call, last],
        "a changed call": [reasoning, content, repair, Event("call", call=type(call.call)("f", {})), last],
    }
    assert not accounts_for(text, harmed[harm])


def events_of(
    pieces: list[str], in_reasoning: bool, tools: object, calls_are_text: bool = False
) -> list[Event]:
    parser = ReplyParser(tools, in_reasoning, calls_are_text=calls_are_text)
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def joined(events: list[Event]) -> list[tuple[str, str]]:
    return [
        (event.kind, event.text if event.call is None else str(event.call)) for event in joined_events(events)
    ]


def joined_events(events: list[Event]) -> list[Event]:
    """With texts of one kind together."""
    found: list[Event] = []
    for event in events:
        if found and found[-1].kind == event.kind and event.kind in ("reasoning", "content"):
            event = Event(event.kind, found.pop().text + event.text)
        found.append(event)
    return found


def sides(events: list[Event]) -> Sides:
    texts = {kind: "".join(e.text for e in events if e.kind == kind) for kind in ("reasoning", "content")}
    return texts["reasoning"], texts["content"], [(e.call.name, e.call.arguments) for e in events if e.call]


# --- by the servers' own functions ---


def as_mlx_lm_splits(pieces: list[str], in_reasoning: bool, tools: Any) -> Sides:
    place = 0 if in_reasoning else -1
    tokenizer: Any = SimpleNamespace(tool_parser=parse_tool_call, rfind_think_start=lambda prompt: place)
    parts = taken_apart(tokenizer, pieces, tools=tools)
    said = {name: "".join(text for state, text in parts if state == name) for name in ("reasoning", "normal")}
    calls = [json.loads(text) for state, text in parts if state == "tool"]
    return said["reasoning"], said["normal"], [(call["name"], call["arguments"]) for call in calls]


def as_mlx_vlm_splits(pieces: list[str], in_reasoning: bool, tools: Any) -> list[Sides]:
    """Whole, and streamed."""
    prompt = "]~b]ai\n" + ("<mm:think>" if in_reasoning else "")
    tokens = [vlm.Token(piece) for piece in pieces]
    tokens[-1].finish_reason = "stop"
    rewriter = _rewriter(prompt, SimpleNamespace(tools=tools))
    shown = [token.text for token in _RewrittenTokens(iter(tokens), rewriter)]
    return [vlm.whole("".join(shown)), vlm.streamed(shown)]


def without_blanks(said: Sides) -> Sides:
    """mlx-vlm puts blanks where calls were, and takes them away at both ends."""
    reasoning, content, calls = said
    return "".join(reasoning.split()), "".join(content.split()), calls


def test_halves_of_a_marker_around_a_call_are_text() -> None:
    call = "§<tool_call>§<invoke name='f'>§<a>one§</a>§</invoke>§</tool_call>"
    text = marked(f"<mm:{call}think>Hello")
    expected = ("", "<mm:think>Hello", [("f", {"a": "one"})])
    assert as_mlx_vlm_splits([text], False, TOOLS) == [expected, expected]


def test_a_marker_that_is_text_stays() -> None:
    text = marked("see §<tool_call> and §")
    assert sides(events_of([text], False, TOOLS)) == ("", text, [])
    thought = marked("<mm:think>I would write §<tool_call> but not yet</mm:think>Hello")
    expected = (marked("I would write §<tool_call> but not yet"), "Hello", [])
    assert sides(events_of(list(thought), False, TOOLS)) == expected
