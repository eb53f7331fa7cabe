"""Whether a tokenizer is M3's."""

from typing import Any
from weakref import WeakKeyDictionary

from .reasoning import THINK_END, THINK_START
from .tool_calls import NAMESPACE

# Servers ask at every request, and to list a vocabulary of 200,000 takes a while.
_known: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def is_m3(tokenizer: Any) -> bool:
    """Whether its vocabulary has M3's markers, as no other model's has."""
    if not hasattr(tokenizer, "get_vocab"):
        return False
    try:
        known = _known.get(tokenizer)
    except TypeError:
        return _has_markers(tokenizer)
    if known is None:
        known = _known[tokenizer] = _has_markers(tokenizer)
    return known


def _has_markers(tokenizer: Any) -> bool:
    vocabulary = tokenizer.get_vocab()
    return all(marker in vocabulary for marker in (THINK_START, THINK_END, NAMESPACE))
