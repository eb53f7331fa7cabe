"""Replies rewritten for servers: markers whole and true, blocks closed, nothing else changed."""

import logging
import random
from collections.abc import Callable

import pytest

from mlx_m3_plugin.chat.rewriting import ReplyRewriter
from mlx_m3_plugin.chat.tool_calls import MOST_PROBLEMS
from tests.chat.tool_rendering import marked
from tests.chat.tool_replies import MARKERS, read, sample

CALL = '§<tool_call>\n§<invoke name="f">§<a>1§</a>§</invoke>\n§</tool_call>'
BLOCK = '§<tool_call>\n§<invoke name="f">§<a>1§</a>§</invoke>§</tool_call>'
WHOLE = (*MARKERS[:2], marked("§<tool_call>"), marked("§</tool_call>"))


def rewritten(pieces: list[str], in_reasoning: bool = False, calls_are_text: bool = False) -> list[str]:
    rewriter = ReplyRewriter(None, in_reasoning, calls_are_text)
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
        (f"<mm:think>why{CALL}hi", False, f"<mm:think>why</mm:think>{BLOCK}hi"),
        (CALL.replace("§<tool_call>\n", "").replace("\n§</tool_call>", ""), False, BLOCK.replace("\n", "")),
        (f"hi{CALL[:-13]}", False, f"hi{BLOCK}"),
        ('hi§<tool_call>§<invoke name="f">§<a>1', False, "hi"),
        ("hi§ you§<tool_c", False, "hi you"),
    ],
)
def test_what_a_server_sees(text: str, in_reasoning: bool, result: str) -> None:
    for pieces in ([marked(text)], list(marked(text))):
        assert "".join(rewritten(pieces, in_reasoning)) == marked(result)


def test_cuts_change_nothing_and_no_marker_is_in_two_pieces(
    count: Callable[[int, int], int], fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(count(100, 2000)):
        made = sample(rng)
        if any(marker in said for said in (made.says.reasoning, made.says.content) for marker in MARKERS):
            continue
        whole = "".join(rewritten([made.text], made.in_reasoning))
        again, _ = read([whole])
        assert (again.reasoning, again.content) == (made.says.reasoning, made.says.content)
        assert again.calls == made.says.calls
        assert "not closed" not in str(again.problems)
        cuts = sorted(rng.choices(range(len(made.text) + 1), k=rng.randint(1, 12)))
        pieces = [made.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(made.text)], strict=True)]
        told = rewritten(pieces, made.in_reasoning)
        assert "".join(told) == whole
        for marker in WHOLE:
            assert sum(piece.count(marker) for piece in told) == whole.count(marker)


def test_where_no_tool_was_offered_calls_are_left_as_they_are() -> None:
    for text in (f"hi{CALL}you", 'hi§<tool_call>\n§<invoke name="f">§<a>1', f"hi{BLOCK}{CALL}"):
        for pieces in ([marked(text)], list(marked(text))):
            assert "".join(rewritten(pieces, calls_are_text=True)) == marked(text)


def test_what_is_left_out_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rewritten([marked('hi§<tool_call>§<invoke name="f">§<a>1')])
        assert "the call of f is not closed" in caplog.text
        caplog.clear()
        rewritten([marked("§x" * 1000)])
        assert len(caplog.records) == MOST_PROBLEMS
