"""M3's tool calls: from the text of a block to names and arguments.

    NS<tool_call>
    NS<invoke name="search">NS<query>mlxNS</query>NS<tags>NS<item>aNS</item>NS</tags>NS</invoke>
    NS</tool_call>

``NS`` is one token, ``]<]minimax[>[``, and stands before every tag; whatever else is between
tags is literal text.  ``docs/tool-calls.md`` has the grammar and every decision on malformed text.

This module is what mlx-lm and mlx-vlm call a tool parser: ``tool_call_start``,
``tool_call_end`` and :func:`parse_tool_call`.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_m3_plugin.chat.markers import NAMESPACE
from mlx_m3_plugin.chat.values import MAX_DEPTH, Element, Schemas, bare_elements, typed_arguments

log = logging.getLogger("mlx_m3_plugin")

tool_call_start = f"{NAMESPACE}<tool_call>"
tool_call_end = f"{NAMESPACE}</tool_call>"

# What may be between the namespace token and a tag of the block; a parameter's follows at once.
MOST_BLANKS = 8
_BLANKS = rf"\s{{0,{MOST_BLANKS}}}"
# Models write ``to=`` for ``name=`` now and then.
_INVOKE = re.compile(rf"""{_BLANKS}<invoke\s+(?:name|to)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'<>]+))\s*>""")
_BLOCK_TAG = re.compile(rf"{_BLANKS}</?tool_call>")
_END_OF_INVOKE = re.compile(rf"{_BLANKS}</invoke>")
_TAG = re.compile(r"<(/?)([^<>/][^<>]*)>")
_CLOSING_TAG = re.compile(r"</([^<>]+)>\s*")
MOST_PROBLEMS = 20


class ToolCallError(ValueError):
    """A block with no complete call in it; says what is wrong with it."""


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": self.arguments}


@dataclass
class Block:
    """What was read from a block: complete calls, and one line for everything that is wrong."""

    calls: list[ToolCall] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def parse_tool_call(text: str, tools: Any = None) -> dict[str, Any] | list[dict[str, Any]]:
    """The calls in the text between the markers, in mlx-lm's form: a dict for one, a list for more.

    Raises:
        ToolCallError: there is no complete call.  Of a block with some, the rest is logged.
    """
    block = parse_block(text, tools)
    if not block.calls:
        raise ToolCallError("; ".join(block.problems) or "the tool-call block is empty")
    for problem in block.problems:
        log.warning("mlx-m3-plugin: in a tool call: %s", problem)
    calls = [call.as_dict() for call in block.calls]
    return calls[0] if len(calls) == 1 else calls


def parse_block(text: str, tools: Any = None) -> Block:
    """Read the text of a block, with or without its markers; never raises.

    Args:
        tools: the request's tools, in OpenAI's form, or made ready by :class:`OfferedTools`; they say
            what types arguments have.
    """
    reader = _BlockReader(text, tools if isinstance(tools, OfferedTools) else OfferedTools(tools))
    reader.read()
    return reader.block


class OfferedTools:
    """A request's tools, made ready for any number of calls.

    Args:
        tools: in OpenAI's form, or bare functions.  What is neither is left out.
    """

    def __init__(self, tools: Any):
        self._schemas: dict[str, Schemas] = {}
        for tool in tools if isinstance(tools, (list, tuple)) else ():
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                self._schemas[function["name"]] = Schemas(function.get("parameters"))

    def lack(self, name: str) -> bool:
        """Whether there are tools, and ``name`` is none of them."""
        return bool(self._schemas) and name not in self._schemas

    def schemas_of(self, name: str) -> Schemas:
        return self._schemas.get(name) or Schemas(None)


class _BlockReader:
    """Goes once through the tags, with the open ones on a stack."""

    def __init__(self, text: str, tools: OfferedTools):
        self.block = Block()
        self._text = text
        self._tools = tools
        self._call: str | None = None
        self._broken: str | None = None
        # The invoke itself, and the elements open in it.
        self._open: list[_OpenElement] = []

    def read(self) -> None:
        begin = self._text.find(NAMESPACE)
        self._note_stray(self._text[: begin if begin >= 0 else None])
        while begin >= 0:
            after = begin + len(NAMESPACE)
            end = self._text.find(NAMESPACE, after)
            self._read_piece(begin, after, end if end >= 0 else len(self._text))
            begin = end
        self._leave_call(len(self._text))

    def _read_piece(self, begin: int, after: int, end: int) -> None:
        """From one namespace token at ``begin`` to the next one at ``end``."""
        if tag := _INVOKE.match(self._text, after, end):
            self._leave_call(begin)
            self._begin_call(next(name for name in tag.groups() if name is not None), tag.end(), end)
        elif tag := _BLOCK_TAG.match(self._text, after, end):
            self._leave_call(begin)
            self._note_stray(self._text[tag.end() : end])
        elif self._call is None:
            self._note_stray(self._text[after:end])
        elif tag := _END_OF_INVOKE.match(self._text, after, end):
            self._end_call(begin)
            self._note_stray(self._text[tag.end() : end])
        elif self._broken is None:
            self._read_tag(begin, after, end)

    def _read_tag(self, begin: int, after: int, end: int) -> None:
        tag = _TAG.match(self._text, after, end)
        if tag is None:
            # The token by itself: what follows goes on with the text before it.
            self._open[-1].texts.append(self._text[after:end])
        elif tag[1]:
            self._close(tag[2], begin)
            if self._broken is None:
                self._open[-1].texts.append(self._text[tag.end() : end])
        else:
            closings = self._closings()
            self._close_without_token(max(self._closable(closings), default=0), closings, begin)
            self._take_elements_without_token()
            if len(self._open) > MAX_DEPTH:
                self._broken = f"has tags more than {MAX_DEPTH} deep"
            self._open.append(_OpenElement(tag[2], tag.end(), [self._text[tag.end() : end]]))

    def _begin_call(self, name: str, position: int, end: int) -> None:
        self._call, self._broken = name, None
        self._open = [_OpenElement("invoke", position, [self._text[position:end]])]

    def _close(self, name: str, position: int) -> None:
        if self._open[-1].name != name:
            closings = self._closings()
            for count in self._closable(closings):
                if self._open[-1 - count].name == name:
                    self._close_without_token(count, closings, position)
                    break
        if len(self._open) > 1 and self._open[-1].name == name:
            self._finish(position)
        else:
            expected = f"</{self._open[-1].name}>" if len(self._open) > 1 else "a parameter or </invoke>"
            self._broken = f"has </{name}> where {expected} was to come"

    def _closings(self) -> list[tuple[str, int]]:
        """Closing tags without their token at the end of the text: names and places, the last first."""
        text = self._open[-1].texts[-1]
        found: list[tuple[str, int]] = []
        end = len(text)
        while len(found) < len(self._open):
            begin = text.rfind("</", 0, end)
            tag = _CLOSING_TAG.match(text, begin, end) if begin >= 0 else None
            if tag is None or tag.end() != end:
                break
            found.append((tag[1], begin))
            end = begin
        return found

    def _closable(self, closings: list[tuple[str, int]]) -> list[int]:
        """How many of the innermost elements those tags may close, by their names."""
        names, opened = [name for name, _ in closings], [element.name for element in self._open[:0:-1]]
        counts = range(1, min(len(names), len(opened)) + 1)
        return [count for count in counts if names[count - 1 :: -1] == opened[:count]]

    def _close_without_token(self, count: int, closings: list[tuple[str, int]], position: int) -> None:
        """Close ``count`` elements whose closing tags are there as text, just before ``position``."""
        if count == 0:
            return
        innermost = self._open[-1]
        text, begin = innermost.texts[-1], closings[count - 1][1]
        innermost.texts[-1] = text[:begin]
        if f"</{innermost.name}>" in innermost.texts[-1]:
            self._broken = f"closes <{innermost.name}> twice"
            return
        for _, begin in closings[count - 1 :: -1]:
            self._finish(position - len(text) + begin)
        self._open[-1].texts.append("")

    def _take_elements_without_token(self) -> None:
        element = self._open[-1]
        if found := bare_elements(element.texts[-1], depth=len(self._open)):
            element.children += found
            element.texts[-1] = ""

    def _finish(self, position: int) -> None:
        """The innermost element ends at ``position``."""
        if self._open[-1].children:
            self._take_elements_without_token()
        done = self._open.pop()
        source = self._text[done.begin : position]
        element = Element(done.name, "".join(done.texts), done.children, source, depth=len(self._open))
        self._open[-1].children.append(element)

    def _leave_call(self, position: int) -> None:
        """What follows belongs to no open call: it may have been closed without the token."""
        if self._call is None:
            return
        closings = self._closings()
        if self._broken is None and closings and closings[0][0] == "invoke":
            begin, texts = closings[0][1], self._open[-1].texts
            position -= len(texts[-1]) - begin
            texts[-1] = texts[-1][:begin]
            self._end_call(position)
        else:
            self._drop_call(self._broken or "is not closed")

    def _end_call(self, position: int) -> None:
        closings = self._closings()
        if self._broken is None and len(self._open) - 1 in self._closable(closings):
            self._close_without_token(len(self._open) - 1, closings, position)
        if self._broken is None and len(self._open) > 1:
            self._broken = f"does not close <{self._open[-1].name}>"
        if self._broken is not None:
            self._drop_call(self._broken)
            return
        self._take_elements_without_token()
        assert self._call is not None
        name, invoke = self._call, self._open[0]
        text = "".join(invoke.texts)
        if text.strip():
            self._note(f"text between the parameters of {name}: {_shortened(text)}")
        if self._tools.lack(name):
            self._note(f"{name} is none of the tools that were offered")
        try:
            arguments = typed_arguments(invoke.children, self._tools.schemas_of(name))
        except RecursionError:
            self._drop_call("is nested too deep")
            return
        self.block.calls.append(ToolCall(name, arguments))
        self._call = None

    def _drop_call(self, why: str) -> None:
        self._note(f"the call of {self._call} {why}")
        self._call = None

    def _note_stray(self, text: str) -> None:
        if text.strip():
            self._note(f"text that belongs to no call: {_shortened(text)}")

    def _note(self, problem: str) -> None:
        # Of a text that is nothing but wrong, the beginning will do.
        if len(self.block.problems) < MOST_PROBLEMS:
            self.block.problems.append(problem)


@dataclass
class _OpenElement:
    """An element whose end has not come yet; ``begin`` is where its content does."""

    name: str
    begin: int
    texts: list[str]
    children: list[Element] = field(default_factory=list)


def _shortened(text: str, longest: int = 80) -> str:
    text = text.strip()
    return repr(text if len(text) <= longest else text[:longest] + "...")
