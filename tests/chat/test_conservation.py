"""Every character of a reply is in its reasoning, its content or a call, but for what is a marker."""

import random
import re
from collections import Counter
from collections.abc import Callable

from mlx_m3_plugin.chat.reply import Event, ReplyParser
from mlx_m3_plugin.chat.rewriting import ReplyRewriter, calls_in, restored, without_calls
from tests.chat import tool_fuzz
from tests.chat.tool_faults import tags
from tests.chat.tool_values import NS

PIECES = [
    *("<mm:think>", "</mm:think>", NS, f"{NS}<tool_call>", f"{NS}</tool_call>", f"{NS}<tool_call>\n"),
    *("<mm:thi", "</mm:", "<tool_call>", f"{NS}<tool_c", f"{NS}<invoke na", f"{NS} "),
    *("text", "a < b", "[x]", "\n", " ", "ü", "{", '{"name": "f"}', "<invoke", "</invoke>", "]"),
    *(f'{NS}<invoke name="f">', f"{NS}</invoke>", f"{NS}<a>", f"{NS}</a>", f"{NS}<b>", f"{NS}</b>"),
    *(f'{NS}<invoke name="f">{NS}<a>one{NS}</a>{NS}</invoke>', f"{NS}<a>two{NS}</a>", f"{NS}<item>"),
    f'{NS}<tool_call>\n{NS}<invoke name="g">{NS}<b>see{NS}</b>{NS}</invoke>\n{NS}</tool_call>',
]
HALVES = ["]<]minimax", "[>[", "<mm:", "think>"]
STRING = {"type": "string"}
PARAMETERS = {"type": "object", "properties": {"a": STRING, "b": {"type": "array", "items": STRING}}}
TOOLS = [{"name": name, "parameters": PARAMETERS} for name in "fg"]
_TAGS = re.compile(
    rf"</?mm:think>|{re.escape(NS)}\s*</?[^<>\0]*>|</?invoke[^<>\0]*>|</?tool_call>|[\s\0]|{re.escape(NS)}"
)


def test_nothing_is_lost(count: Callable[[int, int], int], fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(count(1_500, 100_000)):
        halves = HALVES if rng.random() < 0.3 else []
        text = "".join(rng.choices(PIECES + halves, k=rng.randint(1, 12)))
        in_reasoning, tools = rng.random() < 0.3, rng.choice([TOOLS, [], None])
        whole = events_of([text], in_reasoning, tools)
        # Halves may meet where a marker was.
        assert halves or lost(text, whole) == "", (text, whole)
        for pieces in (tool_fuzz.pieces(rng, text), list(text)):
            assert joined(events_of(pieces, in_reasoning, tools)) == joined(whole), (text, pieces)
            rewriter = ReplyRewriter(tools, in_reasoning)
            rewritten = "".join(map(rewriter.feed, pieces)) + rewriter.finish()
            assert as_the_other_server_splits(rewritten) == sides(whole), text


def events_of(pieces: list[str], in_reasoning: bool, tools: object) -> list[Event]:
    parser = ReplyParser(tools, in_reasoning)
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def joined(events: list[Event]) -> list[tuple[str, str]]:
    """With texts of one kind together."""
    found: list[tuple[str, str]] = []
    for event in events:
        text = event.text if event.call is None else str(event.call)
        if found and found[-1][0] == event.kind and event.kind in ("reasoning", "content"):
            text = found.pop()[1] + text
        found.append((event.kind, text))
    return found


def lost(text: str, events: list[Event]) -> str:
    """Characters of the text that are in no event.  Markers that are text are looked at as a whole."""
    said = [text for kind, text in joined(events) if kind in ("reasoning", "content")]
    said += ["".join(tags(e.call.arguments)) for e in events if e.call]
    missing = Counter(_TAGS.sub("", text)) - Counter(_TAGS.sub("", "\0".join(said)))
    # A name that is damaged or in quotes belongs to a tag, and so does the rest of a JSON call.
    if any("header" in e.text or "JSON" in e.text for e in events if e.kind == "repair"):
        return ""
    return "".join(missing.elements())


def sides(events: list[Event]) -> tuple[str, str, int]:
    texts = {kind: "".join(e.text for e in events if e.kind == kind) for kind in ("reasoning", "content")}
    return texts["reasoning"], texts["content"], sum(e.kind == "call" for e in events)


def as_the_other_server_splits(rewritten: str) -> tuple[str, str, int]:
    """By markers alone."""
    said, channel = {"reasoning": "", "content": ""}, "content"
    for piece in re.split("(</?mm:think>)", rewritten):
        if piece.endswith("mm:think>") and piece.startswith("<"):
            channel = "content" if piece.startswith("</") else "reasoning"
        else:
            said[channel] += piece
    content = restored(without_calls(said["content"]))
    return restored(said["reasoning"]), content, len(calls_in(rewritten))


def test_a_marker_that_is_text_stays(count: Callable[[int, int], int]) -> None:
    text = f"see {NS}<tool_call> and {NS}"
    assert sides(events_of([text], False, TOOLS)) == ("", text, 0)
    thought = f"<mm:think>I would write {NS}<tool_call> but not yet</mm:think>Hello"
    expected = (f"I would write {NS}<tool_call> but not yet", "Hello", 0)
    assert sides(events_of(list(thought), False, TOOLS)) == expected
