"""The markers in M3's replies, and which tokenizers have them.

Each marker is one token of M3's vocabulary.  ``<think>`` is in it too, but M3 does not use it.
"""

from typing import Any

THINK_START, THINK_END = "<mm:think>", "</mm:think>"
# Stands before every tag of a tool call.
NAMESPACE = "]<]minimax[>["


def has_m3_markers(tokenizer: Any) -> bool:
    """Whether the vocabulary has M3's markers, as no other model's has.

    This reads the whole vocabulary: ask only where it is read anyway.  A tokenizer that refuses to
    list it is not M3's.
    """
    try:
        vocabulary = tokenizer.get_vocab()
        return all(marker in vocabulary for marker in (THINK_START, THINK_END, NAMESPACE))
    except Exception:
        return False
