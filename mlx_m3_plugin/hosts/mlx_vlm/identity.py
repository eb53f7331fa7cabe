"""Which processors and tokenizers are M3's.

Nothing is read of an object to find that out: stock would not read it, and an object may refuse.
It is M3's if it was loaded from an M3 checkpoint, used with an M3 config, or is of a class that was
written for M3.
"""

from contextlib import suppress
from functools import partial
from typing import Any
from weakref import ref

# By identity: to compare or to hash an object may run code of its own.
_known: dict[int, "ref[Any]"] = {}


def tokenizer_of(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def remember(processor: Any) -> None:
    """Keep in mind that a processor is M3's, and so its tokenizer."""
    if processor is None:
        return
    for part in (processor, tokenizer_of(processor)):
        # Some objects take no weak references.
        with suppress(TypeError):
            _known[id(part)] = ref(part, partial(_forget, id(part)))


def _forget(key: int, _: Any) -> None:
    _known.pop(key, None)


def is_m3(processor: Any) -> bool:
    """Whether a processor or a tokenizer is M3's.  Never raises."""
    known = _known.get(id(processor))
    if known is not None and known() is processor:
        return True
    if not any("minimax_m3_vl" in str(cls.__module__).split(".") for cls in type(processor).__mro__):
        return False
    remember(processor)
    return True
