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
ANY_MARKER = re.compile(f"({'|'.join(map(re.escape, MARKERS))})")
TOOL_CALL_START, TOOL_CALL_END = f"{NAMESPACE}<tool_call>", f"{NAMESPACE}</tool_call>"


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
