"""Faults that M3 is known to write, and the right reading: ``replies.json``."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests.chat.tool_rendering import marked
from tests.chat.tool_replies import read

CASES = json.loads(Path(__file__).with_name("replies.json").read_text(encoding="utf-8"))["cases"]
_MARKER = re.compile(r"§|</?mm:think>|.", re.DOTALL)


def pieces_of(text: str) -> list[list[str]]:
    """Whole, by characters with markers whole, and at random."""
    characters = [marked(piece) for piece in _MARKER.findall(text)]
    cut = [[marked(text)], characters]
    for seed in range(8):
        rng, at, pieces = random.Random(seed), 0, []
        whole = marked(text)
        while at < len(whole):
            size = rng.randint(1, 12)
            pieces.append(whole[at : at + size])
            at += size
        cut.append(pieces)
    return cut


def tools_of(case: dict[str, Any]) -> list[Any]:
    return [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in case["tools"].items()
    ]


def case_id(case: dict[str, Any]) -> str:
    return f"{CASES.index(case)}-{case['kind']}"


def expected_calls(case: dict[str, Any]) -> list[Any]:
    return json.loads(marked(json.dumps(case["calls"], ensure_ascii=False)))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_reply(case: dict[str, Any]) -> None:
    for pieces in pieces_of(case["text"]):
        reply, _ = read(pieces, tools=tools_of(case))
        calls = [[call.name, call.arguments] for call in reply.calls]
        # True is not 1; 2 is 2.0, as a number's schema takes both.
        assert calls == expected_calls(case)
        assert str(calls).count("True") == str(case["calls"]).count("True")
        content, expected = reply.content, marked(case["content"])
        if calls:
            content, expected = content.strip(), expected.strip()
        assert content == expected
        assert reply.reasoning == marked(case["reasoning"])


# Of the same kinds: other types, places and spellings.
MORE = json.loads(Path(__file__).with_name("more_replies.json").read_text(encoding="utf-8"))


def test_more_replies() -> None:
    for case in MORE:
        tools = case["tools"] and [
            {"name": name, "parameters": {"type": "object", "properties": properties}}
            for name, properties in case["tools"].items()
        ]
        for pieces in pieces_of(case["text"])[:3]:
            reply, _ = read(pieces, tools=tools)
            calls = [[call.name, call.arguments] for call in reply.calls]
            assert json.dumps(calls) == json.dumps(expected_calls(case)), case
            assert reply.content.strip() == marked(case.get("content", "")).strip(), case
            assert reply.reasoning == marked(case.get("reasoning", "")), case
