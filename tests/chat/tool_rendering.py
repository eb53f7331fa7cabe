"""Calls written by the chat template."""

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE
from tests.chat.tool_values import NS


def block_of(calls: list[dict[str, Any]]) -> str:
    """The block of an assistant's turn, markers included."""
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": call} for call in calls]}
    rendered, _ = render_jinja_template([[message]], chat_template=CHAT_TEMPLATE)
    turn = rendered[0].split("]~b]ai\n</mm:think>", 1)[1]
    return turn[: turn.rindex("[e~[")]


def marked(text: str) -> str:
    """Examples write the namespace token as ``§``."""
    return text.replace("§", NS)
