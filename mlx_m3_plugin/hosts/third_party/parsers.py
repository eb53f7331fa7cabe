"""M3's parsers in the registries of vllm-mlx, and of rapid-mlx, which began as a copy of it.

Both read a reply twice: reasoning is taken out first, and calls are looked for in what is left.
"""

import json
from typing import Any
from uuid import uuid4

from mlx_m3_plugin.chat.markers import THINK_END, THINK_START
from mlx_m3_plugin.chat.reply import Event, ReplyParser
from mlx_m3_plugin.chat.tool_calls import RepairLog

NAME = "minimax_m3"

# What ours use of the module ``reasoning``, and of the module ``tool_parsers``.
REASONING_NEEDS = (
    "ReasoningParser.extract_reasoning(model_output)",
    "ReasoningParser.extract_reasoning_streaming(previous_text, current_text, delta_text)",
    "ReasoningParser.reset_state",
    "DeltaMessage(reasoning, content)",
)
TOOL_NEEDS = (
    "ToolParser.extract_tool_calls(model_output, request)",
    "ToolParser.extract_tool_calls_streaming(previous_text, current_text, delta_text, request)",
    "ToolParser.reset",
    "ExtractedToolCallInformation(tools_called, tool_calls, content)",
)


def add_reasoning_parser(module: Any, register_parser: Any) -> Any:
    class MiniMaxM3ReasoningParser(module.ReasoningParser):
        start_token, end_token = THINK_START, THINK_END
        # M3 may close reasoning that it has not opened.  Only rapid-mlx asks.
        sanitize_when_thinking_disabled = True

        def __init__(self, tokenizer: Any = None):
            super().__init__(tokenizer)
            self.reset_state()

        def reset_state(self, implicit_mode: bool = False) -> None:
            """``implicit_mode``: the prompt ends with the opening marker."""
            self._reply = ReplyParser(in_reasoning=implicit_mode, calls_are_text=True)

        def configure_request(self, *, enable_thinking: bool | None = None) -> None:
            """rapid-mlx's, whose prompts open reasoning where nothing is said."""
            self.reset_state(enable_thinking is not False)

        def extract_reasoning(
            self, model_output: str, enable_thinking: bool | None = False
        ) -> tuple[str | None, str | None]:
            before, closer, _ = model_output.partition(THINK_END)
            closes_prompts = bool(closer) and THINK_START not in before
            self.reset_state(enable_thinking is not False or closes_prompts)
            message = self._message(self._reply.feed(model_output) + self._reply.finish())
            return (message.reasoning, message.content) if message else (None, None)

        def extract_reasoning_streaming(self, previous_text: str, current_text: str, delta_text: str) -> Any:
            return self._message(self._reply.feed(delta_text))

        def finalize_stream(self) -> Any:
            return self._message(self._reply.finish())

        # rapid-mlx's name for it.
        finish_stream = finalize_stream

        def _message(self, events: list[Event]) -> Any:
            reasoning, content = text_of(events, "reasoning"), text_of(events, "content")
            if not reasoning and not content:
                return None
            return module.DeltaMessage(reasoning=reasoning or None, content=content or None)

    register_parser(NAME, MiniMaxM3ReasoningParser)
    return register_parser


def add_tool_parser(module: Any, register_module: Any) -> Any:
    class MiniMaxM3ToolParser(module.ToolParser):
        # vllm-mlx: every piece of a reply is wanted.
        REQUIRES_EAGER_STREAMING = True
        SUPPORTS_NATIVE_TOOL_FORMAT = True

        def __init__(self, tokenizer: Any = None):
            super().__init__(tokenizer)
            self.reset()

        def reset(self) -> None:
            super().reset()
            self._begin(None)

        def _begin(self, request: Any) -> None:
            self._reply, self._log, self._n_calls = ReplyParser(_tools_of(request)), RepairLog(), 0

        def extract_tool_calls(self, model_output: str, request: Any = None) -> Any:
            self._begin(request)
            events = self._reply.feed(model_output) + self._reply.finish()
            calls = [
                {"id": call["id"], **call["function"]}
                for call in (self._delta(events) or {}).get("tool_calls", [])
            ]
            return module.ExtractedToolCallInformation(
                tools_called=bool(calls), tool_calls=calls, content=text_of(events, "content") or None
            )

        def extract_tool_calls_streaming(
            self,
            previous_text: str,
            current_text: str,
            delta_text: str,
            *tokens: Any,
            request: Any = None,
            **more: Any,
        ) -> dict[str, Any] | None:
            if not previous_text:
                self._begin(request)
            return self._delta(self._reply.feed(delta_text))

        def finalize_streaming(self, current_text: str) -> dict[str, Any] | None:
            return self._delta(self._reply.finish())

        def flush_held_content(self, full_text: str) -> str:
            """rapid-mlx's, where there was no call."""
            return text_of(self._reply.finish(), "content")

        def _delta(self, events: list[Event]) -> dict[str, Any] | None:
            self._log.add(events)
            delta: dict[str, Any] = {}
            if content := text_of(events, "content"):
                delta["content"] = content
            for event in events:
                if event.call is not None:
                    function = {"name": event.call.name, "arguments": json.dumps(event.call.arguments)}
                    made = {"index": self._n_calls, "id": f"call_{uuid4().hex[:8]}", "type": "function"}
                    delta.setdefault("tool_calls", []).append(made | {"function": function})
                    self._n_calls += 1
            return delta or None

    module.ToolParserManager.register_module(NAME, MiniMaxM3ToolParser)
    return register_module


def text_of(events: list[Event], kind: str) -> str:
    return "".join(event.text for event in events if event.kind == kind)


def _tools_of(request: Any) -> list[Any] | None:
    """The tools of a request, an object or a dict; None where it says nothing of them."""
    tools = request.get("tools") if isinstance(request, dict) else getattr(request, "tools", None)
    if tools is None:
        return None
    return [tool if isinstance(tool, dict) else tool.model_dump() for tool in tools]
