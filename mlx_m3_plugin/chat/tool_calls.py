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

from .values import MAX_DEPTH, Element, bare_elements, typed

log = logging.getLogger("mlx_m3_plugin")

NAMESPACE = "]<]minimax[>["
tool_call_start = f"{NAMESPACE}<tool_call>"
tool_call_end = f"{NAMESPACE}</tool_call>"

# Models write ``to=`` for ``name=`` now and then.
_INVOKE = re.compile(r"""\s*<invoke\s+(?:name|to)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'<>]+))\s*>""")
_BLOCK_TAG = re.compile(r"\s*</?tool_call>")
_END_OF_INVOKE = re.compile(r"\s*</invoke>")
_TAG = re.compile(r"<(/?)([^<>/][^<>]*)>")
_MOST_PROBLEMS = 20


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
        tools: the request's tools, in OpenAI's form; they say what types arguments have.
    """
    reader = _BlockReader(text, _schemas(tools))
    reader.read()
    return reader.block


class _BlockReader:
    """Goes once through the tags, with the open ones on a stack."""

    def __init__(self, text: str, schemas: Mapping[str, Any]):
        self.block = Block()
        self._text = text
        self._schemas = schemas
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
        if self._call is not None:
            self._drop_call("is not closed")

    def _read_piece(self, begin: int, after: int, end: int) -> None:
        """From one namespace token at ``begin`` to the next one at ``end``."""
        if tag := _INVOKE.match(self._text, after, end):
            if self._call is not None:
                self._drop_call("is not closed")
            self._begin_call(next(name for name in tag.groups() if name is not None), tag.end(), end)
        elif self._call is None:
            tag = _BLOCK_TAG.match(self._text, after, end)
            self._note_stray(self._text[tag.end() if tag else after : end])
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
        elif len(self._open) > MAX_DEPTH:
            self._broken = f"has tags more than {MAX_DEPTH} deep"
        else:
            while len(self._open) > 1 and self._close_without_token():
                pass
            self._open.append(_OpenElement(tag[2], tag.end(), [self._text[tag.end() : end]]))

    def _begin_call(self, name: str, position: int, end: int) -> None:
        self._call, self._broken = name, None
        self._open = [_OpenElement("invoke", position, [self._text[position:end]])]

    def _close(self, name: str, position: int) -> None:
        while len(self._open) > 1 and self._open[-1].name != name and self._close_without_token():
            pass
        if len(self._open) > 1 and self._open[-1].name == name:
            self._finish(self._text[self._open[-1].begin : position])
        else:
            expected = f"</{self._open[-1].name}>" if len(self._open) > 1 else "a parameter or </invoke>"
            self._broken = f"has </{name}> where {expected} was to come"

    def _close_without_token(self) -> bool:
        """Close the innermost element if its own closing tag is there, as text."""
        element, closing = self._open[-1], f"</{self._open[-1].name}>"
        last = element.texts[-1].rstrip()
        if not last.endswith(closing):
            return False
        element.texts[-1] = last.removesuffix(closing)
        self._finish("".join(element.texts))
        return True

    def _finish(self, source: str) -> None:
        done = self._open.pop()
        element = Element(done.name, "".join(done.texts), done.children, source, depth=len(self._open))
        self._open[-1].children.append(element)

    def _end_call(self, position: int) -> None:
        while self._broken is None and len(self._open) > 1:
            if not self._close_without_token():
                self._broken = f"does not close <{self._open[-1].name}>"
        if self._broken is not None:
            self._drop_call(self._broken)
            return
        assert self._call is not None
        name, invoke = self._call, self._open[0]
        parameters = [*invoke.children, *self._parameters_without_token("".join(invoke.texts), name)]
        if self._schemas and name not in self._schemas:
            self._note(f"{name} is none of the tools that were offered")
        self.block.calls.append(ToolCall(name, _arguments(parameters, self._schemas.get(name))))
        self._call = None

    def _parameters_without_token(self, text: str, name: str) -> list[Element]:
        elements = bare_elements(text, depth=1)
        if elements is None and text.strip():
            self._note(f"text between the parameters of {name}: {_shortened(text)}")
        return elements or []

    def _drop_call(self, why: str) -> None:
        self._note(f"the call of {self._call} {why}")
        self._call = None

    def _note_stray(self, text: str) -> None:
        if text.strip():
            self._note(f"text that belongs to no call: {_shortened(text)}")

    def _note(self, problem: str) -> None:
        # Of a text that is nothing but wrong, the beginning will do.
        if len(self.block.problems) < _MOST_PROBLEMS:
            self.block.problems.append(problem)


@dataclass
class _OpenElement:
    """An element whose end has not come yet; ``begin`` is where its content does."""

    name: str
    begin: int
    texts: list[str]
    children: list[Element] = field(default_factory=list)


def _arguments(parameters: list[Element], schema: Any) -> dict[str, Any]:
    root = schema if isinstance(schema, Mapping) else {}
    value = typed(Element("invoke", children=parameters), {**root, "type": "object"}, root)
    return value if isinstance(value, dict) else {}


def _schemas(tools: Any) -> dict[str, Any]:
    """``{name: parameters}`` of OpenAI's ``tools``, or of bare functions."""
    schemas = {}
    for tool in tools if isinstance(tools, (list, tuple)) else ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            schemas[function["name"]] = function.get("parameters")
    return schemas


def _shortened(text: str, longest: int = 80) -> str:
    text = text.strip()
    return repr(text if len(text) <= longest else text[:longest] + "...")
