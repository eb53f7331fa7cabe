"""What a request to ``mlx_vlm.server`` asks of M3, as arguments of a generation."""

import dataclasses
from collections.abc import Mapping
from functools import cache
from inspect import signature
from typing import Any

from mlx_m3_plugin.chat.markers import THINK_END, THINK_START
from mlx_m3_plugin.chat.prompt import prepared, thinking_mode

# What ours reads and sets of upstream's arguments, in the form that ``Patch.needs`` has.
ARGUMENTS = (
    "GenerationArguments(enable_thinking, thinking_budget, thinking_start_token, thinking_end_token,"
    " skip_special_tokens, logits_processors)",
    "GenerationArguments.to_template_kwargs",
)


def arguments_of(made: Any, request: Any) -> Any:
    """``GenerationArguments`` for M3, from upstream's and the request.

    Raises:
        ValueError: an unknown thinking mode, or a history with arguments that are not a JSON object.
    """
    _check_history(request)
    template = dict(getattr(request, "chat_template_kwargs", None) or {})
    mode = _mode_of(request, template, made)
    template.pop("enable_thinking", None)
    arguments = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    arguments |= {
        "enable_thinking": _may_think(mode, made),
        "thinking_start_token": THINK_START,
        "thinking_end_token": THINK_END,
        # The markers may be special tokens, and have to be seen.
        "skip_special_tokens": False,
        "template_arguments": template | ({"thinking_mode": mode} if mode else {}),
        "tools": _offered_tools(request),
    }
    base: Any = type(made)
    return _arguments_class(base)(**arguments)


def _mode_of(request: Any, template: dict[str, Any], made: Any) -> str | None:
    """From M3's own option, or else from others in the request, or else from the command line."""
    sources = [
        {"thinking_mode": getattr(request, "thinking_mode", None)},
        {"thinking_mode": template.get("thinking_mode")},
        {"thinking_mode": "adaptive" if _field(request, "thinking", "type") == "adaptive" else None},
        {"enable_thinking": _sent(request, "enable_thinking")},
        {"enable_thinking": template.get("enable_thinking")},
        # Upstream's reading of ``reasoning`` and ``reasoning_effort``; None if there was none.
        {"enable_thinking": getattr(made, "reasoning", None)},
        {"enable_thinking": made.enable_thinking or None},
    ]
    return next(filter(None, map(thinking_mode, sources)), None)


def _may_think(mode: str | None, made: Any) -> bool:
    """Upstream's ``enable_thinking``: whether reasoning is shown, limited, and waited for."""
    if mode == "enabled" or mode == "disabled":
        return mode == "enabled"
    has_budget = made.thinking_budget is not None and knows_open_prompts()
    # A grammar would wait for the end of a reasoning that may never begin.
    return made.logits_processors is None and (made.enable_thinking or has_budget)


def knows_open_prompts() -> bool:
    """Whether mlx-vlm distinguishes prompts that have opened reasoning from others.  Where it does not,
    there are no thinking budgets in adaptive mode."""
    from mlx_vlm.utils import ThinkingBudgetCriteria

    # until: mlx-vlm 0.7
    return "prompt_preopens_thinking" in signature(ThinkingBudgetCriteria.__init__).parameters


def _sent(request: Any, name: str) -> Any:
    """A field's value if the client has sent it, and not if it is a default."""
    return getattr(request, name, None) if name in getattr(request, "model_fields_set", ()) else None


def _field(request: Any, name: str, key: str) -> Any:
    value = _plain(getattr(request, name, None))
    return value.get(key) if isinstance(value, Mapping) else None


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
        return super().to_template_kwargs() | self.template_arguments  # type: ignore[misc,attr-defined]


@cache
def _arguments_class(base: Any) -> Any:
    fields = [
        (name, kind, dataclasses.field(default_factory=kind))
        for name, kind in (("template_arguments", dict), ("tools", list))
    ]
    return dataclasses.make_dataclass(base.__name__, fields, bases=(M3Arguments, base))
