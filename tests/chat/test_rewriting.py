"""Replies rewritten for servers: markers whole and true, blocks closed, nothing else changed."""

import logging
import random
from collections.abc import Callable

import pytest

from mlx_m3_plugin.chat.markers import calls_in, restored, without_calls
from mlx_m3_plugin.chat.rewriting import ReplyRewriter
from mlx_m3_plugin.chat.tool_calls import parse_tool_call
from tests.chat.tool_rendering import marked
from tests.chat.tool_replies import MARKERS, sample

CALL = '§<tool_call>\n§<invoke name="f">§<a>1§</a>§</invoke>\n§</tool_call>'
BLOCK = '§<tool_call>{"name": "f", "arguments": {"a": "1"}}§</tool_call>'
WHOLE = (*MARKERS[:2], marked("§<tool_call>"), marked("§</tool_call>"))


def rewritten(pieces: list[str], in_reasoning: bool = False, calls_are_text: bool = False) -> list[str]:
    rewriter = ReplyRewriter([], in_reasoning, calls_are_text)
    return [*map(rewriter.feed, pieces), rewriter.finish()]


@pytest.mark.parametrize(
    ("text", "in_reasoning", "result"),
    [
        ("hi", False, "hi"),
        ("<mm:think>why</mm:think>hi", False, "<mm:think>why</mm:think>hi"),
        ("why</mm:think>hi", True, "<mm:think>why</mm:think>hi"),
        ("why", True, "<mm:think>why"),
        ("", True, "<mm:think>"),
        ("</mm:think>hi", False, "hi"),
        ("<mm:think></mm:think>hi", False, "hi"),
        ("hi</mm:think> you", False, "hi you"),
        ("<mm:think>a<mm:think>b</mm:think>c", False, "<mm:think>ab</mm:think>c"),
        (f"hi{CALL}", False, f"hi{BLOCK}"),
        (f"<mm:think>why{CALL}hi", False, f"<mm:think>why</mm:think>{BLOCK}<mm:think>hi"),
        (CALL.replace("§<tool_call>\n", "").replace("\n§</tool_call>", ""), False, BLOCK),
        (f"hi{CALL[:-13]}", False, f"hi{BLOCK}"),
        # Calls in which there are markers.
        (CALL.replace("1", "</mm:think>"), False, BLOCK.replace("1", "\\u003c/mm:think>")),
        # Markers that are text.
        ('hi§<tool_call>§<invoke name="f">§<a>1', False, 'hi§<tool_call>§<invoke name="f">§<a>1'),
        ("hi§ you§<tool_c", False, "hi§ you§<tool_c"),
        ("</mm:</mm:think>think>", False, "</mm:think>"),
    ],
)
def test_what_a_server_sees(text: str, in_reasoning: bool, result: str) -> None:
    for pieces in ([marked(text)], list(marked(text))):
        seen = "".join(rewritten(pieces, in_reasoning))
        assert restored(seen) == marked(result)
        # What is not a marker does not look like one.
        is_shown = "<tool_call>" in text and BLOCK[15:20] not in result
        assert not (is_shown and marked("§") in seen)


def test_cuts_change_nothing_and_no_marker_is_in_two_pieces(
    count: Callable[[int, int], int], fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(count(100, 2000)):
        made = sample(rng)
        whole = "".join(rewritten([made.text], made.in_reasoning))
        cuts = sorted(rng.choices(range(len(made.text) + 1), k=rng.randint(1, 12)))
        pieces = [made.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(made.text)], strict=True)]
        returned = rewritten(pieces, made.in_reasoning)
        assert restored("".join(returned)) == restored(whole)
        for marker in WHOLE:
            assert sum(piece.count(marker) for piece in returned) == whole.count(marker)


def test_what_is_not_to_be_called_is_text() -> None:
    for text in (f"hi{CALL}you", 'hi§<tool_call>\n§<invoke name="f">§<a>1', f"hi{CALL}{CALL}"):
        for pieces in ([marked(text)], list(marked(text))):
            seen = "".join(rewritten(pieces, calls_are_text=True))
            assert restored(seen) == marked(text)
            assert marked("§") not in seen


def test_repairs_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        rewritten([marked(CALL)])
        assert caplog.text == ""
        rewritten([marked(CALL.replace("§</a>", "§</b>"))])
        assert "wrong closing tag, f" in caplog.text


def test_calls_come_back_from_what_a_server_sees() -> None:
    seen = "".join(rewritten([marked(f"a{CALL}b{CALL}c")]))
    assert without_calls(seen) == "abc"
    assert [parse_tool_call(text, []) for text in calls_in(seen)] == [
        {"name": "f", "arguments": {"a": "1"}}
    ] * 2
