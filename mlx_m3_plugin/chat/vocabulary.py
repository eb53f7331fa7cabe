"""Whether a tokenizer is M3's."""

from typing import Any

from .reasoning import THINK_END, THINK_START
from .tool_calls import NAMESPACE


def is_m3(tokenizer: Any) -> bool:
    """Whether its vocabulary has M3's markers, as no other model's has.

    This reads the whole vocabulary: ask only where it is read anyway.  A tokenizer that refuses to
    list it is not M3's.
    """
    try:
        vocabulary = tokenizer.get_vocab()
        return all(marker in vocabulary for marker in (THINK_START, THINK_END, NAMESPACE))
    except Exception:
        return False
