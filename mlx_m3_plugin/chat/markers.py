"""The markers in M3's replies, and which tokenizers have them.

``<mm:think>``, ``</mm:think>`` and the namespace token are one token each of M3's vocabulary.
``<think>`` is in it too, but M3 does not use it.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

THINK_START, THINK_END = "<mm:think>", "</mm:think>"
# Stands before every tag of a tool call.
NAMESPACE = "]<]minimax[>["
MARKERS = (THINK_START, THINK_END, NAMESPACE)
THINK_MARKER = re.compile(f"({THINK_START}|{THINK_END})")
ANY_MARKER = re.compile(f"({'|'.join(map(re.escape, MARKERS))})")
TOOL_CALL_START, TOOL_CALL_END = f"{NAMESPACE}<tool_call>", f"{NAMESPACE}</tool_call>"
# In markers that are text, of replies that are rewritten for servers.  Unicode keeps this code for programs.
NO_CHARACTER = "\ufdd0"
_JSON_CALL = re.compile(f"{re.escape(TOOL_CALL_START)}(.*?){re.escape(TOOL_CALL_END)}", re.DOTALL)


def as_text(text: str) -> str:
    """With markers that nobody takes for markers."""
    return ANY_MARKER.sub(lambda marker: marker[0][0] + NO_CHARACTER + marker[0][1:], text)


def restored(text: str) -> str:
    """Rewritten text without calls, as the reply has it."""
    return text.replace(NO_CHARACTER, "")


def without_calls(text: str) -> str:
    """What is beside the calls of rewritten text."""
    return _JSON_CALL.sub("", text)


def calls_in(text: str) -> list[str]:
    """The calls of rewritten text, as JSON."""
    return _JSON_CALL.findall(text)


def without_space(tokens: Sequence[int], decode: Callable[[list[int]], str]) -> Sequence[int]:
    """A prompt's tokens without the white space at its end, which may follow a marker."""
    end = len(tokens)
    while end > 0 and decode([tokens[end - 1]]).isspace():
        end -= 1
    return tokens[:end]


def without_cut_character(text: str, finish_reason: str | None) -> str:
    """A reply's text, without what decoders make of a character that a limit of tokens has cut."""
    return text.rstrip("\ufffd") if finish_reason == "length" else text


def has_m3_markers(tokenizer: Any) -> bool:
    """Whether the vocabulary has M3's markers, as no other model's has.

    This reads the whole vocabulary: ask only where it is read anyway.  A tokenizer that refuses to
    list it is not M3's.
    """
    try:
        vocabulary = tokenizer.get_vocab()
        return all(marker in vocabulary for marker in MARKERS)
    except Exception:
        return False
