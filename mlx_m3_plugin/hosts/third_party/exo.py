"""exo: calls, whose markers it looks for in single tokens; M3's are longer."""

import json
from collections.abc import Iterator
from typing import Any

from mlx_m3_plugin.chat.markers import TOOL_CALL_START
from mlx_m3_plugin.chat.reply import ReplyParser
from mlx_m3_plugin.chat.tool_calls import RepairLog
from mlx_m3_plugin.hosts.patching import Arguments, Patch, by_target, for_m3
from mlx_m3_plugin.hosts.third_party.parsers import text_of


def parse_tool_calls(module: Any, original: Any) -> Any:
    def parse(given: Arguments) -> Iterator[Any]:
        """A reply without its reasoning; upstream asks again after each None."""
        reply, log, calls = ReplyParser(given.arguments["tools"]), RepairLog(), []
        for response in given.arguments["responses"]:
            if response is None or response.is_thinking:
                yield response
                continue
            is_last = response.finish_reason is not None
            events = reply.feed(response.text) + (reply.finish() if is_last else [])
            log.add(events)
            for call in (event.call for event in events if event.call is not None):
                calls.append(module.ToolCallItem(name=call.name, arguments=json.dumps(call.arguments)))
            text = text_of(events, "content")
            if text or (is_last and not calls):
                ends = response.finish_reason if not calls else None
                yield response.model_copy(update={"text": text, "finish_reason": ends})
            if is_last and calls:
                yield module.ToolCallResponse(tool_calls=calls, usage=response.usage, stats=response.stats)

    return for_m3(original, lambda given: given["tool_parser"].start_parsing == TOOL_CALL_START, parse)


_PATCHES = {
    "exo.worker.runner.llm_inference.model_output_parsers:parse_tool_calls"
    "(responses, tool_parser, tools)": Patch(
        "tool calls",
        parse_tool_calls,
        "never: exo looks for the markers of calls in single tokens",
        ("ToolCallItem", "ToolCallResponse"),
    )
}
PATCHES = by_target(_PATCHES)
