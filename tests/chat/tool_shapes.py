"""Texts of a given size that a careless parser is slow on, and the time that parsers take."""

import gc
import time
from collections.abc import Callable
from typing import Any

from tests.chat.tool_rendering import marked

OPEN = '§<tool_call>§<invoke name="f">'
CLOSE = "§</a>§</invoke>§</tool_call>"
JSON = '§<tool_call>{"name": "f", "arguments": {"a": '
PARAMETERS = {
    "type": "object",
    "properties": {
        "a": {
            "anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}, {"type": "object"}]
        }
    },
    "additionalProperties": {"$ref": "#"},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]


def repeated(piece: str, before: str = "", after: str = "") -> Callable[[int], str]:
    begin, piece, end = marked(before), marked(piece), marked(after)
    return lambda size: begin + piece * (size // len(piece)) + end


SHAPES: dict[str, Callable[[int], str]] = {
    "one long text": repeated("x", OPEN + "§<a>", CLOSE),
    "plain text": repeated("some words, "),
    "tokens": repeated("§"),
    "tokens in a parameter": repeated("§x", OPEN + "§<a>", CLOSE),
    "tokens and blanks": repeated("§ \n"),
    "closers": repeated("</mm:think>"),
    "openers": repeated("<mm:think>"),
    "both": repeated("<mm:think>x</mm:think>"),
    "almost markers": repeated("<mm:think]<]minimax[>"),
    "blanks after a token": repeated(" ", "§", "<tool_call>"),
    "blanks at the end of a call": repeated(" ", OPEN + "§", "</invoke>"),
    "empty blocks": repeated("§<tool_call>§</tool_call>"),
    "calls": repeated('§<invoke name="f">§<a>1§</a>§</invoke>\n', "§<tool_call>", "§</tool_call>"),
    "calls never closed": repeated('§<invoke name="f">'),
    "a call never closed": repeated("x", OPEN + "§<a>"),
    "tags never closed": repeated("§<a>", OPEN),
    "tags never opened": repeated("§</a>", OPEN),
    "parameters": repeated("§<b>xx§</b>", OPEN, "§</invoke>"),
    "parameters of one name": repeated("§<a>1§</a>", OPEN, "§</invoke>"),
    "items": repeated("§<item>1§</item>", OPEN + "§<a>", CLOSE),
    "objects in a list": repeated("§<item>§<a>1§</a>§</item>", OPEN + "§<a>", CLOSE),
    "tags in text": repeated("<b>", OPEN + "§<a>", CLOSE),
    "closing tags in text": repeated("</a>", OPEN + "§<a>", CLOSE),
    "closing tags without their token": repeated("§<item>1</item>", OPEN + "§<a>", CLOSE),
    "elements without the token": repeated("<item>1</item>", OPEN + "§<a>", CLOSE),
    "parameters without the token": repeated("<b>xx</b>", OPEN, "§</invoke>"),
    "deep, then long": repeated("x", OPEN + "§<b>" * 98 + "§<a>", "§</a>" + "§</b>" * 98 + "§</invoke>"),
    "deep again and again": repeated("§<b>" * 90 + "§</b>" * 90, OPEN, "§</invoke>"),
    "many short numbers that are none": repeated("§<a>" + "1" * 3990 + "x§</a>", OPEN, "§</invoke>"),
    "one long number": repeated("1", OPEN + "§<a>", CLOSE),
    "JSON": repeated("1,", OPEN + "§<a>[", "1]" + CLOSE),
    "JSON never closed": repeated("[", OPEN + "§<a>", CLOSE),
    "a name never closed": repeated("x", '§<invoke name="'),
    "calls in a value": repeated('§<invoke name="f">§<a>'),
    "calls in a value, then reasoning": repeated('§<invoke name="f">§<a></mm:think><mm:think>'),
    "blocks that end in a value": repeated('§<tool_call>§<invoke name="f">§<a>§</tool_call>'),
    "ends of a block in a value": repeated("§</tool_call>", OPEN + "§<a>", CLOSE),
    "ends of an invoke in a value": repeated("§</invoke>x", OPEN + "§<a>", CLOSE),
    "blanks after the end of an invoke": repeated(" ", OPEN + "§<a>x§</invoke>", "x" + CLOSE),
    "openers of blocks": repeated("§<tool_call>"),
    "text in a block": repeated("x ", "§<tool_call>"),
    "JSON in blocks, never closed": repeated('§<tool_call>{"a'),
    "a long call in JSON": repeated(
        "x", '§<tool_call>{"name": "f", "arguments": {"a": "', '"}}§</tool_call>'
    ),
    "JSON of many pieces": repeated(
        "[],", '§<tool_call>{"name": "f", "arguments": {"a": [', "1]}}§</tool_call>"
    ),
    "damaged headers": repeated('§<invoke name bike">'),
    "tags that do not match": repeated("§<b>x§</c>", OPEN, "§</invoke>"),
    "one tag that does not match, then many": repeated("§<b>xx§</b>", OPEN + "§<a>x§</c>", "§</invoke>"),
    "opening tags that are lost": repeated("§x§</a>", OPEN, "§</invoke>"),
    "blanks in an invoke": repeated(" ", "§<invoke name", '="f">'),
}


def seconds(work: Callable[[], Any], runs: int = 3) -> float:
    """CPU time, the best of some runs.

    Without garbage collections: what one takes depends on all else in the process.
    """
    times = []
    gc.disable()
    try:
        for _ in range(runs):
            begin = time.process_time()
            work()
            times.append(time.process_time() - begin)
    finally:
        gc.enable()
    return min(times)


def growth(work: Callable[[str], Any], shape: Callable[[int], str], size: int) -> float:
    """How many times longer twice as much takes: 2 for linear work, 4 for quadratic.

    What takes less than 20 ms is too short to be told from noise, and fast enough: it counts as 20.
    """
    half, whole = shape(size // 2), shape(size)
    ratios = []
    for _ in range(3):
        ratios.append(max(seconds(lambda: work(whole)), 0.02) / max(seconds(lambda: work(half)), 0.02))
        if ratios[-1] < 3:
            break
    return min(ratios)
