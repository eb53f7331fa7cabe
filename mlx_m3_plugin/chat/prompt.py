"""What M3's prompts are made from: the chat template, thinking modes, conversations."""

import json
from collections.abc import Mapping, Sequence
from pkgutil import get_data
from typing import Any

# For checkpoints that have no chat template of their own, and for those that we write.
CHAT_TEMPLATE = (get_data(__package__, "chat_template.jinja") or b"").decode("utf-8")

THINKING_MODES = ("enabled", "disabled", "adaptive")


def thinking_mode(arguments: Mapping[str, Any]) -> str | None:
    """The mode that a chat template's arguments ask for; None leaves it to the template.

    ``thinking_mode`` is M3's own name and wins; ``enable_thinking`` is what other models and
    their clients know.

    Raises:
        ValueError: ``thinking_mode`` is none of M3's.
    """
    mode = arguments.get("thinking_mode")
    if mode is not None and mode not in THINKING_MODES:
        raise ValueError(f"thinking_mode must be one of {', '.join(THINKING_MODES)}, not {mode!r}")
    if mode is None and isinstance(arguments.get("enable_thinking"), bool):
        return "enabled" if arguments["enable_thinking"] else "disabled"
    return mode


def takes_effort(template: object) -> bool:
    """Whether a chat template has a place for the effort of reasoning: MiniMax-M3.1's has, M3's has not."""
    return "reasoning_effort" in str(template)


def with_effort(arguments: dict[str, Any], effort: str | None, template: object) -> dict[str, Any]:
    """A chat template's arguments with ``effort``, where they ask for none themselves.

    Raises:
        ValueError: the template does not take an effort.
    """
    if effort is None or arguments.get("reasoning_effort") or arguments.get("effort"):
        return arguments
    if not takes_effort(template):
        raise ValueError(
            f"reasoning effort {effort}: this checkpoint's chat template does not take one; "
            "unset MLX_M3_PLUGIN_REASONING_EFFORT"
        )
    return {**arguments, "reasoning_effort": effort}


def prepared(messages: Any) -> Any:
    """The messages with reasoning under the template's name, and arguments as objects.

    Servers and clients send an assistant's reasoning as ``reasoning`` and arguments as a JSON
    string; the template reads ``reasoning_content`` and goes through the arguments.  Anything
    but a list of messages is returned as it is; nothing is changed in place.

    Raises:
        ValueError: the arguments of a tool call are not a JSON object.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        return messages
    return list(map(_prepared_message, messages))


def _prepared_message(message: Any) -> Any:
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return message
    made = dict(message)
    reasoning = made.get("reasoning")
    if isinstance(reasoning, str) and not isinstance(made.get("reasoning_content"), str):
        made["reasoning_content"] = reasoning
    if made.get("tool_calls"):
        made["tool_calls"] = [_prepared_call(call) for call in made["tool_calls"]]
    return made


def _prepared_call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _prepared_call(call["function"])}
    arguments = call.get("arguments")
    parsed = arguments if arguments is not None else {}
    # Some clients encode twice.
    for _ in range(2):
        if isinstance(parsed, str):
            try:
                parsed = json.loads(parsed or "null")
            except ValueError:
                break
            parsed = {} if parsed is None else parsed
    if not isinstance(parsed, Mapping):
        raise ValueError(
            f"the arguments of the call of {call.get('name')} are not a JSON object: {str(arguments)[:80]}"
        )
    return {**call, "arguments": parsed}
