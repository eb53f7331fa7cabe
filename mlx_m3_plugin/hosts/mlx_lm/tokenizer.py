"""mlx-lm's ``TokenizerWrapper`` for M3: markers, tool parser, thinking modes, template."""

from functools import cache
from typing import Any

from mlx_m3_plugin.chat.history import prepared
from mlx_m3_plugin.chat.reasoning import THINK_END, THINK_START, thinking_mode
from mlx_m3_plugin.chat.template import CHAT_TEMPLATE

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


class SwallowedTokens(tuple):  # type: ignore[type-arg]
    """The tokens of a marker that is no text outside of reasoning either."""


def become_m3(wrapper: Any, tool_parser: Any) -> None:
    """Make a ``TokenizerWrapper`` speak M3's formats, whatever the checkpoint's settings say.

    Args:
        tool_parser: a module with ``parse_tool_call``, ``tool_call_start`` and ``tool_call_end``.
    """
    tokenizer = wrapper._tokenizer
    start, end = tokenizer.convert_tokens_to_ids([THINK_START, THINK_END])
    wrapper._think_start, wrapper._think_end = THINK_START, THINK_END
    wrapper._think_start_tokens, wrapper._think_end_tokens = (start,), SwallowedTokens((end,))
    # In mlx-lm 0.32 markers of this kind are taken out of the content.
    wrapper._structural_markers = (THINK_END,)
    wrapper._tool_parser = tool_parser.parse_tool_call
    for which in ("start", "end"):
        marker = getattr(tool_parser, f"tool_call_{which}")
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
