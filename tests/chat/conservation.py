"""Whether a reply's reasoning, content and calls hold all of its text, in order.

The text is read once more, from left to right, against what was said of it: the checker holds every place at
which it may be and drops those that do not fit.  Only markers, tags that stand for the call that was made,
and white space beside them are passed over; tags that do not match need a repair that was logged.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlx_m3_plugin.chat.calls import ToolCall
from mlx_m3_plugin.chat.reply import Event
from tests.chat.tool_values import NS

_NS = re.escape(NS)
_MARKER = re.compile(rf"(?P<think><mm:think>)|(?P<said></mm:think>)|{_NS}\s{{0,8}}<(?P<end>/?)tool_call\s*>")
_SPACE = re.compile(r"\s+")
_INVOKE_END = re.compile(rf"{_NS}\s{{0,8}}</invoke\s*>")
_BARE_INVOKE_END = re.compile(r"\s*</invoke\s*>")
_ANY_CLOSING = re.compile(rf"{_NS}\s{{0,8}}</[^<>]+>")
_HEADER_END = re.compile(rf">|(?={_NS})")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class _Place:
    """``block``: "" outside, "owes" before its first call, "called" after it, "bare" after a call without
    a block; ``fresh``: white space may be passed over; ``owed``: calls of a JSON list still to come."""

    at: int
    channel: str
    block: str = ""
    fresh: bool = False
    owed: tuple[str, ...] = ()


def accounts_for(text: str, events: list[Event], in_reasoning: bool = False) -> bool:
    """Whether the events hold every character of ``text`` that is no part of a parsed marker, in order."""
    return _Reader(text).reads(events, _Place(0, "reasoning" if in_reasoning else "content"))


class _Reader:
    def __init__(self, text: str):
        self.text = text
        self.markers = {found.start(): found for found in _MARKER.finditer(text)}

    def reads(self, events: list[Event], begin: _Place) -> bool:
        places, loose, repairs = {begin}, set[tuple[_Place, str]](), set[str]()
        for event in events:
            if event.kind == "repair":
                repairs.add(event.text.rpartition(", ")[0])
            elif event.call is None:
                loose = self.after_text(places, event)
                places = {place for place, rest in loose if not rest}
            else:
                loose |= {(place, "") for place in self.passed(places)}
                places, loose = set(self.after_call(loose, event.call, repairs)), set()
                repairs = set()
        ends = self.passed(places)
        return not repairs and any(e.at == len(self.text) and e.block != "owes" and not e.owed for e in ends)

    def passed(self, places: set[_Place]) -> set[_Place]:
        """And all places after markers and white space."""
        found, todo = set(places), list(places)
        while todo:
            for place in self.passes(todo.pop()):
                if place not in found:
                    found.add(place)
                    todo.append(place)
        return found

    def passes(self, place: _Place) -> Iterator[_Place]:
        if place.fresh and (space := _SPACE.match(self.text, place.at)):
            yield replace(place, at=space.end())
        marker = self.markers.get(place.at)
        if marker is None or place.owed:
            return
        if marker["think"] or marker["said"]:
            if place.block != "owes":
                yield replace(place, at=marker.end(), channel="reasoning" if marker["think"] else "content")
        elif not marker["end"]:
            if place.block == "owes" and not place.fresh:
                return
            yield _Place(marker.end(), place.channel, "owes", fresh=True)
        elif place.block in ("called", "bare"):
            yield _Place(marker.end(), place.channel)

    def after_text(self, places: set[_Place], event: Event) -> set[tuple[_Place, str]]:
        """Places with what of the event's text is still to come; a call may hold the rest."""
        todo = [(place, event.text) for place in places]
        found = set(todo)
        while todo:
            place, rest = todo.pop()
            nexts = [(each, rest) for each in self.passes(place)]
            if rest and place.channel == event.kind and self.text[place.at : place.at + 1] == rest[0]:
                block = "" if place.block == "bare" else place.block
                nexts.append((replace(place, at=place.at + 1, fresh=False, block=block), rest[1:]))
            for each in nexts:
                if each not in found:
                    found.add(each)
                    todo.append(each)
        return found

    # --- calls ---

    def after_call(
        self, places: set[tuple[_Place, str]], call: ToolCall, repairs: set[str]
    ) -> Iterator[_Place]:
        wanted = _normal(call)
        for place, loose in places:
            if place.owed:
                if place.owed[0] == wanted and not loose:
                    yield replace(place, owed=place.owed[1:])
            elif "JSON call" in repairs:
                value, end = self.json(place.at)
                values = value if isinstance(value, list) else [value]
                calls = [normal for each in values if (normal := _normal_json(each))]
                if calls[:1] == [wanted] and not loose and place.block:
                    yield _Place(end, place.channel, "called", True, tuple(calls[1:]))
            else:
                reader = _CallReader(self.text, repairs)
                block = "called" if place.block in ("owes", "called") else "bare"
                for end in set(reader.ends(place.at, call, loose)):
                    yield _Place(end, place.channel, block, True)

    def json(self, at: int) -> tuple[Any, int]:
        try:
            return _DECODER.raw_decode(self.text, at)
        except (ValueError, RecursionError):
            return None, at


def _normal(call: ToolCall) -> str:
    return json.dumps([call.name, call.arguments])


def _normal_json(value: Any) -> str | None:
    value = value.get("function", value) if isinstance(value, dict) else {}
    if not isinstance(value, dict) or "name" not in value:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    return json.dumps([value["name"], json.loads(arguments) if isinstance(arguments, str) else arguments])


class _CallReader:
    """The source of one call.  Each method yields the places where its part may end."""

    def __init__(self, text: str, repairs: set[str]):
        self.text, self.repairs = text, repairs
        self.token = rf"(?:{_NS}\s{{0,8}})"
        if "token missing" in repairs:
            self.token = rf"(?:{self.token}|\s*)"

    def ends(self, at: int, call: ToolCall, loose: str) -> Iterator[int]:
        for begin in self.headers(at, call.name):
            if "JSON arguments" in self.repairs:
                for end in self.value(begin, call.arguments):
                    yield from self.invoke_ends(end)
            for end, rest in self.members(begin, call.arguments, loose):
                if not rest:
                    yield from self.invoke_ends(end)

    def headers(self, at: int, name: str) -> Iterator[int]:
        quoted = "|".join(f"{quote}{re.escape(name)}{quote}" for quote in ("'", '"', ""))
        if tag := self.match(rf"{self.token}<invoke\s+(?:name|to)\s*=\s*(?:{quoted})\s*>", at):
            yield tag.end()
        if "invoke header" in self.repairs and self.text.startswith(NS, at):
            for end in _HEADER_END.finditer(self.text, at + len(NS), at + 320):
                if name in self.text[at + len(NS) : end.end()]:
                    yield end.end()

    def invoke_ends(self, at: int) -> Iterator[int]:
        if "invoke not closed" in self.repairs:
            yield at
        if tag := _INVOKE_END.match(self.text, at):
            yield tag.end()
        if "token missing" in self.repairs and (tag := _BARE_INVOKE_END.match(self.text, at)):
            yield tag.end()

    def members(self, at: int, value: dict[str, Any], loose: str) -> set[tuple[int, str]]:
        """Elements in the order of the keys; one whose value is a list may come as several."""
        keys = list(value)
        todo = [(at, loose, (-2,) * len(keys))]
        found = set(todo)
        while todo:
            at, rest, progress = todo.pop()
            nexts = [(end, rest, progress) for end in self.between(at)]
            if rest and self.text[at : at + 1] == rest[0]:
                nexts.append((at + 1, rest[1:], progress))
            for n, key in enumerate(keys):
                if progress[n] == -2 and -2 in progress[:n]:
                    break
                for end, count in self.parts(at, key, value[key], progress[n]):
                    nexts.append((end, rest, (*progress[:n], count, *progress[n + 1 :])))
            for each in nexts:
                if each not in found:
                    found.add(each)
                    todo.append(each)
        done = [[-1, len(value[key])] if isinstance(value[key], list) else [-1] for key in keys]
        return {
            (at, rest)
            for at, rest, progress in found
            if all(count in of for count, of in zip(progress, done, strict=True))
        }

    def parts(self, at: int, key: str, value: Any, count: int) -> Iterator[tuple[int, int]]:
        """The element of a key, or one of several; ``count``: how many items came before, -1 for the
        whole, -2 for none yet."""
        if count == -2:
            for end in self.element(at, key, value):
                yield end, -1
            count = 0
        if isinstance(value, list) and count >= 0:
            if count < len(value):
                for end in self.element(at, key, value[count]):
                    yield end, count + 1
            for last in range(count, len(value) + 1):
                for end in self.element(at, key, value[count:last]):
                    yield end, last

    def between(self, at: int) -> Iterator[int]:
        if space := _SPACE.match(self.text, at):
            yield space.end()
        if "stray closing tag" in self.repairs and (tag := _ANY_CLOSING.match(self.text, at)):
            yield tag.end()
        if "token alone" in self.repairs and self.text.startswith(NS, at):
            yield at + len(NS)

    def element(self, at: int, name: str, value: Any) -> Iterator[int]:
        for begin, closing in self.openings(at, name):
            for end in self.value(begin, value):
                yield from self.closings(end, closing)

    def openings(self, at: int, name: str) -> Iterator[tuple[int, str]]:
        if tag := self.match(rf"{self.token}<{re.escape(name)}>", at):
            yield tag.end(), name
        if {"M2 parameter tags", "token missing"} & self.repairs:
            token = self.token if "M2 parameter tags" in self.repairs else r"\s*"
            m2 = rf"{token}<parameter\s+name\s*=\s*[\"']?{re.escape(name)}[\"']?\s*>"
            if tag := self.match(m2, at):
                yield from ((tag.end(), "parameter"), (tag.end(), name))
        if "opening tag missing" in self.repairs:
            yield at, name
            if self.text.startswith(NS, at):
                yield at + len(NS), name

    def closings(self, at: int, name: str) -> Iterator[int]:
        if tag := self.match(rf"{self.token}</{re.escape(name)}>", at):
            yield tag.end()
        if "closing tag missing" in self.repairs:
            yield at
        if "wrong closing tag" in self.repairs and (tag := _ANY_CLOSING.match(self.text, at)):
            yield tag.end()

    def value(self, at: int, value: Any) -> Iterator[int]:
        if isinstance(value, str):
            if self.text.startswith(value, at):
                yield at + len(value)
            return
        for begin in self.between(at):
            yield from self.value(begin, value)
        try:
            found, end = _DECODER.raw_decode(self.text, at)
        except (ValueError, RecursionError):
            found, end = object(), at
        if found == value:
            yield from (end, *self.between(end))
        if isinstance(value, dict):
            rest = value.get("$text", "")
            members = {key: member for key, member in value.items() if key != "$text"}
            yield from (end for end, loose in self.members(at, members, rest) if not loose)
        elif isinstance(value, list):
            yield from self.items(at, value)
        elif value is None:
            yield at

    def items(self, at: int, values: list[Any]) -> set[int]:
        """Elements, or text between them."""
        todo = [(at, 0)]
        found = set(todo)
        while todo:
            at, count = todo.pop()
            nexts = [(end, count) for end in self.between(at)]
            if count < len(values):
                # Where all tags match, a list's may have any name.
                named = self.match(
                    rf"{self.token}<(?:parameter\s+name\s*=\s*)?[\"']?([^<>/\"']+)[\"']?\s*>", at
                )
                for name in {"item", named[1] if named else "item"}:
                    nexts += [(end, count + 1) for end in self.element(at, name, values[count])]
                nexts += [(end, count + 1) for end in self.value(at, values[count])]
            for each in nexts:
                if each not in found:
                    found.add(each)
                    todo.append(each)
        return {at for at, count in found if count == len(values)}

    def match(self, pattern: str, at: int) -> re.Match[str] | None:
        return re.compile(pattern).match(self.text, at)
