"""A reply taken apart as it streams: reasoning, content, and tool calls.

However the text is cut into pieces, the result is the same: whatever may be the beginning of a
marker is held back until it is known, and a call is told when its invoke closes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .reasoning import THINK_END, THINK_START
from .tool_calls import NAMESPACE, ToolCall, parse_block

_MARKERS = (THINK_START, THINK_END, NAMESPACE)
_ANY_MARKER = re.compile("|".join(map(re.escape, _MARKERS)))
# What may follow the namespace token where no call is open.
_OPENERS = ("<tool_call>", "</tool_call>", "<invoke")
_END_OF_CALL = re.compile(rf"{re.escape(NAMESPACE)}\s*(</invoke>|</tool_call>)")
_LONGEST_END = len(NAMESPACE) + len("</tool_call>") + 8


@dataclass(frozen=True)
class Event:
    """``kind`` is ``reasoning``, ``content``, ``call`` or ``problem``; a call comes in ``call``."""

    kind: str
    text: str = ""
    call: ToolCall | None = None


@dataclass
class Reply:
    """A whole reply."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, event: Event) -> None:
        if event.kind == "reasoning":
            self.reasoning += event.text
        elif event.kind == "content":
            self.content += event.text
        elif event.call is not None:
            self.calls.append(event.call)
        else:
            self.problems.append(event.text)


class ReplyParser:
    """Feed it the pieces of a reply; it returns what is certain so far.

    Args:
        tools: the request's tools, in OpenAI's form.
        in_reasoning: the prompt ends with the opening marker, so the reply begins inside it.
    """

    def __init__(self, tools: Any = None, in_reasoning: bool = False):
        self._tools = tools
        self._state = "reasoning" if in_reasoning else "content"
        self._held = ""
        # Where to go on looking for the end of a call.
        self._searched = 0

    def feed(self, piece: str) -> list[Event]:
        self._held += piece
        return list(self._read(at_end=False))

    def finish(self) -> list[Event]:
        """What is left when no more text comes."""
        events = list(self._read(at_end=True))
        rest, self._held = self._held, ""
        if self._state == "calls":
            block = parse_block(rest, self._tools)
            events += [Event("call", call=call) for call in block.calls]
            events += [Event("problem", problem) for problem in block.problems]
            events.append(Event("problem", "the tool-call block is not closed"))
        elif rest:
            events.append(Event(self._state, rest))
        return events

    def _read(self, at_end: bool) -> Iterator[Event]:
        while True:
            step = self._read_calls() if self._state == "calls" else self._read_text(at_end)
            if step is None:
                return
            yield from step

    def _read_text(self, at_end: bool) -> list[Event] | None:
        """Up to and with the next marker; None when nothing more is certain."""
        marker = _ANY_MARKER.search(self._held)
        certain = marker.start() if marker else len(self._held) - (0 if at_end else self._held_back())
        events = [Event(self._state, self._held[:certain])] if certain else []
        self._held = self._held[certain:]
        if marker is None:
            return events or None
        if marker[0] == NAMESPACE:
            opened = self._open_calls(at_end)
            return events + opened if opened is not None else events or None
        self._held = self._held[len(marker[0]) :]
        expected = THINK_END if self._state == "reasoning" else THINK_START
        if marker[0] == expected:
            self._state = "content" if marker[0] == THINK_END else "reasoning"
        # The model may begin with the closer that says "no reasoning"; any other is out of place,
        # and never text.
        return events

    def _held_back(self) -> int:
        """How much of the end may be the beginning of a marker."""
        longest = max(map(len, _MARKERS)) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(marker.startswith(self._held[-length:]) for marker in _MARKERS):
                return length
        return 0

    def _open_calls(self, at_end: bool) -> list[Event] | None:
        """The text begins with the namespace token.  None while it is open what it is."""
        rest = self._held[len(NAMESPACE) :]
        after = rest.lstrip()
        if not at_end and any(opener.startswith(after) for opener in _OPENERS):
            return None
        if after.startswith(("<tool_call>", "<invoke")):
            self._state, self._searched = "calls", 0
            if after.startswith("<tool_call>"):
                self._held = after.removeprefix("<tool_call>")
            return []
        self._held = after.removeprefix("</tool_call>") if after.startswith("</tool_call>") else rest
        return [Event("problem", "a namespace token outside of a tool call")]

    def _read_calls(self) -> list[Event] | None:
        end = _END_OF_CALL.search(self._held, self._searched)
        if end is None:
            self._searched = max(0, len(self._held) - _LONGEST_END)
            return None
        text, self._held, self._searched = self._held[: end.end()], self._held[end.end() :], 0
        block = parse_block(text, self._tools)
        if end[1] == "</tool_call>":
            self._state = "content"
        events = [Event("call", call=call) for call in block.calls]
        return events + [Event("problem", problem) for problem in block.problems]
