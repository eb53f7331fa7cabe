"""mlx-openai-server: ``--model-type lm --reasoning-parser minimax_m3 --tool-call-parser minimax_m3
--enable-auto-tool-choice``."""

import json
from contextvars import ContextVar
from functools import partial
from typing import Any

from mlx_m3_plugin.chat.prompt import thinking_mode
from mlx_m3_plugin.chat.reply import Event, ReplyParser
from mlx_m3_plugin.chat.tool_calls import RepairLog
from mlx_m3_plugin.hosts.patching import Arguments, Patch, by_target, call, where
from mlx_m3_plugin.hosts.third_party.parsers import NAME, text_of

# What the chat template of the request gets; a parser is made without it.
_TEMPLATE_ARGUMENTS: ContextVar[dict[str, Any]] = ContextVar("template_arguments")


class MiniMaxM3Parser:
    """One reply: reasoning, content and calls, in the form of the host's ``HarmonyParser``."""

    def __init__(self) -> None:
        given = _TEMPLATE_ARGUMENTS.get({})
        self._reply = ReplyParser(given.get("tools"), thinking_mode(given) == "enabled")
        self._log = RepairLog()

    def parse(self, text: str) -> dict[str, Any]:
        return self._parts(self._reply.feed(text) + self._reply.finish())

    def parse_streaming(self, chunk: str) -> tuple[dict[str, Any], bool]:
        return self._parts(self._reply.feed(chunk)), False

    def handle_parse_streaming_end(self) -> tuple[dict[str, Any], bool]:
        return self._parts(self._reply.finish()), True

    def _parts(self, events: list[Event]) -> dict[str, Any]:
        self._log.add(events)
        calls = [event.call for event in events if event.call is not None]
        return {
            "reasoning_content": text_of(events, "reasoning") or None,
            "content": text_of(events, "content") or None,
            "tool_calls": [{"name": c.name, "arguments": json.dumps(c.arguments)} for c in calls] or None,
        }


def add_parser(module: Any, get_unified_parser: Any) -> Any:
    module.UNIFIED_PARSER_MAP[NAME] = MiniMaxM3Parser
    return get_unified_parser


@where(lambda given: NAME in (given["self"].reasoning_parser_name, given["self"].tool_parser_name))
async def prepare_text_request(prepare: Any, given: Arguments) -> Any:
    messages, options = await call(prepare, given)
    _TEMPLATE_ARGUMENTS.set(options.get("chat_template_kwargs") or {})
    return messages, options


# Its package has a common name.
patch = partial(
    Patch, distribution="mlx-openai-server", until="never: mlx-openai-server knows no marker but its parsers'"
)

_PATCHES = {
    "app.parsers:get_unified_parser(parser_name)": patch(
        "a parser, minimax_m3",
        add_parser,
        others=(
            "UNIFIED_PARSER_MAP",
            "ParserManager.create_parsers(reasoning_parser_name, tool_parser_name)",
        ),
    ),
    "app.handler.mlx_lm:MLXLMHandler._prepare_text_request(request)": patch(
        "the schemas of calls, and reasoning that prompts open",
        prepare_text_request,
        others=("MLXLMHandler.__init__: reasoning_parser_name, tool_parser_name",),
    ),
}
PATCHES = by_target(_PATCHES)
