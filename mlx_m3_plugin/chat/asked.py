"""What a request asks of M3's chat template, in any protocol's words: thinking mode, effort, other variables.

``docs/tool-calls.md`` has the precedence.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from .prompt import thinking_mode

# Fields of a request that say something about thinking.
FIELDS = tuple(
    "thinking_mode enable_thinking thinking reasoning reasoning_effort output_config"
    " chat_template_kwargs".split()
)
# What ``chat_template_kwargs`` may hold: nothing that would replace the template or what it is given.
TEMPLATE_KEYS = tuple("thinking_mode enable_thinking reasoning_effort effort model_identity model_id".split())
_NO_EFFORT = ("none", "off", "disabled", "false", "0")
# OpenAI's least effort.
_ALIASES = {"minimal": "low"}


def template_arguments(
    request: Mapping[str, Any], template: object, efforts: tuple[str, ...]
) -> dict[str, Any]:
    """Arguments for the chat template; ``thinking_mode`` and ``reasoning_effort`` where it asks for them.

    Args:
        request: the fields that the client has sent.
        template: the checkpoint's.
        efforts: the words that name an effort.

    Raises:
        ValueError: says which of its words is not one of ours, or what this template can't do.
    """
    handed_on = request.get("chat_template_kwargs") or {}
    if not isinstance(handed_on, Mapping):
        raise ValueError("chat_template_kwargs must be an object")
    for key in handed_on:
        if key not in TEMPLATE_KEYS:
            raise ValueError(
                f"chat_template_kwargs may hold {', '.join(TEMPLATE_KEYS)}, not {str(key)[:80]!r}"
            )
    effort = _effort(request, handed_on, efforts)
    mode = _mode(request, handed_on, effort)
    if mode == "disabled" and not can_be_silent(template):
        raise ValueError(
            "this checkpoint's chat template can't turn thinking off; "
            f"ask for a reasoning effort of {efforts[0]} instead"
        )
    arguments = {key: handed_on[key] for key in ("model_identity", "model_id") if key in handed_on}
    arguments |= {"thinking_mode": mode} if mode else {}
    if isinstance(effort, str) or effort is False:
        # Without any, the command line's would be taken.
        arguments["reasoning_effort"] = effort or None
    return arguments


def check_logit_bias(bias: Iterable[int] | None, tokens: int) -> None:
    """Both servers would write outside of an array.

    Args:
        bias: ids of tokens.  tokens: how many the vocabulary has.

    Raises:
        ValueError: one of them is not in the vocabulary.
    """
    for token in bias or ():
        if not 0 <= token < tokens:
            raise ValueError(f"logit_bias: there is no token {token}; the vocabulary has {tokens}")


def can_be_silent(template: object) -> bool:
    """Whether a chat template has a mode without thinking."""
    return any(word in str(template) for word in ("disabled", "enable_thinking"))


def _mode(request: Mapping[str, Any], handed_on: Mapping[str, Any], effort: str | bool | None) -> str | None:
    """From M3's own word, or else from others', or else from the effort."""
    thinking = _member(request, "thinking", "type")
    sources: list[dict[str, Any]] = [
        {"thinking_mode": request.get("thinking_mode")},
        {"thinking_mode": handed_on.get("thinking_mode")},
        {"thinking_mode": thinking if isinstance(thinking, str) else None},
        {"enable_thinking": request.get("enable_thinking")},
        {"enable_thinking": handed_on.get("enable_thinking")},
        {"enable_thinking": effort is not False if effort is not None else None},
    ]
    return next(filter(None, map(thinking_mode, sources)), None)


def _effort(
    request: Mapping[str, Any], handed_on: Mapping[str, Any], efforts: tuple[str, ...]
) -> str | bool | None:
    """An effort; True or False for thinking or none of it, without how much; None if nothing is said."""
    reasoning = request.get("reasoning")
    words = [
        _member(request, "reasoning", "effort") if isinstance(reasoning, Mapping) else reasoning,
        request.get("reasoning_effort"),
        _member(request, "output_config", "effort"),
        handed_on.get("reasoning_effort"),
        handed_on.get("effort"),
    ]
    word = next((word for word in words if word not in (None, "")), None)
    if word is None:
        # OpenAI's Responses ask for reasoning with an object without an effort.
        return True if isinstance(reasoning, Mapping) else None
    name = str(word).strip().lower()
    if isinstance(word, bool) or name in _NO_EFFORT:
        return word is True
    name = _ALIASES.get(name, name)
    if name not in efforts:
        raise ValueError(
            f"reasoning effort must be one of none, {', '.join(efforts)}, not {str(word)[:80]!r}"
        )
    return name


def _member(request: Mapping[str, Any], name: str, key: str) -> Any:
    value = request.get(name)
    return value.get(key) if isinstance(value, Mapping) else None
