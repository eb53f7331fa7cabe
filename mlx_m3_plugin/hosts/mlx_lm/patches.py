"""Extensions of mlx-lm modules that it does not look up by name."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mlx_m3_plugin.weights.files import is_m3, with_checks, with_shards_named_as_expected


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


def utils(module: Any, load_entry_points: Callable[[str], list[Any]]) -> list[str]:
    """Have ``load_model`` look at the files of M3 checkpoints, under whatever names they have."""
    original = module.load_model

    @functools.wraps(original)
    def load_model(model_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_m3(model_path):
            return original(model_path, *args, **kwargs)
        with with_shards_named_as_expected(model_path) as path:
            return original(path, *args, **kwargs)

    module.load_model = with_checks(load_model)
    return ["load_model checks the files of M3 checkpoints"]
