"""Extensions of mlx-lm modules that it does not look up by name."""

import functools
from collections.abc import Callable
from typing import Any

from mlx_m3_plugin.chat.reasoning import THINK_END, THINK_START
from mlx_m3_plugin.hosts.mlx_lm.tokenizer import SwallowedTokens, become_m3
from mlx_m3_plugin.hosts.mlx_lm.tokenizer import is_m3 as is_m3_tokenizer
from mlx_m3_plugin.weights.files import is_m3, with_checks, with_shards_named_as_expected


def tokenizer_utils(module: Any, load_entry_points: Callable[[str], list[Any]]) -> list[str]:
    """Teach ``TokenizerWrapper`` M3's formats.

    Only tokenizers with M3's markers in their vocabulary are touched.  The wrapper is extended, not
    what ``load`` infers and writes into saved tokenizer configs: what is converted with us must
    open without us.  For the same reason the wrong inference is taken back.
    """
    (tool_parser,) = load_entry_points("mlx_lm.tool_parsers")
    wrapper = module.TokenizerWrapper
    original, infer = wrapper.__init__, module._infer_tool_parser

    @functools.wraps(original)
    def __init__(self: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        original(self, tokenizer, *args, **kwargs)
        if is_m3_tokenizer(tokenizer):
            become_m3(self, tool_parser)

    @functools.wraps(infer)
    def _infer_tool_parser(template_or_tokenizer: Any) -> Any:
        template = getattr(template_or_tokenizer, "chat_template", template_or_tokenizer)
        inferred = infer(template_or_tokenizer)
        return None if isinstance(template, str) and THINK_START in template else inferred

    wrapper.__init__ = __init__
    module._infer_tool_parser = _infer_tool_parser
    return [f"tool calls, {THINK_START}, thinking modes"]


def generate(module: Any, load_entry_points: Callable[[str], list[Any]]) -> list[str]:
    """Have the state machine of mlx-lm 0.31 take M3's closing marker out of content, as 0.32 does.

    A reply that needs no reasoning begins with it.
    """
    machine = getattr(module, "SequenceStateMachine", None)
    if machine is None:
        return []
    original = machine.__init__

    @functools.wraps(original)
    def __init__(self: Any, transitions: Any = {}, *args: Any, **kwargs: Any) -> None:  # noqa: B006
        swallowed = [
            tokens for tokens, _ in transitions.get("reasoning", ()) if isinstance(tokens, SwallowedTokens)
        ]
        if swallowed:
            normal = [*transitions.get("normal", ()), *((tokens, "normal") for tokens in swallowed)]
            transitions = {**transitions, "normal": normal}
        original(self, transitions, *args, **kwargs)

    machine.__init__ = __init__
    return [f"{THINK_END} is no content"]


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
