"""A reply rewritten as it streams, for servers that know no more of M3 than its markers."""

from typing import Any

from .markers import ANY_MARKER, NAMESPACE, NO_CHARACTER, THINK_END, THINK_START, as_text
from .reply import Event, ReplyParser
from .tool_calls import RepairLog, as_json, tool_call_end, tool_call_start


class ReplyRewriter:
    """Feed it the pieces of a reply; it returns what a server is to see instead.

    That is text in which every marker means what it says and comes whole, in one piece: reasoning opened and
    closed where it is, and for each call a block with the call as JSON.  Markers that are text are written
    so that nobody finds them; :func:`~.markers.restored` undoes that.

    Args:
        tools: the request's tools, in OpenAI's form.
        in_reasoning: the prompt ends with the opening marker.  The text then begins with it.
        calls_are_text: leave calls as they were written.
    """

    def __init__(self, tools: Any = None, in_reasoning: bool = False, calls_are_text: bool = False):
        self._parser = ReplyParser(tools, in_reasoning, calls_are_text=calls_are_text)
        self._log = RepairLog()
        # What is to come first, and whether reasoning is open in what was returned.
        self._begin = THINK_START if in_reasoning else ""
        self._reasoning_is_open = in_reasoning
        # Of the text that was returned last.
        self._end = ""

    def feed(self, piece: str) -> str:
        return self._rewritten(self._parser.feed(piece))

    def finish(self) -> str:
        """What is left when no more text comes."""
        return self._rewritten(self._parser.finish())

    def _rewritten(self, events: list[Event]) -> str:
        self._log.add(events)
        begin, self._begin = self._begin, ""
        return begin + "".join(map(self._text_of, events))

    def _text_of(self, event: Event) -> str:
        if event.kind == "repair":
            return ""
        was_open, self._reasoning_is_open = self._reasoning_is_open, event.kind == "reasoning"
        switched = was_open != self._reasoning_is_open
        marker = (THINK_END if was_open else THINK_START) if switched else ""
        if event.call:
            return marker + tool_call_start + as_json(event.call) + tool_call_end
        text, end = as_text(event.text), "" if switched else self._end
        if ANY_MARKER.search(end + text[: len(NAMESPACE)]):
            # Two halves of one, once what is between them is gone: a tag, or a call that servers take out.
            text = NO_CHARACTER + text
        self._end = (end + text)[1 - len(NAMESPACE) :]
        return marker + text
