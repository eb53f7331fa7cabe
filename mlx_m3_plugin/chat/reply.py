"""A reply taken apart as it streams: reasoning, content, and tool calls.

However the text is cut into pieces, the result is the same: whatever may be the beginning of a
marker is held back until it is known, and a call is told when its invoke closes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .markers import NAMESPACE, THINK_END, THINK_START
from .tool_calls import MOST_BLANKS, MOST_PROBLEMS, OfferedTools, ToolCall, parse_block

_MARKERS = (THINK_START, THINK_END, NAMESPACE)
_ANY_MARKER = re.compile("|".join(map(re.escape, _MARKERS)))
_LONGEST_MARKER = max(map(len, _MARKERS))
# What may follow the namespace token where no call is open.
_OPENERS = ("<tool_call>", "</tool_call>", "<invoke")
_OPENER = re.compile(rf"\s{{0,{MOST_BLANKS}}}({'|'.join(_OPENERS)})")
_LONGEST_OPENER = MOST_BLANKS + max(map(len, _OPENERS))
_END_OF_CALL = re.compile(rf"{re.escape(NAMESPACE)}\s{{0,{MOST_BLANKS}}}(</invoke>|</tool_call>)")
_LONGEST_END = len(NAMESPACE) + MOST_BLANKS + len("</tool_call>")


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
        self._tools = OfferedTools(tools)
        self._splitter = ReplySplitter(in_reasoning)
        self._problems_left = MOST_PROBLEMS

    def feed(self, piece: str) -> list[Event]:
        return [event for part in self._splitter.feed(piece) for event in self._events(part)]

    def finish(self) -> list[Event]:
        """What is left when no more text comes."""
        return [event for part in self._splitter.finish() for event in self._events(part)]

    def _events(self, part: "Part") -> list[Event]:
        if part.kind == "problem":
            return self._problems(part.text)
        if part.kind != "calls":
            return [Event(part.kind, part.text)]
        block = parse_block(part.text, self._tools)
        return [Event("call", call=call) for call in block.calls] + self._problems(*block.problems)

    def _problems(self, *problems: str) -> list[Event]:
        told = problems[: self._problems_left]
        self._problems_left -= len(told)
        return [Event("problem", problem) for problem in told]


@dataclass(frozen=True)
class Part:
    """Of a reply's text.

    ``kind`` is ``reasoning`` or ``content``, without markers; ``calls``, as written, up to where a
    call or a block ends; or ``problem``, with what is wrong.
    """

    kind: str
    text: str


class ReplySplitter:
    """Cuts the text of a reply where its markers are, and leaves calls unread.

    Args:
        in_reasoning: the reply begins inside of reasoning.
    """

    def __init__(self, in_reasoning: bool = False):
        self._state = "reasoning" if in_reasoning else "content"
        # What is not read yet, from a position on.
        self._held, self._at = "", 0
        # The beginning of a call whose end has not come, and whether it stands in a block.
        self._call: list[str] = []
        self._in_block = False

    @property
    def in_reasoning(self) -> bool:
        return self._state == "reasoning"

    def feed(self, piece: str) -> list[Part]:
        self._held, self._at = self._held[self._at :] + piece, 0
        return list(self._read(at_end=False))

    def finish(self) -> list[Part]:
        """What is left when no more text comes."""
        parts = self.flush()
        if self._state == "calls":
            parts.append(Part("problem", "the tool-call block is not closed"))
            self._state = "content"
        return parts

    def flush(self) -> list[Part]:
        """What is held back, where it is known that no marker goes on in the next piece."""
        parts = list(self._read(at_end=True))
        unread = "".join(self._call) + self._held[self._at :]
        parts += [Part("calls", unread)] if unread else []
        self._held, self._at, self._call = "", 0, []
        return parts

    def _read(self, at_end: bool) -> Iterator[Part]:
        while True:
            step = self._read_calls() if self._state == "calls" else self._read_text(at_end)
            if step is None:
                return
            yield from step

    def _read_text(self, at_end: bool) -> list[Part] | None:
        """Up to and with the next marker; None when nothing more is certain."""
        marker = _ANY_MARKER.search(self._held, self._at)
        begin, self._at = self._at, len(self._held)
        if marker:
            self._at = marker.start()
        elif not at_end:
            self._at -= self._held_back(begin)
        parts = [Part(self._state, self._held[begin : self._at])] if begin < self._at else []
        if marker is None:
            return parts or None
        if marker[0] == NAMESPACE:
            opened = self._open_calls(at_end)
            return parts + opened if opened is not None else parts or None
        self._at = marker.end()
        expected = THINK_END if self._state == "reasoning" else THINK_START
        if marker[0] == expected:
            self._state = "content" if marker[0] == THINK_END else "reasoning"
        # The model may begin with the closer that says "no reasoning"; any other is out of place,
        # and never text.
        return parts

    def _held_back(self, begin: int) -> int:
        """How much of the end may be the beginning of a marker."""
        for at in range(max(begin, len(self._held) - _LONGEST_MARKER + 1), len(self._held)):
            if self._held[at] in "<]" and any(m.startswith(self._held[at:]) for m in _MARKERS):
                return len(self._held) - at
        return 0

    def _open_calls(self, at_end: bool) -> list[Part] | None:
        """The text goes on with the namespace token.  None while it is open what it is."""
        after = self._at + len(NAMESPACE)
        opener = _OPENER.match(self._held, after)
        if opener and opener[1] != "</tool_call>":
            self._state, self._in_block = "calls", opener[1] == "<tool_call>"
            if self._in_block:
                self._call.append(self._held[self._at : opener.end()])
                self._at = opener.end()
            return []
        rest = self._held[after : after + _LONGEST_OPENER]
        blanks = len(rest) - len(rest.lstrip())
        if not opener and blanks <= MOST_BLANKS and any(tag.startswith(rest[blanks:]) for tag in _OPENERS):
            if not at_end:
                return None
            self._at = len(self._held)
            return [Part("problem", "the reply ends where a tool call begins")]
        self._at = opener.end() if opener else after
        return [Part("problem", "a namespace token outside of a tool call")]

    def _read_calls(self) -> list[Part] | None:
        end = _END_OF_CALL.search(self._held, self._at)
        # Without an end, all but what may be the beginning of one.
        begin, self._at = self._at, end.end() if end else max(self._at, len(self._held) - _LONGEST_END + 1)
        self._call.append(self._held[begin : self._at])
        if end is None:
            return None
        text, self._call = "".join(self._call), []
        if end[1] == "</tool_call>" or not self._in_block:
            self._state = "content"
        return [Part("calls", text)]
