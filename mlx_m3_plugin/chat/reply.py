"""A reply taken apart as it streams: reasoning, content, and tool calls.

However the text is cut into pieces, the result is the same: what may be the beginning of a marker is held
back until it is known, and a call is returned when its invoke closes.  All that is not a call is text.
"""

import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from .calls import CallBuilder, OfferedTools, ToolCall
from .markers import ANY_MARKER, MARKERS, NAMESPACE, THINK_END, THINK_START
from .values import first_bare_elements

_NAMESPACE = re.compile(re.escape(NAMESPACE))
_LONGEST_MARKER = max(map(len, MARKERS))
_NOT_BLANK, _BRACKET, _QUOTE = map(re.compile, (r"\S", "[<>]", '"'))
_ANYTHING = re.compile("")

# What may be between the namespace token and a tag.
MOST_BLANKS = 8
_BLANKS = rf"\s{{0,{MOST_BLANKS}}}"
_BLOCK_TAG = re.compile(rf"{_BLANKS}<(/?)tool_call\s*>")
# Models write ``to=`` for ``name=`` now and then.
_INVOKE = re.compile(rf"""{_BLANKS}<invoke\s+(?:name|to)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'“”=<>]+))\s*>""")
# The text ends in the name, which may have any character in it.
_OPEN_NAME = re.compile(rf"""{_BLANKS}<invoke\s+(?:name|to)\s*=\s*(?:"[^"]*"?|'[^']*'?)\s*\Z""")
_NAME_END = re.compile("[\"'>]")
_SOME_INVOKE = re.compile(rf"{_BLANKS}<?invoke(?=[\s<>=\"'\]]|name)")
_BARE_INVOKE_END = re.compile(r"\s*</invoke\s*>")
_TAG = re.compile(rf"{_BLANKS}<(/?)([^<>/][^<>]*)>")
_NO_TAG = re.compile(rf"{_BLANKS}(?:[^\s<]|</?[<>]|<//|<[^<>]*<)")
# A damaged header may have nothing before the word ``name``.
_TAG_BEGINS = ("<tool_call>", "</tool_call>", "<invokename", "invokename")
_LONGEST_HEADER = 300
_IN_HEADER = re.compile(rf"{re.escape(NAMESPACE)}|[<>=\"'“”\s]")
_ATTRIBUTE_NAME = re.compile(r"(?:name|to)[:=]*")
_ATTRIBUTE = r"""\s+[\w-]+\s*=\s*(?:"[^"]*"|'[^']*')"""
_ATTRIBUTES = re.compile(rf"\s*<invoke(?:{_ATTRIBUTE})+\s*>")
_HEADER_NAME = re.compile(r"\s(?:name|to)\s*=\s*[\"']([^\"']*)")
_QUOTED = re.compile("[\"'“”]([^\"'“”]*)[\"'“”]")
_JSON_PIECE = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[{}\[\],:]|[-+.\w]+)', re.DOTALL)
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
        unsure: what was read before the first call, and whether it is a marker: text if there is no call.
        has_text: some of that is text, and not white space.
        called: there was a call.  bare: the block has no opening marker.
        blanks: white space after a call, until it is known what follows; None after text.
    """

    unsure: list[tuple[bool, str]] = field(default_factory=list)
    has_text: bool = False
    called: bool = False
    bare: bool = False
    blanks: str | None = None

    def add_text(self, text: str) -> None:
        self.unsure.append((False, text))
        self.has_text = self.has_text or bool(text.strip())


_Steps = Generator[Event | None, None, None]


class ReplyParser:
    """Feed it the pieces of a reply; it returns what is certain so far.

    Args:
        tools: the request's tools, in OpenAI's form; None if they are not known.
        in_reasoning: the prompt ends with the opening marker, so the reply begins inside it.
        in_block: the reply begins after the marker of calls.
        calls_are_text: no call is looked for.
    """

    def __init__(
        self,
        tools: Any = None,
        in_reasoning: bool = False,
        in_block: bool = False,
        calls_are_text: bool = False,
    ):
        self._tools = tools if isinstance(tools, OfferedTools) else OfferedTools(tools)
        self._channel = "reasoning" if in_reasoning else "content"
        self._calls_are_text = calls_are_text
        self._block = _Block() if in_block else None
        # Right after a marker or a call of a block, where JSON and tags without a token may come.
        self._fresh = in_block
        # The text, read up to a place, and pieces that are not joined to it yet.
        self._text, self._at, self._pieces = "", 0, [""]
        # What has to come before it is worth reading on, and the end of the text if it may begin there.
        self._awaited, self._tail = _ANYTHING, ""
        self._finished, self._in_call = False, False
        self._retries = 0
        self._last_closing: dict[str, int] | None = None
        # The tag that decides what ends of a block mean in the open value, and its place in the reply.
        self._deciding: tuple[list[str], int, bool] | None = None
        self._dropped = 0
        self._steps = self._read()

    @property
    def in_reasoning(self) -> bool:
        return self._channel == "reasoning"

    @property
    def holds_back(self) -> bool:
        """Whether there is text of which it is not known yet what it is."""
        block = self._block
        return bool(
            self._in_call
            or self._pieces
            or self._at < len(self._text)
            or (block and (block.unsure or block.blanks))
        )

    def feed(self, piece: str) -> list[Event]:
        self._pieces.append(piece)
        if self._awaited is not _ANYTHING:
            seen = self._tail + piece
            if not self._awaited.search(seen):
                self._tail = seen[-_LONGEST_MARKER:] if self._tail else ""
                return []
        return self._go_on()

    def finish(self) -> list[Event]:
        """What is left when no more text comes."""
        self._finished = True
        return self._go_on()

    def _go_on(self) -> list[Event]:
        self._dropped += self._at
        self._text, self._at = self._text[self._at :] + "".join(self._pieces), 0
        self._pieces.clear()
        events = []
        for event in self._steps:
            if event is None:
                break
            events.append(event)
        return events

    def _more(self, awaited: re.Pattern[str] = _ANYTHING, in_two: bool = False) -> Iterator[None]:
        """Wait for more text; ``in_two``: what is awaited may have begun."""
        self._awaited, self._tail = awaited, self._text[-_LONGEST_MARKER:] if in_two else ""
        yield None
        self._awaited = _ANYTHING

    # --- text ---

    def _read(self) -> _Steps:
        while True:
            marker = ANY_MARKER.search(self._text, self._at)
            if (
                self._block
                and self._fresh
                and not self._block.bare
                and (yield from self._read_without_token(marker))
            ):
                continue
            end = marker.start() if marker else len(self._text)
            if not marker and not self._finished:
                end -= self._held_back()
            yield from self._say(self._text[self._at : end])
            self._at = end
            if marker is None:
                if self._finished:
                    break
                yield from self._more()
            elif marker[0] != NAMESPACE:
                yield from self._change_channel(marker[0])
            elif self._calls_are_text:
                yield from self._say(NAMESPACE)
                self._at += len(NAMESPACE)
            else:
                yield from self._read_tag()
        yield from self._leave_block()

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
        if block is None:
            yield Event(self._channel, text)
            return
        self._fresh = self._fresh and text.isspace()
        if not block.called:
            block.add_text(text)
            return
        if block.blanks is not None:
            text = block.blanks + text
            if text.isspace():
                block.blanks = text
                return
            block.blanks = None
        if block.bare:
            self._block = None
        yield Event(self._channel, text)

    def _change_channel(self, marker: str) -> Iterator[Event]:
        self._at += len(marker)
        if self._block and not self._block.called:
            yield from self._leave_block()
        if self._block and self._block.blanks:
            self._block.blanks = ""
        # The model may begin with the closer that says "no reasoning"; any other that closes nothing is
        # not text either.
        self._channel = "reasoning" if marker == THINK_START else "content"

    def _leave_block(self, closing: str = "") -> Iterator[Event]:
        """The block ends.  Without a call in it, it is text."""
        block, self._block = self._block, None
        if block and not block.called:
            text = "".join(text for _, text in block.unsure) + closing
            if text:
                yield Event(self._channel, text)

    # --- tags of the block ---

    def _read_tag(self) -> _Steps:
        """The text goes on with the namespace token."""
        after = self._at + len(NAMESPACE)
        if tag := _BLOCK_TAG.match(self._text, after):
            written = self._text[self._at : tag.end()]
            self._at = tag.end()
            yield from self._close_block(written) if tag[1] else self._open_block(written)
            return
        if _SOME_INVOKE.match(self._text, after):
            header = yield from self._header(len(NAMESPACE))
            if header:
                yield from self._read_call(*header)
                return
        elif not self._finished and self._may_be(_TAG_BEGINS, after):
            yield from self._more()
            return
        yield from self._say(NAMESPACE)
        self._at += len(NAMESPACE)

    def _may_be(self, tags: tuple[str, ...], at: int) -> bool:
        """Whether the text may end within one of the tags."""
        rest = self._text[at : at + _LONGEST_HEADER]
        word = rest.lstrip()
        return len(rest) - len(word) <= MOST_BLANKS and any(
            tag.startswith(word) or (word.startswith(tag[:-1]) and word[len(tag) - 1 :].isspace())
            for tag in tags
        )

    def _open_block(self, written: str) -> Iterator[Event]:
        block = self._block
        if block and not block.called and block.has_text:
            yield from self._leave_block()
            block = None
        if block is None or block.called:
            block = self._block = _Block()
        block.unsure.append((True, written))
        self._fresh = True

    def _close_block(self, written: str) -> Iterator[Event]:
        if self._block is None:
            yield Event(self._channel, written)
        else:
            yield from self._leave_block(written)

    def _header(self, begin: int) -> Generator[None, None, tuple[str, int] | None]:
        """The tool's name and the length of the tag that opens a call; None where there is none.

        A damaged one counts if what remains is the name of a tool.
        """
        while True:
            at = self._at + begin
            if tag := _INVOKE.match(self._text, at):
                name = next(name for name in tag.groups() if name is not None)
                bare = _IN_HEADER.sub("", name)
                known = name if name in self._tools or bare not in self._tools else bare
                return known, tag.end() - self._at
            if not self._finished and _OPEN_NAME.match(self._text, at):
                yield from self._more(_NAME_END)
                continue
            rest = self._text[at : at + _LONGEST_HEADER]
            end = rest.find(">")
            while end >= 0 and rest[: end + 1].endswith(NAMESPACE[:-1]):
                end = rest.find(">", end + 1)
            token = rest.find(NAMESPACE)
            if end >= 0 or self._finished or len(rest) == _LONGEST_HEADER:
                break
            yield from self._more(_BRACKET)
        for last in (end + 1, token if token < end or end < 0 else 0):
            if last > 0 and (name := self._damaged_name(rest[:last])) is not None:
                return name, begin + last
        return None

    def _damaged_name(self, header: str) -> str | None:
        if header.count("invoke") > 1:
            return None
        named = _HEADER_NAME.search(header) if _ATTRIBUTES.fullmatch(header) else None
        quoted = _QUOTED.findall(header)
        if named and named[1] in self._tools:
            return named[1]
        if len(quoted) == 1 and quoted[0] in self._tools:
            return quoted[0]
        word = _IN_HEADER.sub("", header).removeprefix("invoke")
        while word not in self._tools:
            if word.endswith("/"):
                word = word[:-1]
            elif attribute := _ATTRIBUTE_NAME.match(word):
                word = word[attribute.end() :]
            else:
                return None
        return word

    def _read_without_token(self, marker: re.Match[str] | None) -> Generator[Event | None, None, bool]:
        """JSON calls, or an invoke without its token, after white space.  Whether anything was done."""
        start = _NOT_BLANK.search(self._text, self._at)
        if start is None:
            if self._finished:
                return False
            yield from self._more(_NOT_BLANK)
            return True
        begin = start.start()
        if marker and marker.start() <= begin:
            return False
        first = self._text[begin]
        if first in "{[":
            return (yield from self._read_json(begin - self._at))
        if first not in "<i]":
            return False
        if not self._finished and self._may_be((*MARKERS, *_TAG_BEGINS), begin):
            yield from self._more()
            return True
        if _SOME_INVOKE.match(self._text, begin):
            text = self._text
            header = yield from self._header(begin - self._at)
            if header:
                yield from self._read_call(*header, repair="token missing")
            # Places in the text are others now, if there is more of it.
            return header is not None or self._text is not text
        return False

    def _read_json(self, begin: int) -> Generator[Event | None, None, bool]:
        """``begin``: from where the text is read."""
        at, depth = begin, 0
        while True:
            piece = _JSON_PIECE.match(self._text, self._at + at)
            if piece is None or (piece.end() == len(self._text) and piece[1] not in ("}", "]")):
                rest = self._text[self._at + at :].lstrip()
                if self._finished or not (piece or not rest or rest[0] == '"'):
                    break
                yield from self._more(_QUOTE if rest[:1] == '"' else _ANYTHING)
                continue
            depth += (piece[1] in ("{", "[")) - (piece[1] in ("}", "]"))
            at = piece.end() - self._at
            if depth <= 0:
                break
        written = self._text[self._at + begin : self._at + at]
        calls = self._json_calls(written) if depth == 0 else []
        if not calls:
            self._fresh = False
            return True
        self._at += at
        yield from self._begin_calls()
        yield Event("repair", f"JSON call, {calls[0].name}")
        for call in calls:
            yield Event("call", call=call)
        return True

    def _json_calls(self, written: str) -> list[ToolCall]:
        """None unless each is a call."""
        try:
            value = json.loads(written)
        except (ValueError, RecursionError):
            return []
        calls = []
        for one in value if isinstance(value, list) else [value]:
            one = one.get("function", one) if isinstance(one, dict) else {}
            one = one if isinstance(one, dict) else {}
            name, arguments = one.get("name"), one.get("arguments", one.get("parameters"))
            if not isinstance(name, str) or not self._tools.may_have(name):
                return []
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except (ValueError, RecursionError):
                    return []
            if not isinstance(arguments, dict):
                return []
            calls.append(ToolCall(name, arguments))
        try:
            # No NaN, which json reads and nobody else.
            json.dumps([call.arguments for call in calls], allow_nan=False)
        except (ValueError, RecursionError):
            return []
        return calls

    # --- calls ---

    def _begin_calls(self) -> Iterator[Event]:
        """There is a call: what is before it in the block is known."""
        block = self._block = self._block or _Block(bare=True)
        block.called, block.blanks, self._fresh = True, "", True
        loose = ""
        for is_marker, text in block.unsure:
            # Before another marker is only white space.
            loose = "" if is_marker else loose + text
        block.unsure = []
        if loose and not loose.isspace():
            yield Event(self._channel, loose)

    def _read_call(self, name: str, length: int, repair: str = "") -> _Steps:
        builder = CallBuilder(name, self._tools)
        written = [self._text[self._at : self._at + length]]
        tag = _INVOKE.match(written[0], len(NAMESPACE))
        if repair or tag is None or name not in tag.groups():
            builder.repairs[repair or "invoke header"] = None
        self._at += length
        self._in_call = True
        ends_well = yield from self._build(builder, written)
        self._in_call = False
        call, loose = builder.built() if ends_well else (None, "")
        if call is None:
            yield from self._say_again("".join(written), retry=ends_well is None)
            return
        yield from self._begin_calls()
        if loose:
            yield Event(self._channel, loose)
        for kind in builder.repairs:
            yield Event("repair", f"{kind}, {name}")
        yield Event("call", call=call)

    def _say_again(self, text: str, retry: bool) -> Iterator[Event]:
        """What was read as a call is text."""
        self._fresh = False
        marker = re.search(f"{re.escape(THINK_START)}|{re.escape(THINK_END)}", text) if retry else None
        if marker:
            # All to the end of the reply was in the call: from here on it is read again.
            self._retries += 1
            self._calls_are_text = self._retries >= _MOST_RETRIES
            self._text, self._at = text[marker.start() :] + self._text[self._at :], 0
            self._last_closing = self._deciding = None
            text = text[: marker.start()]
        if self._block is None or self._block.called or not self._block.unsure:
            yield from self._say(text)
        else:
            self._block.add_text(text)

    def _build(self, builder: CallBuilder, written: list[str]) -> Generator[None, None, bool | None]:
        """Read up to the end of a call.  Whether it has one; None if the reply ends in it."""

        def take(end: int) -> str:
            piece = self._text[self._at : end]
            written.append(piece)
            self._at = end
            return piece

        while True:
            pattern = _NAMESPACE if builder.has_open_value or builder.broken else ANY_MARKER
            marker = pattern.search(self._text, self._at)
            if marker is None and not self._finished:
                yield from self._more(pattern, in_two=True)
                continue
            if not builder.has_open_value and (end := _BARE_INVOKE_END.match(self._text, self._at)):
                take(end.end())
                builder.repairs["token missing"] = None
                return not builder.broken
            run = take(self._run_end(builder, marker.start() if marker else len(self._text)))
            if run:
                builder.take("text", run)
            if not builder.has_open_value and _BARE_INVOKE_END.match(self._text, self._at):
                continue
            if marker is None:
                return builder.closes_without_token("invoke") or None
            if marker[0] != NAMESPACE:
                return False
            ends = yield from self._build_tag(builder, take)
            if ends is not None:
                return ends

    def _run_end(self, builder: CallBuilder, end: int) -> int:
        """Where a text in a call ends: before ``end`` if parameters and the call end there without tokens."""
        if not builder.has_open_value:
            _, at = first_bare_elements(self._text, self._at, 1, end)
            if at > self._at and _BARE_INVOKE_END.match(self._text, at, end):
                return at
        return end

    def _build_tag(self, builder: CallBuilder, take: Any) -> Generator[None, None, bool | None]:
        """At a namespace token in a call: whether the call ends well or badly; None if it goes on."""
        after = self._at + len(NAMESPACE)
        tag = _TAG.match(self._text, after)
        if tag is None and not self._finished:
            rest = self._text[after : after + _LONGEST_HEADER]
            if not _NO_TAG.match(rest) and len(rest) - len(rest.lstrip()) <= MOST_BLANKS:
                yield from self._more(_BRACKET if rest.strip()[:1] == "<" and len(rest) > 20 else _ANYTHING)
                return None
            if "invokename".startswith(rest.strip()):
                yield from self._more()
                return None
        if _SOME_INVOKE.match(self._text, after):
            header = yield from self._header(len(NAMESPACE))
            if header:
                if builder.closes_without_token("invoke"):
                    return True
                builder.close_at_end()
                if builder.broken or builder.in_text:
                    builder.take("quote", take(self._at + header[1]), "invoke")
                    return None
                builder.repairs["invoke not closed"] = None
                return not builder.has_open_value
            tag = _TAG.match(self._text, self._at + len(NAMESPACE))
        if tag is None:
            builder.take("token", take(self._at + len(NAMESPACE)))
            return None
        name, length = tag[2], tag.end() - self._at
        if name.strip() == "tool_call":
            return (yield from self._build_block_tag(builder, bool(tag[1]), length, take))
        if tag[1] and name.strip() == "invoke" and not builder.is_open("invoke"):
            builder.close_at_end()
            closes = not builder.has_open_value or (yield from self._closes_all(length))
            text = take(self._at + length)
            if closes:
                if builder.has_open_value:
                    builder.end_all()
                return not builder.broken
            if builder.in_text:
                builder.take("text", text)
            else:
                builder.broken = True
            return None
        builder.take("close" if tag[1] else "open", take(self._at + length), name)
        return None

    def _build_block_tag(
        self, builder: CallBuilder, closing: bool, length: int, take: Any
    ) -> Generator[None, None, bool | None]:
        if builder.closes_without_token("invoke"):
            return True
        builder.close_at_end()
        if builder.broken:
            return False
        if closing and builder.is_open("tool_call"):
            builder.take("close", take(self._at + length), "tool_call")
            return None
        if not builder.has_open_value:
            builder.repairs["invoke not closed"] = None
            return True
        if not closing:
            if not builder.in_text:
                return False
            builder.take("quote", take(self._at + length), "tool_call")
            return None
        if (yield from self._closes_later(builder.open_tags(), length)):
            builder.take("text", take(self._at + length))
            return None
        return False

    def _closes_all(self, length: int) -> Generator[None, None, bool]:
        """Whether an invoke's end is followed by another invoke, the block's end, or the reply's."""
        while True:
            start = _NOT_BLANK.search(self._text, self._at + length)
            if start is None:
                if self._finished:
                    return True
                yield from self._more(_NOT_BLANK)
                continue
            at = start.start()
            if self._text.startswith(NAMESPACE, at):
                at += len(NAMESPACE)
                if _BLOCK_TAG.match(self._text, at):
                    return self._text[at:].lstrip().startswith("</")
                if _SOME_INVOKE.match(self._text, at):
                    return True
                if self._finished or not self._may_be(_TAG_BEGINS[1:], at):
                    return False
            elif self._block and not self._block.bare and _SOME_INVOKE.match(self._text, at):
                return self._text[at] == "<"
            elif self._finished or not self._may_be((NAMESPACE, "<invokename"), at):
                return False
            yield from self._more()

    def _closes_later(self, names: list[str], length: int) -> Generator[None, None, bool]:
        """Whether a closing tag of one of the names comes before another opening tag of it."""
        if self._deciding and self._deciding[0] == names and self._deciding[1] > self._dropped + self._at:
            return self._deciding[2]
        either = "|".join(map(re.escape, names))
        tags = re.compile(rf"{re.escape(NAMESPACE)}{_BLANKS}<(/?)({either})>")
        while True:
            if self._finished and not self._closings_left(names):
                return False
            if found := tags.search(self._text, self._at + length):
                self._deciding = names, self._dropped + found.start(), found[1] == "/"
                return self._deciding[2]
            if self._finished:
                return False
            yield from self._more(re.compile(f"(?:{either})>"), in_two=True)

    def _closings_left(self, names: list[str]) -> bool:
        """Whether a closing tag of these names is in the rest of the finished text."""
        if self._last_closing is None:
            tags = re.finditer(rf"{re.escape(NAMESPACE)}{_BLANKS}</([^<>]+)>", self._text)
            self._last_closing = {tag[1]: tag.start() for tag in tags}
        return any(self._last_closing.get(name, -1) > self._at for name in names)
