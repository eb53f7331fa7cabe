"""A scripted M3 as the tests of both servers ask it, and what it has to say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import scripted_model
from tests.end_to_end.scripted_model import NS, REASONING, TOPICS, content

streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
Expected = tuple[str, str, list[tuple[str, Any]], str]
WITHOUT_REASONING = 9
# What a request may say about thinking, and how many tokens the reply has: an opener that is in
# the prompt is none of them.
MODES = {
    "nothing said": ({}, 12),
    "adaptive": ({"thinking_mode": "adaptive"}, 12),
    "enabled": ({"thinking_mode": "enabled"}, 11),
    "disabled": ({"thinking_mode": "disabled"}, WITHOUT_REASONING),
    "enable_thinking": ({"enable_thinking": True}, 11),
    "not enable_thinking": ({"enable_thinking": False}, WITHOUT_REASONING),
}
every_mode = pytest.mark.parametrize(("arguments", "tokens"), MODES.values(), ids=MODES)

# What there is of a reply after so many tokens: reasoning, what follows the content (None: there is none),
# calls.  What is no complete call is text.
CUTS: dict[int, tuple[bool, str | None, int]] = {
    1: (True, None, 0),  # in the midst of reasoning
    2: (True, None, 0),  # after its end
    3: (True, "", 0),
    4: (True, NS, 0),  # between the two tokens of the marker of calls
    6: (True, f"{NS}<tool_call>\n", 0),  # where the first call is to come
    7: (True, "", 1),
    8: (True, "", 2),
    9: (True, f"\n{NS}", 2),  # between the two tokens of the end
    10: (True, "", 2),
}


def calls(topic: int) -> list[tuple[str, Any]]:
    return list(zip(("search", "fetch"), scripted_model.arguments(topic), strict=True))


def expected(topic: int, thought: bool = True) -> Expected:
    return REASONING if thought else "", content(topic), calls(topic), "tool_calls"


def question(topic: int) -> str:
    return f"Please look up {TOPICS[topic]}, twice."


def token_id(model: Path, token: str) -> int:
    added = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    (found,) = (entry["id"] for entry in added if entry["content"] == token)
    return found


def write_thinking_twin(model: Path, directory: Path) -> Path:
    """The same model with ``<think>``, as stock libraries know it from others."""
    shutil.copytree(model, directory)
    for name in ("tokenizer.json", "chat_template.jinja"):
        text = (directory / name).read_text(encoding="utf-8")
        text = text.replace("think>", "other>").replace("mm:other>", "think>")
        (directory / name).write_text(text, encoding="utf-8")
    return directory
