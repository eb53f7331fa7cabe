"""Conversations of OpenAI's Responses and of Anthropic's Messages, as M3's template reads them.

An assistant's message is one turn of M3: its reasoning, its text and its calls, as it wrote them.
Instructions (roles ``system`` and ``developer``) are left out: servers gather them in one message.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Message = dict[str, Any]
INSTRUCTIONS = ("system", "developer")
_TEXTS = ("text", "input_text", "output_text", "reasoning_text", "summary_text")
IMAGES = ("image", "image_url", "input_image")


def from_items(items: Iterable[Any], call_of: Callable[[Any], Message]) -> list[Message]:
    """Messages from the items of a response.

    Args:
        items: input and output items, in their order.
        call_of: a call in the form of chat completions, from an item that is one.
    """
    messages: list[Message] = []
    for item in filter(_is_mapping, items):
        kind, role = item.get("type") or "message", item.get("role") or "user"
        if kind == "reasoning":
            _turn(messages, begins_with_reasoning=True)["reasoning_content"] += _reasoning_of(item)
        elif kind in ("function_call", "shell_call", "apply_patch_call"):
            _turn(messages)["tool_calls"].append(call_of(item))
        elif kind.endswith("_call_output") or kind == "tool_result":
            answered = item.get("call_id") or item.get("tool_call_id")
            output = item.get("output", item.get("content", ""))
            messages.append({"role": "tool", "tool_call_id": answered, "content": _output(output)})
        elif kind == "message" and role == "assistant":
            _add_message(messages, item)
        elif kind == "message" and role not in INSTRUCTIONS:
            kept = ("tool_calls", "tool_call_id", "name")
            others = {name: item[name] for name in kept if item.get(name) is not None}
            messages.append({**others, "role": role, "content": content_of(item.get("content"))})
    return messages


def from_blocks(messages: Iterable[Any]) -> list[Message]:
    """Messages from those of Anthropic: plain dicts, whose content is a text or a list of blocks."""
    made: list[Message] = []
    for message in messages:
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
        if message.get("role") == "assistant":
            made.append(_turn_of_blocks(blocks))
        elif message.get("role") not in INSTRUCTIONS:
            made += _users_blocks(blocks)
    return made


def content_of(content: Any) -> Any:
    """The text of a message, joined as M3's template joins it; with images, a list of texts and images."""
    if not isinstance(content, (list, tuple)):
        return content or ""
    parts = [part for part in map(_part, content) if part is not None]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any) -> Message | None:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not _is_mapping(part):
        return None
    if part.get("type") in IMAGES:
        return {"type": "image"}
    if part.get("type") == "document" and _is_mapping(part.get("source")):
        part = {"text": part["source"].get("data")} if part["source"].get("type") == "text" else {}
    text = part.get("text") or part.get("content")
    return {"type": "text", "text": content_of(text)} if isinstance(text, (str, list)) and text else None


# --- items ---


def _turn(messages: list[Message], begins_with_reasoning: bool = False) -> Message:
    """The assistant's turn that goes on, or a new one."""
    last = messages[-1] if messages else {}
    # A text that no call follows has ended its turn, if more is thought.
    ended = begins_with_reasoning and last.get("content") and not last.get("tool_calls")
    if last.get("role") != "assistant" or ended:
        messages.append({"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []})
    return messages[-1]


def _add_message(messages: list[Message], item: Mapping[str, Any]) -> None:
    turn = _turn(messages)
    reasoning = item.get("reasoning_content") or item.get("reasoning")
    if isinstance(reasoning, str) and not turn["reasoning_content"]:
        turn["reasoning_content"] = reasoning
    content = content_of(item.get("content"))
    if isinstance(content, list) or isinstance(turn["content"], list):
        turn["content"] = [*_as_parts(turn["content"]), *_as_parts(content)]
    else:
        turn["content"] += content
    turn["tool_calls"] += item.get("tool_calls") or []


def _reasoning_of(item: Mapping[str, Any]) -> str:
    """What was thought, or else a summary of it."""
    texts = (content_of(item.get(name)) for name in ("content", "summary"))
    return next((text for text in texts if text and isinstance(text, str)), "")


def _output(output: Any) -> Any:
    if isinstance(output, str):
        return output
    known = (*_TEXTS, *IMAGES)
    if isinstance(output, list) and all(_is_mapping(part) and part.get("type") in known for part in output):
        return content_of(output)
    return json.dumps(output, ensure_ascii=False)


def _as_parts(content: Any) -> list[Message]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []


# --- blocks ---


def _turn_of_blocks(blocks: Iterable[Any]) -> Message:
    blocks = list(filter(_is_mapping, blocks))
    thoughts = [block.get("thinking") or "" for block in blocks if block.get("type") == "thinking"]
    calls = [
        {
            "id": block.get("id"),
            "type": "function",
            "function": {"name": block.get("name", ""), "arguments": block.get("input")},
        }
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    other = ("thinking", "redacted_thinking", "tool_use")
    said = content_of([block for block in blocks if block.get("type") not in other])
    return {"role": "assistant", "content": said, "reasoning_content": "".join(thoughts), "tool_calls": calls}


def _users_blocks(blocks: Iterable[Any]) -> list[Message]:
    """Results of tools and what the user says, in their order."""
    messages: list[Message] = []
    for block in blocks:
        if _is_mapping(block) and block.get("type") == "tool_result":
            content = content_of(block.get("content"))
            messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content})
        else:
            if not messages or messages[-1]["role"] != "user":
                messages.append({"role": "user", "content": []})
            messages[-1]["content"].append(block)
    for message in messages:
        message["content"] = content_of(message["content"])
    return messages or [{"role": "user", "content": ""}]


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)
