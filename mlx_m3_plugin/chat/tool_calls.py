"""What mlx-lm and mlx-vlm call a tool parser: M3's, and the form in which calls are handed to it.

``docs/tool-calls.md`` has the grammar and every decision on malformed text.
"""

import json
import logging
from collections.abc import Iterable
from typing import Any

from mlx_m3_plugin.chat.calls import ToolCall
from mlx_m3_plugin.chat.markers import MARKERS, TOOL_CALL_END, TOOL_CALL_START
from mlx_m3_plugin.chat.reply import Event, ReplyParser
from mlx_m3_plugin.chat.values import json_object

log = logging.getLogger("mlx_m3_plugin")

tool_call_start, tool_call_end = TOOL_CALL_START, TOOL_CALL_END

# Markers within strings of JSON, where a server must not find them.
_IN_JSON = {marker: f"\\u{ord(marker[0]):04x}{marker[1:]}" for marker in MARKERS}


class ToolCallError(ValueError):
    """A block with no complete call in it."""


def parse_tool_call(text: str, tools: Any = None) -> dict[str, Any] | list[dict[str, Any]]:
    """The calls in the text between the markers, in mlx-lm's form: a dict for one, a list for more.

    Args:
        tools: the request's tools, in OpenAI's form; None if they are not known.

    Raises:
        ToolCallError: there is no complete call.
    """
    if made := _from_json(text):
        return made
    parser = ReplyParser(tools)
    events = parser.feed(TOOL_CALL_START + text) + parser.finish()
    calls = [event.call.as_dict() for event in events if event.call]
    if not calls:
        raise ToolCallError("there is no complete call in the tool-call block; see docs/tool-calls.md")
    RepairLog().add(events)
    return calls[0] if len(calls) == 1 else calls


def as_json(call: ToolCall) -> str:
    """What :func:`parse_tool_call` reads as this call; without markers in it."""
    text = json.dumps(call.as_dict())
    for marker, escaped in _IN_JSON.items():
        text = text.replace(marker, escaped)
    return text


def _from_json(text: str) -> dict[str, Any] | None:
    """The call that :func:`as_json` wrote; its reader has judged it."""
    call = json_object(text) if text.startswith('{"name": ') else None
    is_ours = call and call.keys() == {"name", "arguments"} and isinstance(call["arguments"], dict)
    return call if is_ours else None


class RepairLog:
    """Says once for each reply which kinds of repairs the calls of a tool needed."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if event.kind == "repair" and event.text not in self._logged:
                self._logged.add(event.text)
                log.info("mlx-m3-plugin: repaired a tool call: %s", event.text)
