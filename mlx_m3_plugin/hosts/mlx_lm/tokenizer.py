"""mlx-lm's ``TokenizerWrapper`` for M3: markers, tool parser, thinking modes, template.

Only tokenizers with M3's markers in their vocabulary are touched.  The wrapper is extended, not
what ``load`` infers and writes into saved tokenizer configs: what is converted with us must
open without us.  For the same reason the wrong inference is taken back.
"""

from functools import cache, wraps
from typing import Any

from mlx_m3_plugin.chat.markers import THINK_END, THINK_START, has_m3_markers

# What ``TokenizerWrapper.__init__`` sets and :func:`become_m3` sets anew.
ATTRIBUTES = (
    "_tokenizer",
    "_think_start",
    "_think_end",
    "_think_start_tokens",
    "_think_end_tokens",
    "_tool_parser",
    "_tool_call_start",
    "_tool_call_end",
    "_tool_call_start_tokens",
    "_tool_call_end_tokens",
    "has_chat_template",
)


def wrapper_init(module: Any, original: Any) -> Any:
    @wraps(original)
    def __init__(self: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        original(self, tokenizer, *args, **kwargs)
        # mlx-lm has just read the vocabulary itself.
        if has_m3_markers(tokenizer):
            become_m3(self)

    return __init__


def structural_markers(module: Any, original: Any) -> Any:
    """mlx-lm takes markers of this kind out of the content."""

    @property  # type: ignore[misc]
    @wraps(original.fget)
    def structural_markers(self: Any) -> Any:
        return (THINK_END,) if is_m3_wrapper(self) else original.fget(self)

    return structural_markers


def infer_tool_parser(module: Any, original: Any) -> Any:
    @wraps(original)
    def _infer_tool_parser(*args: Any, **kwargs: Any) -> Any:
        inferred = original(*args, **kwargs)
        # A tokenizer, or its template.  until: mlx-lm 0.32
        read = (getattr(value, "chat_template", value) for value in (*args, *kwargs.values()))
        if inferred is not None and any(isinstance(text, str) and THINK_START in text for text in read):
            return None
        return inferred

    return _infer_tool_parser


class SwallowedTokens(tuple):  # type: ignore[type-arg]
    """The tokens of a marker that is not content outside of reasoning either."""


def become_m3(wrapper: Any) -> None:
    """Make a ``TokenizerWrapper`` speak M3's formats, whatever the checkpoint's settings say."""
    from mlx_m3_plugin.chat import tool_calls
    from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE

    tokenizer = wrapper._tokenizer
    start, end = tokenizer.convert_tokens_to_ids([THINK_START, THINK_END])
    wrapper._think_start, wrapper._think_end = THINK_START, THINK_END
    wrapper._think_start_tokens, wrapper._think_end_tokens = (start,), SwallowedTokens((end,))
    wrapper._tool_parser = tool_calls.parse_tool_call
    for which in ("start", "end"):
        marker = getattr(tool_calls, f"tool_call_{which}")
        tokens = tuple(tokenizer.encode(marker, add_special_tokens=False))
        setattr(wrapper, f"_tool_call_{which}", marker)
        setattr(wrapper, f"_tool_call_{which}_tokens", tokens)
    if not wrapper.has_chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
        wrapper.has_chat_template = True
    base: Any = type(wrapper)
    wrapper.__class__ = _m3_class(base)


def is_m3_wrapper(tokenizer: Any) -> bool:
    """Whether :func:`become_m3` has had it.  Reads nothing of it but its type."""
    return issubclass(type(tokenizer), _M3Behaviour)


@cache
def _m3_class(base: Any) -> Any:
    return type(base.__name__, (_M3Behaviour, base), {"__module__": base.__module__})


class _M3Behaviour:
    """What an M3 wrapper does differently."""

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """With ``thinking_mode``, or with the ``enable_thinking`` that other models have."""
        from mlx_m3_plugin.chat.prompt import prepared, thinking_mode

        mode = thinking_mode(kwargs)
        kwargs.pop("enable_thinking", None)
        if mode is not None:
            kwargs["thinking_mode"] = mode
        return super().apply_chat_template(prepared(conversation), *args, **kwargs)  # type: ignore[misc]

    # mlx-lm asks these about whole prompts, to know whether a reply begins in reasoning.  M3's
    # instructions, and what users write, hold both markers as text: only the prompt's end counts.
    def rfind_think_start(self, tokens: Any, start: Any = None, end: Any = None) -> int:
        return _at_end(tokens, self._think_start_tokens)  # type: ignore[attr-defined]

    def rfind_think_end(self, tokens: Any, start: Any = None, end: Any = None) -> int:
        return _at_end(tokens, self._think_end_tokens)  # type: ignore[attr-defined]


def _at_end(tokens: Any, marker: Any) -> int:
    """Where the marker begins if the tokens end with it, or -1."""
    begin = len(tokens) - len(marker)
    return begin if begin >= 0 and tuple(tokens[begin:]) == tuple(marker) else -1
