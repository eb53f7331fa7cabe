"""Extensions of mlx-lm modules that it does not look up by name."""

from collections.abc import Callable
from types import ModuleType
from typing import Any


def tokenizer_utils(module: ModuleType, load_entry_points: Callable[[str], list[Any]]) -> list[str]:
    """Teach ``TokenizerWrapper`` our thinking markers.

    Only tokenizers that hold both markers as tokens are touched, so only M3's.  The wrapper
    is extended, not the inference that ``load`` writes into saved tokenizer configs: what is
    converted with us must open without us.
    """
    markers = [pair for pairs in load_entry_points("mlx_lm.thinking_markers") for pair in pairs]
    wrapper = module.TokenizerWrapper
    original = wrapper.__init__

    def __init__(self: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        original(self, tokenizer, *args, **kwargs)
        vocabulary = tokenizer.get_vocab()
        for start, end in markers:
            if start in vocabulary and end in vocabulary:
                self._think_start, self._think_end = start, end
                self._think_start_tokens, self._think_end_tokens = (vocabulary[start],), (vocabulary[end],)

    __init__.__wrapped__ = original  # type: ignore[attr-defined]
    wrapper.__init__ = __init__
    return [f"thinking markers {start} {end}" for start, end in markers]
