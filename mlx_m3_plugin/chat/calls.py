"""M3's tool calls: from the tags of one call to a name and arguments.

    NS<tool_call>
    NS<invoke name="search">NS<query>mlxNS</query>NS<tags>NS<item>aNS</item>NS</tags>NS</invoke>
    NS</tool_call>

``NS`` is one token, ``]<]minimax[>[``, and stands before every tag; all other text is literal.
``docs/tool-calls.md`` has the grammar and every decision on malformed text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from mlx_m3_plugin.chat.values import (
    MAX_DEPTH,
    Element,
    Schemas,
    Shape,
    bare_elements,
    json_object,
    parameter_name,
    typed_arguments,
)

_CLOSING_TAG = re.compile(r"</([^<>]+)>\s*")


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": self.arguments}


class OfferedTools(dict[str, Schemas]):
    """The schemas of a request's tools by their names; of any other name, what says nothing.

    Args:
        tools: in OpenAI's form, or bare functions.  What is neither is left out.  None: the tools are not
            known, and arguments that are JSON are read as JSON.
    """

    def __init__(self, tools: Any):
        self._unknown = Schemas(None, as_json=tools is None)
        for tool in tools if isinstance(tools, (list, tuple)) else ():
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                self[function["name"]] = Schemas(function.get("parameters"))

    def __missing__(self, name: str) -> Schemas:
        return self._unknown


class _UnbalancedError(Exception):
    """A tag does not close what is open."""


@dataclass(kw_only=True, eq=False)
class _OpenElement(Element):
    """An element whose end has not come yet; ``begin`` counts the pieces of the call before its content."""

    shape: Shape
    begin: int
    closing: str
    # Where a token stood alone: the children before it, and the texts since the last of them.
    alone: tuple[int, int] | None = None
    # Names of children that may belong around it, if its end is not written.
    doubts: list[str] = field(default_factory=list)
    # It holds tags that can't be any in it, and is all text.
    quotes: bool = False

    @property
    def is_text(self) -> bool:
        return self.quotes or self.shape.is_text

    @property
    def is_leaf(self) -> bool:
        """Whether there is a text in it, and no tags: by its shape, or an array or object as JSON."""
        if self.children or self.alone:
            return False
        text = self.text.lstrip()
        return self.shape.is_leaf or text.startswith(("[", "{")) or bool(self.shape.arrays and text)

    def add(self, child: Element) -> None:
        self.children.append(child)
        self.texts.append([])

    @property
    def last_text(self) -> str:
        """After the last child."""
        return "".join(self.texts[-1])

    @property
    def last_piece(self) -> str:
        return self.texts[-1][-1] if self.texts[-1] else ""


class CallBuilder:
    """Takes the texts and tags of one call, and repairs those that do not match.

    At first every closing tag has to close the innermost element.  At the first that does not, all is read
    again by the tool's schema.  ``broken`` says that no reading is forced: there is no call.
    """

    def __init__(self, name: str, tools: OfferedTools):
        self.name = name
        self.repairs: dict[str, None] = {}
        self.broken = False
        self._schemas = tools[name]
        self._given: list[tuple[str, str, str]] = []
        self._start(strict=True)

    def _start(self, strict: bool) -> None:
        self._strict = strict
        self._pieces: list[str] = []
        self._open: list[_OpenElement] = []
        self._begin("invoke", self._schemas.shape(self._schemas.root), "invoke")
        # Elements closed by a tag of another name, or by an opening tag.
        self._ended: dict[str, Element] = {}
        # The text that was closed last by a tag of another name, and that tag.
        self._wrong: tuple[Element, str] | None = None

    # --- what is open ---

    @property
    def has_open_value(self) -> bool:
        return len(self._open) > 1

    @property
    def _in_string(self) -> bool:
        return any(element.is_text for element in self._open[1:])

    @property
    def in_text(self) -> bool:
        """Whether markup at this place may be text of a value."""
        top = self._open[-1]
        return self.has_open_value and (self._in_string or (top.shape.is_leaf and not top.children))

    def is_open(self, name: str) -> bool:
        return any(element.name == name for element in self._open[1:])

    def open_tags(self) -> list[str]:
        return [element.closing for element in self._open[1:]]

    # --- what is read ---

    def take(self, kind: str, written: str, name: str = "") -> None:
        """The next piece.

        Args:
            kind: ``text``; a tag that would ``open`` or ``close`` an element; ``token``, the namespace token
                alone; or ``quote``, a tag that opens no element of a value: the value quotes it.
            name: of the tag.
        """
        self._given.append((kind, written, name))
        try:
            self._do(kind, written, name)
        except _UnbalancedError:
            self._repair()

    def _repair(self) -> None:
        """Read all again, by the schema."""
        if self._strict:
            self._start(strict=False)
            for given in self._given:
                self._do(*given)

    def _do(self, kind: str, written: str, name: str) -> None:
        if self.broken:
            return
        if kind == "text":
            self._open[-1].texts[-1].append(written)
        elif kind == "open":
            self._read_opening(name)
        elif kind == "quote":
            # Read again, what seemed to quote it may be closed.
            self.broken |= not self.in_text
            self._open[-1].quotes = True
            self._begin(name, self._open[-1].shape, name)
        elif kind == "close":
            self._read_closing(name, written)
        else:
            self._read_token(written)
        self._pieces.append(written)

    def _begin(self, name: str, shape: Shape, closing: str) -> None:
        begin, depth = len(self._pieces) + 1, len(self._open)
        self._open.append(_OpenElement(name, shape=shape, begin=begin, closing=closing, depth=depth))

    def _read_token(self, written: str) -> None:
        top = self._open[-1]
        if top.shape.is_leaf and self.has_open_value:
            if top.is_text or top.shape.is_open:
                top.texts[-1].append(written)
            else:
                self._note("token alone")
            return
        self._take_elements_without_token()
        top.alone = len(top.children), len(top.texts[-1])
        top.texts[-1].append(written)

    def _read_opening(self, name: str) -> None:
        self._close_without_token(max(self._closable(), default=0))
        self._take_elements_without_token()
        closing, m2 = name, parameter_name(name)
        shape = self._open[-1].shape
        if m2 is not None:
            if self._strict and shape.is_array_only:
                # No item of an array.
                raise _UnbalancedError
            name, closing = m2, "parameter"
            self._note("M2 parameter tags")
        elif shape.names(name.strip()):
            name = name.strip()
        if not self._strict:
            self._make_way(name)
        self.broken |= len(self._open) > MAX_DEPTH
        top = self._open[-1]
        shape = top.shape.of_child(name, len(top.children))
        if self._strict or self._in_string:
            pass
        elif not top.shape.names(name):
            self.broken |= top.name == name != "item" or not (top.shape.is_open or top.alone)
        elif any(child.name == name for child in top.children[top.alone[0] if top.alone else 0 :]):
            # Only with balanced tags is a repeated tag a list.
            self.broken |= name != "item" and not shape.arrays
        self._begin(name, shape, closing)

    def _make_way(self, name: str) -> None:
        """Close what is between the element that has this tag by the schema, and the tag."""
        top = self._open[-1]
        takers = [count for count, e in enumerate(reversed(self._open)) if self._lacks(e, name)]
        if takers and takers[0] > 0 and (self._in_string or top.shape.names(name) or not top.shape.is_open):
            taker = self._open[-1 - takers[0]]
            while self._open[-1] is not taker:
                self._ended[self._open[-1].name] = self._open[-1]
                self._end_unclosed(before=name)
        elif self.has_open_value and (self._lacks(self._open[-2], name) or self._open[-2].shape.is_open):
            for element in self._open[1:]:
                if element.name == top.name:
                    element.doubts.append(name)

    def _lacks(self, element: _OpenElement, name: str) -> bool:
        """Whether this tag may come in the element, and has not been there."""
        if name == "item" and element.shape.arrays:
            return True
        place = self._open.index(element) + 1
        been = chain(element.children, self._open[place : place + 1])
        return element.shape.names(name) and all(child.name != name for child in been)

    def _read_closing(self, name: str, written: str) -> None:
        if not self._closes(self._open[-1], name):
            counts = (count for count in self._closable() if self._closes(self._open[-1 - count], name))
            self._close_without_token(next(counts, 0))
        top = self._open[-1]
        if self.has_open_value and self._closes(top, name) and (self._strict or not self._lost(top, name)):
            self._finish()
        elif self._strict:
            raise _UnbalancedError
        else:
            self._repair_closing(name, written)

    def _lost(self, element: _OpenElement, name: str) -> bool:
        """Whether text in it, before a closing tag, has lost its opening tag."""
        return self._lacks(element, name) and bool(element.alone or element.last_text.strip())

    @staticmethod
    def _closes(element: _OpenElement, name: str) -> bool:
        return name in (element.closing, element.name) or name.strip() == element.name

    # --- repairs ---

    def _note(self, repair: str) -> None:
        self.repairs[repair] = None

    def _repair_closing(self, name: str, written: str) -> None:
        top = self._open[-1]
        depth = next((n for n, e in enumerate(reversed(self._open[1:])) if self._closes(e, name)), None)
        if self._is_in_quoting_text(name, written):
            return
        if depth is not None and not self._lost(top, name):
            for _ in range(depth):
                self._end_unclosed()
            if depth:
                self._ended[name] = self._open[-1]
            if not self.broken:
                self._finish()
        elif any(self._lacks(element, name) for element in self._open):
            self._restore_opening(name)
        elif any(element.is_text for element in self._open[1:-1]):
            top.texts[-1].append(written)
        elif len(self._open) > 1 and top.is_leaf:
            self._note("wrong closing tag")
            self._finish()
            self._ended[top.name] = top
            if top.is_text:
                self._wrong = top, written
        else:
            self._note("stray closing tag")
            # A text whose opening tag is lost belongs to it; white space is beside it.
            self.broken |= bool(top.last_text.strip())
            top.texts[-1].clear()
            self._wrong = None
            # An element that was ended early, and whose end comes now, was read wrongly.
            self.broken |= name in self._ended and top.children[-1:] != [self._ended[name]]

    def _is_in_quoting_text(self, name: str, written: str) -> bool:
        """Whether a tag that seemed to close a text is part of it, as text and its real end come after it."""
        top = self._open[-1]
        element, quoted = self._wrong or (None, "")
        more = top.last_text
        if not element or top.children[-1:] != [element] or top.alone or not more.strip():
            return False
        if name == element.name:
            element.texts[-1].append(quoted + more)
            top.texts[-1].clear()
            self._wrong = None
            return True
        if self.is_open(name) or any(self._lacks(each, name) for each in self._open):
            return False
        top.texts[-1].append(written)
        return True

    def _restore_opening(self, name: str) -> None:
        """The tag closes what is after a token alone, or the text just before it."""
        top = self._open[-1]
        if not self._lacks(top, name):
            self.broken = True
            return
        self._note("opening tag missing")
        children, texts = top.alone or (len(top.children), 0)
        self._begin(name, top.shape.of_child(name, children), name)
        element = self._open[-1]
        element.children, top.children = top.children[children:], top.children[:children]
        # Without the token itself.
        element.texts = [top.texts[children][texts + bool(top.alone) :], *top.texts[children + 1 :]]
        top.texts[children:] = [top.texts[children][:texts]]
        text = element.text.strip()
        is_unlikely = not top.alone and (not text or name == "item")
        self.broken |= is_unlikely or bool(element.children and (text or element.shape.is_leaf))
        top.alone = None
        self._finish()

    def _end_unclosed(self, before: str = "") -> None:
        """The innermost element ends, and its closing tag is missing: ``before`` an opening tag."""
        top, parent = self._open[-1], self._open[-2]
        quoted = any(element.is_text for element in self._open[1:-1])
        if not quoted:
            self._note("closing tag missing")
            mixed = bool(top.children) and not top.is_text and top.text.strip() != ""
            is_foreign = not parent.shape.names(top.name) and not parent.shape.is_open
            # A second tag of a name is around it, so the first is not.
            doubts = top.doubts[top.doubts.index(before) + 1 :] if before in top.doubts else top.doubts
            # A number that never came: the tag belonged elsewhere.
            is_empty = before and top.is_leaf and not top.is_text and not top.text.strip()
            if doubts or mixed or is_foreign or is_empty or parent.name == top.name:
                self.broken = True
        self._finish()

    # --- tags without their token ---

    def _closings(self) -> list[tuple[str, int]]:
        """Closing tags without their token at the end of the text: names and places, the last first."""
        text, found = self._open[-1].last_piece, list[tuple[str, int]]()
        end = len(text)
        while len(found) < len(self._open):
            begin = text.rfind("</", 0, end)
            tag = _CLOSING_TAG.match(text, begin, end) if begin >= 0 else None
            if tag is None or tag.end() != end:
                break
            found.append((tag[1], begin))
            end = begin
        return found

    def _closable(self, first: int = 1) -> list[int]:
        """How many of the innermost elements, from the ``first`` on, those tags may close, by their names."""
        if not (names := [name for name, _ in self._closings()]):
            return []
        opened = [element.closing for element in self._open[first:]][::-1]
        counts = range(1, min(len(names), len(opened)) + 1)
        return [count for count in counts if names[count - 1 :: -1] == opened[:count]]

    def _close_without_token(self, count: int) -> None:
        """Close ``count`` elements whose closing tags are there as text."""
        if count == 0:
            return
        innermost, begins = self._open[-1], [begin for _, begin in self._closings()[:count]]
        texts = innermost.texts[-1]
        text, texts[-1] = texts[-1], texts[-1][: begins[-1]]
        self._note("token missing")
        if f"</{innermost.closing}>" in texts[-1]:
            self.broken = True
            return
        for begin in reversed(begins):
            self._finish(cut=len(text) - begin)

    def _take_elements_without_token(self) -> None:
        element = self._open[-1]
        text = element.last_piece
        if "<" in text and (found := bare_elements(text, depth=len(self._open))):
            self._note("token missing")
            shape = element.shape
            if not self._strict and not shape.is_open and not all(shape.names(each.name) for each in found):
                self.broken = True
            element.texts[-1].pop()
            for each in found:
                element.add(each)

    # --- ends ---

    def _finish(self, cut: int = 0) -> None:
        """The innermost element ends; ``cut``: so many characters before the end of what was read."""
        top = self._open[-1]
        if top.children or top.shape.is_structure:
            self._take_elements_without_token()
        self._open.pop()
        if top.children:
            source = "".join(self._pieces[top.begin :])
            top.source = source[: len(source) - cut]
            if top.quotes:
                top.texts, top.children = [[top.source]], []
            elif not self._strict and not top.is_text and top.text.strip():
                self.broken = True
        self._open[-1].add(top)

    def end_all(self) -> None:
        """The call ends, and whatever is open in it."""
        self._repair()
        while len(self._open) > 1 and not self.broken:
            self._end_unclosed()

    def closes_without_token(self) -> bool:
        """Whether ``</invoke>`` stands at the end of the text; then all that it closes is closed."""
        if self.broken or len(self._open) not in self._closable(first=0):
            return False
        texts, begin = self._open[-1].texts[-1], self._closings()[0][1]
        self._pieces[-1] = self._pieces[-1][: begin - len(texts[-1])]
        texts[-1] = texts[-1][:begin]
        self._close_without_token(len(self._open) - 1)
        self._note("token missing")
        return True

    def close_at_end(self) -> None:
        """Closing tags without their token, just before the end of the call."""
        if (count := len(self._open) - 1) in self._closable():
            self._close_without_token(count)

    def built(self) -> tuple[ToolCall | None, str]:
        """The call, if there is one, and text that stands between its parameters."""
        if self.broken or len(self._open) > 1:
            return None, ""
        self._take_elements_without_token()
        invoke = self._open[0]
        text = invoke.text
        text = text if text.strip() else ""
        if text and not self._strict:
            return None, ""
        if text and not invoke.children:
            arguments = json_object(text)
            self._note("JSON arguments")
            return (None if arguments is None else ToolCall(self.name, arguments)), ""
        try:
            call = ToolCall(self.name, typed_arguments(invoke.children, self._schemas))
        except RecursionError:
            return None, ""
        if self._schemas.found_bare_tags:
            self._note("token missing")
        return call, text
