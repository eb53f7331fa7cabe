"""A reply taken apart as it streams: reasoning, content, and tool calls.

However the text is cut into pieces, the result is the same: what may be the beginning of a marker is held
back until it is known, and a call is returned when its invoke closes.  All that is not a call is text.
"""

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from .calls import CallBuilder, OfferedTools, ToolCall
from .markers import ANY_MARKER, MARKERS, NAMESPACE, THINK_MARKER, THINK_START
from .values import first_bare_elements, parsed

_NAMESPACE = re.compile(re.escape(NAMESPACE))
_LONGEST_MARKER = max(map(len, MARKERS))
_NOT_BLANK, _BRACKET, _QUOTE = map(re.compile, (r"\S", "[<>]", '"'))
_ANYTHING = re.compile("")

# What may be between the namespace token and a tag.
_MOST_BLANKS = 8
_BLANKS = rf"\s{{0,{_MOST_BLANKS}}}"
_BLOCK_TAG = re.compile(rf"{_BLANKS}<(/?)tool_call\s*>")
# Models write ``to=`` for ``name=`` now and then.
_INVOKE = re.compile(rf"""{_BLANKS}<invoke\s+(?:name|to)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'“”=<>]+))\s*>""")
# The text ends in the name, which may have any character in it.
_OPEN_NAME = re.compile(rf"""{_BLANKS}<invoke\s+(?:name|to)\s*=\s*(?:"[^"]*"?|'[^']*'?)\s*\Z""")
_NAME_END = re.compile("[\"'>]")
_SOME_INVOKE = re.compile(rf"{_BLANKS}<?invoke(?=[\s<>=\"'\]]|name)")
_BARE_INVOKE_END = re.compile(r"\s*</invoke\s*>")
_TAG = re.compile(rf"{_BLANKS}<(/?)([^<>/][^<>]*)>")
# The text ends before the end of a tag.
_HALF_TAG = re.compile(rf"{_BLANKS}(?:</?(?:[^<>/][^<>]*)?)?\Z")
# A damaged header may have nothing before the word ``name``.
_TAG_BEGINS = ("<tool_call>", "</tool_call>", "<invokename", "invokename")
_LONGEST_HEADER = 300
_HEADER_END = re.compile(rf"(?<!{re.escape(NAMESPACE[:-2])})>")
_IN_HEADER = re.compile(rf"{re.escape(NAMESPACE)}|[<>=\"'“”\s]")
_ATTRIBUTE_NAME = re.compile(r"(?:name|to)[:=]*")
_ATTRIBUTE = r"""\s+[\w-]+\s*=\s*(?:"[^"]*"|'[^']*')"""
_ATTRIBUTES = re.compile(rf"\s*<invoke(?:{_ATTRIBUTE})+\s*>")
_HEADER_NAME = re.compile(r"\s(?:name|to)\s*=\s*[\"']([^\"']*)")
_QUOTED = re.compile("[\"'“”]([^\"'“”]*)[\"'“”]")
_JSON_PIECE = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[{}\[\],:]|[-+.\w]+)', re.DOTALL)
# The text ends before a piece, or in a string.
_HALF_JSON_PIECE = re.compile(r'\s*("(?:[^"\\]|\\.)*\\?)?\Z', re.DOTALL)
# How often what was no call to the end of a reply is read again.
_MOST_RETRIES = 8


@dataclass(frozen=True)
class Event:
    """``kind`` is ``reasoning`` or ``content`` with a text, ``call``, or ``repair`` of the next call."""

    kind: str
    text: str = ""
    call: ToolCall | None = None


@dataclass
class _Block:
    """Between the markers of calls.

    Attributes:
        unsure: all that was read before the first call, which is text if none comes; after a call, white
            space, until it is known what follows.
        loose: of that, what came after the last marker: text beside the first call.
        called: there was a call.
        fresh: nothing but white space came since a marker or a call.
        bare: the block has no opening marker.
    """

    unsure: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    called: bool = False
    fresh: bool = True
    bare: bool = False


_Steps = Generator[Event | None, None, None]
# Whether a call ends well or badly; None if it goes on.
_End = Generator[None, None, bool | None]


class ReplyParser:
    """Feed it the pieces of a reply; it returns what is certain so far.

    Args:
        tools: the request's tools, in OpenAI's form; None if they are not known.
        in_reasoning: the prompt ends with the opening marker, so the reply begins inside it.
        calls_are_text: no call is looked for.
    """

    def __init__(self, tools: Any = None, in_reasoning: bool = False, calls_are_text: bool = False):
        self._tools = OfferedTools(tools)
        self._channel = "reasoning" if in_reasoning else "content"
        self._calls_are_text = calls_are_text
        self._block: _Block | None = None
        # What was read of a call.
        self._call: list[str] = []
        # The text, read up to a place, and pieces that are not joined to it yet.
        self._text, self._at, self._pieces = "", 0, [""]
        # What has to come before it is worth reading on, how long it may be, and where it may have begun.
        self._awaited, self._longest, self._tail = _ANYTHING, 1, ""
        self._finished = False
        self._retries = 0
        self._last_closing: dict[str, int] | None = None
        # The tag that decides what ends of a block mean in the open value, and its place in the reply.
        self._deciding: tuple[list[str], int, bool] = [], 0, False
        self._dropped = 0
        self._steps = self._read()

    @property
    def in_reasoning(self) -> bool:
        return self._channel == "reasoning"

    @property
    def holds_back(self) -> bool:
        """Whether there is text of which it is not known yet what it is."""
        block = self._block
        return bool(self._call or self._pieces or self._at < len(self._text) or (block and block.unsure))

    def feed(self, piece: str) -> list[Event]:
        self._pieces.append(piece)
        if self._awaited is not _ANYTHING:
            seen = (self._tail or self._text[-self._longest :]) + piece
            if not self._awaited.search(seen):
                self._tail = seen[-self._longest :]
                return []
        return self._go_on()

    def finish(self) -> list[Event]:
        """What is left when no more text comes."""
        self._finished = True
        return self._go_on()

    def _go_on(self) -> list[Event]:
        self._dropped += self._at
        # With no other name for it, CPython appends in place: a long text is not copied for each piece.
        text, self._text = self._text[self._at :], ""
        text += "".join(self._pieces)
        self._text, self._at = text, 0
        self._pieces.clear()
        events = []
        for event in self._steps:
            if event is None:
                break
            events.append(event)
        return events

    def _more(self, awaited: re.Pattern[str] = _ANYTHING, longest: int = 1) -> Iterator[None]:
        """Wait for more text; ``longest``: as many characters as what is awaited may have."""
        self._awaited, self._longest, self._tail = awaited, longest, ""
        yield None

    # --- text ---

    def _read(self) -> _Steps:
        while True:
            marker = ANY_MARKER.search(self._text, self._at)
            block = self._block
            if block and block.fresh and (yield from self._read_without_token(block)):
                continue
            end = marker.start() if marker else len(self._text)
            if not marker and not self._finished:
                end -= self._held_back()
            yield from self._say(self._take(end))
            if marker is None:
                if self._finished:
                    break
                yield from self._more()
            elif marker[0] != NAMESPACE:
                yield from self._change_channel(marker[0])
            elif self._calls_are_text or not (yield from self._read_tag()):
                yield from self._say(self._take(self._at + len(NAMESPACE)))
        yield from self._leave_block()

    def _take(self, end: int) -> str:
        taken, self._at = self._text[self._at : end], end
        return taken

    def _held_back(self) -> int:
        """How much of the end may be the beginning of a marker."""
        for at in range(max(self._at, len(self._text) - _LONGEST_MARKER + 1), len(self._text)):
            if self._text[at] in "<]" and any(m.startswith(self._text[at:]) for m in MARKERS):
                return len(self._text) - at
        return 0

    def _say(self, text: str) -> Iterator[Event]:
        block = self._block
        if not text:
            return
        if block and (not block.called or (block.fresh and text.isspace())):
            block.unsure.append(text)
            block.loose.append(text)
            block.fresh = block.fresh and text.isspace()
            return
        if block:
            text = "".join(block.unsure) + text
            block.unsure, block.fresh = [], False
            self._block = None if block.bare else block
        yield Event(self._channel, text)

    def _change_channel(self, marker: str) -> Iterator[Event]:
        self._at += len(marker)
        if self._block and self._block.called:
            self._block.unsure.clear()
        else:
            yield from self._leave_block()
        # The model may begin with the closer that says "no reasoning"; any other that closes nothing is
        # not text either.
        self._channel = "reasoning" if marker == THINK_START else "content"

    def _leave_block(self, closing: str = "") -> Iterator[Event]:
        """The block ends.  Without a call in it, it is text."""
        block, self._block = self._block, None
        unsure = block.unsure if block else []
        if not (block and block.called) and (unsure or closing):
            yield Event(self._channel, "".join(unsure) + closing)

    # --- tags of the block ---

    def _read_tag(self) -> Generator[Event | None, None, bool]:
        """The text goes on with the namespace token.  Whether a tag is read, or may come."""
        after = self._at + len(NAMESPACE)
        if tag := _BLOCK_TAG.match(self._text, after):
            written = self._take(tag.end())
            yield from self._leave_block(written) if tag[1] else self._open_block(written)
            return True
        return (yield from self._read_invoke(len(NAMESPACE)))

    def _read_invoke(self, begin: int, repair: str = "") -> Generator[Event | None, None, bool]:
        """A call whose opening tag is so many characters on.  Whether it is read, or may come."""
        text, at = self._text, self._at + begin
        if _SOME_INVOKE.match(text, at):
            if header := (yield from self._header(begin)):
                yield from self._read_call(*header[:2], repair or header[2])
            # Places in the text are others now, if there is more of it.
            return header is not None or self._text is not text
        if self._finished or not self._may_be(_TAG_BEGINS, at):
            return False
        yield from self._more()
        return True

    def _may_be(self, tags: tuple[str, ...], at: int) -> bool:
        """Whether the text may end within one of the tags."""
        rest = self._text[at : at + _LONGEST_HEADER]
        word = rest.lstrip()
        return len(rest) - len(word) <= _MOST_BLANKS and any(
            tag.startswith(word) or word.rstrip() == tag[:-1] for tag in tags
        )

    def _open_block(self, written: str) -> Iterator[Event]:
        if self._block and not self._block.called and "".join(self._block.loose).strip():
            yield from self._leave_block()
        if self._block is None or self._block.called:
            self._block = _Block()
        self._block.unsure.append(written)
        self._block.loose.clear()
        self._block.fresh = True

    def _header(self, begin: int) -> Generator[None, None, tuple[str, int, str] | None]:
        """The tool's name, the length of the tag that opens a call, and its repair; None where there is none.

        A damaged one counts if what remains is the name of a tool.
        """
        while True:
            at = self._at + begin
            if tag := _INVOKE.match(self._text, at):
                name = next(name for name in tag.groups() if name is not None)
                bare = _IN_HEADER.sub("", name)
                is_damaged = name not in self._tools and bare in self._tools
                name, repair = (bare, "invoke header") if is_damaged else (name, "")
                return name, tag.end() - self._at, repair
            if not self._finished and _OPEN_NAME.match(self._text, at):
                yield from self._more(_NAME_END)
                continue
            rest = self._text[at : at + _LONGEST_HEADER]
            end = _HEADER_END.search(rest)
            if end or self._finished or len(rest) == _LONGEST_HEADER:
                break
            yield from self._more(_BRACKET)
        token = rest.find(NAMESPACE, 0, end.start() if end else None)
        for last in (end.end() if end else 0, token):
            if last > 0 and (name := self._damaged_name(rest[:last])) is not None:
                return name, begin + last, "invoke header"
        return None

    def _damaged_name(self, header: str) -> str | None:
        if header.count("invoke") > 1:
            return None
        named = _HEADER_NAME.findall(header) if _ATTRIBUTES.fullmatch(header) else []
        quoted = _QUOTED.findall(header)
        for word in (*named[:1], *(quoted if len(quoted) == 1 else [])):
            if word in self._tools:
                return word
        word = _IN_HEADER.sub("", header).removeprefix("invoke")
        while word not in self._tools:
            if word.endswith("/"):
                word = word[:-1]
            elif attribute := _ATTRIBUTE_NAME.match(word):
                word = word[attribute.end() :]
            else:
                return None
        return word

    def _read_without_token(self, block: _Block) -> Generator[Event | None, None, bool]:
        """JSON calls, or an invoke without its token, after white space.  Whether anything was done."""
        start = _NOT_BLANK.search(self._text, self._at)
        if block.bare or (start is None and self._finished):
            return False
        if start is None:
            yield from self._more(_NOT_BLANK)
            return True
        begin = start.start()
        if self._text[begin] in "{[":
            yield from self._read_json(block, begin - self._at)
            return True
        return (yield from self._read_invoke(begin - self._at, "token missing"))

    def _read_json(self, block: _Block, begin: int) -> _Steps:
        """``begin``: from where the text is read."""
        at, depth = begin, 0
        while True:
            if piece := _JSON_PIECE.match(self._text, self._at + at):
                depth += (piece[1] in ("{", "[")) - (piece[1] in ("}", "]"))
                at = piece.end() - self._at
                if depth <= 0:
                    break
            elif (half := _HALF_JSON_PIECE.match(self._text, self._at + at)) and not self._finished:
                awaited = _QUOTE if half[1] else _ANYTHING
                # A match holds the text, which could then not be appended to in place.
                half = None
                yield from self._more(awaited)
            else:
                break
        written = self._text[self._at + begin : self._at + at]
        calls = self._json_calls(written) if depth == 0 else []
        if not calls:
            block.fresh = False
            return
        self._at += at
        yield from self._begin_calls()
        yield Event("repair", f"JSON call, {calls[0].name}")
        for call in calls:
            yield Event("call", call=call)

    def _json_calls(self, written: str) -> list[ToolCall]:
        """None unless each is a call."""
        value, calls = parsed(written), []
        for one in value if isinstance(value, list) else [value]:
            one = one.get("function", one) if isinstance(one, dict) else {}
            one = one if isinstance(one, dict) else {}
            name, arguments = one.get("name"), one.get("arguments", one.get("parameters"))
            if isinstance(arguments, str):
                arguments = parsed(arguments)
            if not isinstance(name, str) or not isinstance(arguments, dict):
                return []
            calls.append(ToolCall(name, arguments))
        are_offered = not self._tools or all(call.name in self._tools for call in calls)
        return calls if are_offered else []

    # --- calls ---

    def _begin_calls(self) -> Iterator[Event]:
        """There is a call: what is before it in the block is known."""
        block = self._block = self._block or _Block(bare=True)
        loose = "".join(block.loose)
        block.called, block.fresh, block.unsure, block.loose = True, True, [], []
        if loose.strip():
            yield Event(self._channel, loose)

    def _read_call(self, name: str, length: int, repair: str) -> _Steps:
        builder = CallBuilder(name, self._tools)
        if repair:
            builder.repairs[repair] = None
        self._take_of_call(length)
        ends_well = yield from self._build(builder)
        written, self._call = "".join(self._call), []
        call, loose = builder.built() if ends_well else (None, "")
        if call is None:
            yield from self._say_again(written, retry=ends_well is None)
            return
        yield from self._begin_calls()
        if loose:
            yield Event(self._channel, loose)
        for kind in builder.repairs:
            yield Event("repair", f"{kind}, {name}")
        yield Event("call", call=call)

    def _say_again(self, text: str, retry: bool) -> Iterator[Event]:
        """What was read as a call is text."""
        marker = THINK_MARKER.search(text) if retry else None
        if marker:
            # All to the end of the reply was in the call: from here on it is read again.
            self._retries += 1
            self._calls_are_text = self._retries >= _MOST_RETRIES
            self._text, self._at = text[marker.start() :] + self._text[self._at :], 0
            self._last_closing, self._deciding = None, ([], 0, False)
            text = text[: marker.start()]
        yield from self._say(text)

    def _take_of_call(self, length: int) -> str:
        begin, self._at = self._at, self._at + length
        self._call.append(self._text[begin : self._at])
        return self._call[-1]

    def _build(self, builder: CallBuilder) -> _End:
        """Read up to the end of a call; None if the reply ends in it."""
        while True:
            pattern = _NAMESPACE if builder.has_open_value or builder.broken else ANY_MARKER
            marker = pattern.search(self._text, self._at)
            if marker is None and not self._finished:
                yield from self._more(pattern, _LONGEST_MARKER)
                continue
            end, bare_end = marker.start() if marker else len(self._text), None
            if not builder.has_open_value:
                _, at = first_bare_elements(self._text, self._at, 1, end)
                if bare_end := _BARE_INVOKE_END.match(self._text, at, end):
                    end = at
            if end > self._at:
                builder.take("text", self._take_of_call(end - self._at))
            if bare_end:
                self._take_of_call(bare_end.end() - end)
                builder.repairs["token missing"] = None
                return not builder.broken
            if marker is None:
                return builder.closes_without_token() or None
            if marker[0] != NAMESPACE:
                return False
            ends = yield from self._build_tag(builder)
            if ends is not None:
                return ends

    def _build_tag(self, builder: CallBuilder) -> _End:
        """At a namespace token in a call."""
        after = self._at + len(NAMESPACE)
        tag = _TAG.match(self._text, after)
        if tag is None and not self._finished:
            is_half = _HALF_TAG.match(self._text, after)
            if is_half or "invokename".startswith(self._text[after : after + 20].strip()):
                rest = self._text[after:].lstrip()
                yield from self._more(_BRACKET if "<" in rest else _ANYTHING if rest else _NOT_BLANK)
                return None
        name, closing = (tag[2].strip(), bool(tag[1])) if tag else ("", False)
        length = tag.end() - self._at if tag else len(NAMESPACE)
        is_invoke = _SOME_INVOKE.match(self._text, after)
        header = (yield from self._header(len(NAMESPACE))) if is_invoke else None
        if (header or name == "tool_call") and builder.closes_without_token():
            return True
        ends_call = closing and name == "invoke" and not builder.is_open("invoke")
        if header or name == "tool_call" or ends_call:
            builder.close_at_end()
        if header:
            if builder.broken or builder.in_text:
                builder.take("quote", self._take_of_call(header[1]), "invoke")
                return None
            builder.repairs["invoke not closed"] = None
            return not builder.has_open_value
        if name == "tool_call":
            return (yield from self._build_block_tag(builder, closing, length))
        if ends_call:
            return (yield from self._build_end(builder, length))
        kind = "close" if closing else "open" if tag else "token"
        builder.take(kind, self._take_of_call(length), tag[2] if tag else "")
        return None

    def _build_end(self, builder: CallBuilder, length: int) -> _End:
        """The end of an invoke."""
        in_value = builder.has_open_value
        closes = not in_value or (yield from self._closes_all(length))
        text = self._take_of_call(length)
        if not closes:
            builder.broken |= not builder.in_text
            builder.take("text", text)
            return None
        if in_value:
            builder.end_all()
        return not builder.broken

    def _build_block_tag(self, builder: CallBuilder, closing: bool, length: int) -> _End:
        if builder.broken:
            return False
        if closing and builder.is_open("tool_call"):
            kind = "close"
        elif not builder.has_open_value:
            builder.repairs["invoke not closed"] = None
            return True
        elif closing:
            kind = "text" if (yield from self._closes_later(builder.open_tags(), length)) else ""
        else:
            kind = "quote" if builder.in_text else ""
        if not kind:
            return False
        builder.take(kind, self._take_of_call(length), "tool_call")
        return None

    def _closes_all(self, length: int) -> Generator[None, None, bool]:
        """Whether an invoke's end is followed by another invoke, the block's end, or the reply's."""
        while True:
            start = _NOT_BLANK.search(self._text, self._at + length)
            if start is None:
                if self._finished:
                    return True
                yield from self._more(_NOT_BLANK)
                continue
            has_token = self._text.startswith(NAMESPACE, start.start())
            at = start.start() + len(NAMESPACE) * has_token
            if has_token and (tag := _BLOCK_TAG.match(self._text, at)):
                return bool(tag[1])
            in_block = self._block is not None and not self._block.bare
            if (has_token or in_block) and _SOME_INVOKE.match(self._text, at):
                return has_token or self._text[at] == "<"
            begins = _TAG_BEGINS[1:] if has_token else (NAMESPACE, "<invokename")
            if self._finished or not self._may_be(begins, at):
                return False
            yield from self._more()

    def _closes_later(self, names: list[str], length: int) -> Generator[None, None, bool]:
        """Whether a closing tag of one of the names comes before another opening tag of it."""
        decided, place, closes = self._deciding
        if decided == names and place > self._dropped + self._at:
            return closes
        either = "|".join(map(re.escape, names))
        tags = re.compile(rf"{re.escape(NAMESPACE)}{_BLANKS}<(/?)({either})>")
        while not self._finished or self._closings_left(names):
            if found := tags.search(self._text, self._at + length):
                self._deciding = names, self._dropped + found.start(), found[1] == "/"
                return self._deciding[2]
            if self._finished:
                break
            yield from self._more(re.compile(f"(?:{either})>"), max(map(len, names)) + 1)
        return False

    def _closings_left(self, names: list[str]) -> bool:
        """Whether a closing tag of these names is in the rest of the finished text."""
        if self._last_closing is None:
            tags = re.finditer(rf"{re.escape(NAMESPACE)}{_BLANKS}</([^<>]+)>", self._text)
            self._last_closing = {tag[1]: tag.start() for tag in tags}
        return any(self._last_closing.get(name, -1) > self._at for name in names)
