"""A reply rewritten as it streams, for servers that know no more of M3 than its markers."""

import logging
import re
from typing import Any

from .markers import NAMESPACE, THINK_END, THINK_START
from .reply import Part, ReplySplitter
from .tool_calls import (
    MOST_BLANKS,
    MOST_PROBLEMS,
    OfferedTools,
    parse_block,
    tool_call_end,
    tool_call_start,
)

log = logging.getLogger("mlx_m3_plugin")

_OUTER_TAGS = re.compile(
    rf"\A{re.escape(NAMESPACE)}\s{{0,{MOST_BLANKS}}}<tool_call>|"
    rf"{re.escape(NAMESPACE)}\s{{0,{MOST_BLANKS}}}</tool_call>\Z"
)


class ReplyRewriter:
    """Feed it the pieces of a reply; it returns what a server is to see instead.

    That is text in which every marker means what it says and comes whole, in one piece: reasoning
    opened and closed where it is, and for what there is of calls one block after the other, each
    closed and with at least one complete call in it.  Stray markers are gone; what was wrong with
    a call is logged, here or by :func:`~.tool_calls.parse_tool_call`, which reads the blocks.

    Args:
        tools: the request's tools, in OpenAI's form.
        in_reasoning: the prompt ends with the opening marker.  The text then begins with it.
        calls_are_text: leave calls as they were written, for a server that looks for none.
    """

    def __init__(self, tools: Any = None, in_reasoning: bool = False, calls_are_text: bool = False):
        self._tools = OfferedTools(tools)
        self._calls_are_text = calls_are_text
        self._splitter = ReplySplitter(in_reasoning)
        # What is to come first, and whether reasoning is open in what was returned.
        self._begin = THINK_START if in_reasoning else ""
        self._reasoning_is_open = in_reasoning
        self._problems_left = MOST_PROBLEMS

    def feed(self, piece: str) -> str:
        return self._rewritten(self._splitter.feed(piece))

    def finish(self) -> str:
        """What is left when no more text comes."""
        return self._rewritten(self._splitter.finish())

    def _rewritten(self, parts: list[Part]) -> str:
        begin, self._begin = self._begin, ""
        return begin + "".join(map(self._text_of, parts))

    def _text_of(self, part: Part) -> str:
        if part.kind == "problem":
            self._log("reply", part.text)
            return ""
        text = self._block(part.text) if part.kind == "calls" else part.text
        if not text:
            return ""
        was_open, self._reasoning_is_open = self._reasoning_is_open, part.kind == "reasoning"
        if was_open == self._reasoning_is_open:
            return text
        return (THINK_END if was_open else THINK_START) + text

    def _block(self, text: str) -> str:
        if self._calls_are_text:
            return text
        block = parse_block(text, self._tools)
        if block.calls:
            return tool_call_start + _OUTER_TAGS.sub("", text) + tool_call_end
        self._log("tool call", *block.problems)
        return ""

    def _log(self, where: str, *problems: str) -> None:
        for problem in problems[: self._problems_left]:
            log.warning("mlx-m3-plugin: in a %s: %s", where, problem)
        self._problems_left = max(self._problems_left - len(problems), 0)
