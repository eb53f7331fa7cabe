"""What a request to ``mlx_vlm.server`` asks of M3, as arguments of a generation.

A request is M3's if its processor is.  From then on the class of its arguments and their opening marker
show it, which :func:`arguments_of` has set.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import cache, wraps
from importlib import import_module
from typing import Any

from mlx_m3_plugin.chat.asked import FIELDS, can_be_silent, check_logit_bias, template_arguments
from mlx_m3_plugin.chat.history import from_blocks
from mlx_m3_plugin.chat.markers import THINK_END, THINK_START
from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE, prepared
from mlx_m3_plugin.hosts.mlx_vlm.prompts import is_m3, tokenizer_of
from mlx_m3_plugin.hosts.patching import (
    Arguments,
    UpstreamChangedError,
    call,
    check_needs,
    check_takes,
    for_m3,
)
from mlx_m3_plugin.startup.settings import EFFORTS

log = logging.getLogger("mlx_m3_plugin")

# What ours reads and sets of upstream's arguments, in the form that ``Patch.needs`` has.
ARGUMENTS = (
    "GenerationArguments(enable_thinking, thinking_budget, thinking_start_token, thinking_end_token,"
    " skip_special_tokens, logits_processors)",
    "GenerationArguments.to_template_kwargs",
)


def register_routes(module: Any, register: Any) -> Any:
    """Upstream passes the endpoints the functions that they call, when it registers them."""

    @wraps(register)
    def register_routes(app: Any, deps: Any, *args: Any, **kwargs: Any) -> Any:
        return register(app, _Dependencies(deps), *args, **kwargs)

    return register_routes


class _Dependencies:
    """The functions that the endpoints call, with ours in the place of some."""

    def __init__(self, deps: Any) -> None:
        self._deps = deps

    def __getattr__(self, name: str) -> Any:
        given = getattr(self._deps, name)
        if name not in _OURS:
            return given
        try:
            return _OURS[name](given)
        except UpstreamChangedError as error:
            log.warning("mlx-m3-plugin: %s; requests to MiniMax-M3 are read like any others", error)
            return given


def _with_m3_arguments(build_gen_args: Callable[..., Any]) -> Callable[..., Any]:
    def build(given: Arguments) -> Any:
        made = call(build_gen_args, given)
        try:
            return arguments_of(made, given.arguments["request"], given.arguments["processor"])
        except ValueError as error:
            raise _refusal(str(error)) from error

    check_takes("build_gen_args", build_gen_args, "request", "processor")
    check_needs(import_module("mlx_vlm.server.generation"), *ARGUMENTS)
    return for_m3(build_gen_args, lambda given: is_m3(given["processor"]), build)


def _refusal(why: str) -> Exception:
    """What the server answers with status 400, wherever it asks for the arguments."""
    from fastapi import HTTPException

    class RefusedRequest(HTTPException):
        def __str__(self) -> str:
            return self.detail

    return RefusedRequest(400, why)


def _with_no_m3_tags(count: Callable[..., int]) -> Callable[..., int]:
    """All that M3 has generated is counted: the prompt may have opened the reasoning."""
    check_takes("count_thinking_tag_tokens", count, "thinking_start_token")
    return for_m3(count, starts_with_m3, lambda given: 0)


# By their names among what the endpoints are given.
_OURS = {"build_gen_args": _with_m3_arguments, "count_thinking_tag_tokens": _with_no_m3_tags}


def is_text(value: Any, text: str) -> bool:
    # An object that is not a string may refuse to be compared.
    return isinstance(value, str) and value == text


def starts_with_m3(given: Mapping[str, Any]) -> bool:
    return is_text(given["thinking_start_token"], THINK_START)


def arguments_of(made: Any, request: Any, processor: Any = None) -> Any:
    """``GenerationArguments`` for M3, from upstream's and the request.

    Raises:
        ValueError: a request that M3 can't be asked, or a history with arguments that are not a JSON object.
    """
    _check_history(request)
    if bias := getattr(made, "logit_bias", None):
        check_logit_bias(bias, len(tokenizer_of(processor)))
    template = template_arguments(_asked(request, FIELDS), _template_of(processor), EFFORTS)
    if _wants_summary(request):
        template["thinking_mode"] = "disabled" if can_be_silent(_template_of(processor)) else "adaptive"
    template.setdefault("thinking_mode", "enabled" if made.enable_thinking else "adaptive")
    arguments = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    arguments |= {
        # Upstream's word for: reasoning is shown, limited, and waited for.
        "enable_thinking": template["thinking_mode"] != "disabled",
        "thinking_start_token": THINK_START,
        "thinking_end_token": THINK_END,
        # The markers may be special tokens, and have to be seen.
        "skip_special_tokens": False,
        "template_arguments": template,
        "tools": _offered_tools(request),
    }
    base: Any = type(made)
    return _arguments_class(base)(**arguments)


def _asked(request: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields that the client has sent: not those that have a default."""
    sent = {name for name in names if name in getattr(request, "model_fields_set", ())}
    return {name: _plain(getattr(request, name, None)) for name in sent}


def _template_of(processor: Any) -> Any:
    return getattr(processor, "chat_template", None) or CHAT_TEMPLATE


def _wants_summary(request: Any) -> bool:
    """Upstream's own request to summarize a conversation: the client's, with these fields emptied."""
    emptied = ("reasoning", "reasoning_effort", "thinking_budget", "response_format", "text")
    asked = _asked(request, ("enable_thinking", *emptied))
    return asked.pop("enable_thinking", None) is False and asked == dict.fromkeys(emptied)


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _check_history(request: Any) -> None:
    """Upstream takes arguments that it cannot read for an empty object."""
    messages = list(map(_plain, getattr(request, "messages", None) or ()))
    items = getattr(request, "input", None)
    for item in items if isinstance(items, list) else ():
        if isinstance(item, Mapping) and item.get("type") == "function_call":
            messages.append({"role": "assistant", "tool_calls": [item]})
    prepared(messages)
    prepared(from_blocks(messages))


def _offered_tools(request: Any) -> list[Any]:
    """In the form of chat completions, from any of the three forms that clients send."""
    if getattr(request, "tool_choice", None) == "none":
        return []
    offered = []
    for tool in map(_plain, getattr(request, "tools", None) or ()):
        if isinstance(tool, Mapping) and "function" not in tool:
            parameters = tool.get("parameters", tool.get("input_schema"))
            tool = {"function": {"name": tool.get("name"), "parameters": parameters}}
        offered.append(tool)
    return offered


class M3Arguments:
    """What M3's generation arguments do differently."""

    def to_template_kwargs(self) -> dict[str, Any]:
        kwargs = super().to_template_kwargs()  # type: ignore[misc]
        # Upstream's is the client's word for it.
        kwargs.pop("reasoning_effort", None)
        return kwargs | self.template_arguments  # type: ignore[attr-defined]


@cache
def _arguments_class(base: Any) -> Any:
    fields = [
        (name, kind, dataclasses.field(default_factory=kind))
        for name, kind in (("template_arguments", dict), ("tools", list))
    ]
    return dataclasses.make_dataclass(base.__name__, fields, bases=(M3Arguments, base))
