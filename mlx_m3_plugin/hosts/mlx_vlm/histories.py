"""Whole histories for M3, from the requests of Responses and Messages.

``mlx_vlm.server`` makes messages of them before it knows the model, and leaves out what most templates do not
read.  Its messages stay as they are for other models: the first one remembers what all were made from.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from mlx_m3_plugin.chat.history import IMAGES, INSTRUCTIONS, content_of, from_blocks, from_items

Messages = list[Any]


class FirstMessage(dict):  # type: ignore[type-arg]
    """The first message that is no instruction; ``whole`` makes M3's of this one and all after it."""

    whole: Callable[[], Messages]


def with_whole(messages: Messages, whole: Callable[[], Messages]) -> Messages:
    for n, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") not in INSTRUCTIONS:
            messages[n] = FirstMessage(message)
            messages[n].whole = whole
            break
    return messages


def whole_history(messages: Messages) -> Messages | None:
    """The messages with M3's in place of upstream's; None if they remember nothing."""
    for n, message in enumerate(messages):
        if isinstance(message, FirstMessage):
            return [*messages[:n], *message.whole()]
    return None


class _Joined(str):
    """The texts of a content list with blanks between them, as upstream joins them; ``as_sent`` has none."""

    as_sent: str


def joined_content(module: Any, original: Any) -> Any:
    @wraps(original)
    def joined(content: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(content, *args, **kwargs)
        if isinstance(content, list) and type(made) is str:
            made = _Joined(made)
            made.as_sent = content_of(content)
        return made

    return joined


def as_sent(message: Any) -> Any:
    """The message with its texts joined as M3's template joins them."""
    content = message.get("content") if isinstance(message, dict) else None
    return {**message, "content": content.as_sent} if isinstance(content, _Joined) else message


def count_images(messages: Messages) -> int:
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(isinstance(part, dict) and part.get("type") in IMAGES for part in parts)


def responses(module: Any, original: Any) -> Any:
    @wraps(original)
    def _response_items_to_chat(items: Any, *args: Any, **kwargs: Any) -> Any:
        messages, images = original(items, *args, **kwargs)
        whole = partial(from_items, list(items), module._response_call_to_chat_tool_call)
        return with_whole(messages, whole), images

    return _response_items_to_chat


def anthropic(module: Any, original: Any) -> Any:
    @wraps(original)
    def _anthropic_messages_to_internal(request: Any, *args: Any, **kwargs: Any) -> Any:
        messages, *rest = original(request, *args, **kwargs)
        return with_whole(messages, partial(_whole_of, module, request)), *rest

    return _anthropic_messages_to_internal


def _whole_of(module: Any, request: Any) -> Messages:
    messages = from_blocks([message.model_dump() for message in request.messages])
    # until: mlx-vlm 0.7.  From then on a call that is demanded is asked for in a message.
    demand = getattr(module, "_prepare_chat_tool_choice", None)
    if demand is not None:
        tools = module._anthropic_tools_to_openai(request.tools)
        messages = demand(messages, tools, module._anthropic_tool_choice_to_openai(request.tool_choice))[0]
    return [message for message in messages if message["role"] not in INSTRUCTIONS]
