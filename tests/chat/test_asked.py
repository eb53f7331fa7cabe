"""What requests ask of the chat template: every word for mode and effort, and which goes first."""

from typing import Any

import pytest

from mlx_m3_plugin.chat.asked import template_arguments
from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE
from tests.checkpoints.m31_template import M31_TEMPLATE

EFFORTS = ("low", "medium", "high", "xhigh", "max")
KWARGS = "chat_template_kwargs"


def asked(request: dict[str, Any], template: str = M31_TEMPLATE) -> tuple[str | None, str | None]:
    arguments = template_arguments(request, template, EFFORTS)
    return arguments.get("thinking_mode"), arguments.get("reasoning_effort")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, M31_TEMPLATE], ids=["M3", "M3.1"])
@pytest.mark.parametrize(
    ("request_fields", "mode", "effort"),
    [
        ({}, None, None),
        ({KWARGS: None}, None, None),
        # Every word for an effort, which is a wish to think.
        ({"reasoning_effort": "high"}, "enabled", "high"),
        ({"reasoning": {"effort": "Low", "summary": "auto"}}, "enabled", "low"),
        ({"reasoning": "max"}, "enabled", "max"),
        ({"output_config": {"effort": "xhigh"}}, "enabled", "xhigh"),
        ({KWARGS: {"reasoning_effort": "medium"}}, "enabled", "medium"),
        ({KWARGS: {"effort": "medium"}}, "enabled", "medium"),
        ({"reasoning_effort": "minimal"}, "enabled", "low"),
        ({"reasoning": {}}, "enabled", None),
        ({"reasoning": True}, "enabled", None),
        # And for none.
        ({"reasoning_effort": "none"}, "disabled", None),
        ({"reasoning": {"effort": "none"}}, "disabled", None),
        ({"reasoning": False}, "disabled", None),
        ({"output_config": {"effort": "none"}}, "disabled", None),
        ({KWARGS: {"reasoning_effort": "none"}}, "disabled", None),
        # Every word for a mode.
        ({"thinking_mode": "adaptive"}, "adaptive", None),
        ({"thinking": {"type": "disabled"}}, "disabled", None),
        ({"enable_thinking": True}, "enabled", None),
        ({KWARGS: {"thinking_mode": "disabled"}}, "disabled", None),
        ({KWARGS: {"enable_thinking": False}}, "disabled", None),
        # M3's own word, Anthropic's, other models', the effort; of each the request's own first.
        ({"thinking_mode": "adaptive", KWARGS: {"thinking_mode": "disabled"}}, "adaptive", None),
        ({KWARGS: {"thinking_mode": "adaptive"}, "thinking": {"type": "disabled"}}, "adaptive", None),
        ({"thinking": {"type": "adaptive"}, "enable_thinking": True}, "adaptive", None),
        ({"enable_thinking": False, KWARGS: {"enable_thinking": True}}, "disabled", None),
        ({KWARGS: {"enable_thinking": False}, "reasoning_effort": "low"}, "disabled", "low"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "medium"}}, "adaptive", "medium"),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "enabled", "low"),
        ({"reasoning_effort": "low", "output_config": {"effort": "high"}}, "enabled", "low"),
        ({"output_config": {"effort": "low"}, KWARGS: {"reasoning_effort": "high"}}, "enabled", "low"),
        ({KWARGS: {"reasoning_effort": "low", "effort": "high"}}, "enabled", "low"),
    ],
)
def test_every_word(
    request_fields: dict[str, Any], mode: str | None, effort: str | None, template: str
) -> None:
    assert asked(request_fields, template) == (mode, effort)


@pytest.mark.parametrize(
    ("request_fields", "complaint"),
    [
        ({KWARGS: {"chat_template": "PWNED"}}, "not 'chat_template'"),
        ({KWARGS: {"messages": []}}, "not 'messages'"),
        ({KWARGS: {"conversation": []}}, "not 'conversation'"),
        ({KWARGS: {"tools": []}}, "not 'tools'"),
        ({KWARGS: {"tokenize": False}}, "not 'tokenize'"),
        ({KWARGS: "thinking"}, "must be an object"),
        ({"thinking_mode": "on"}, "one of enabled, disabled, adaptive, not 'on'"),
        ({"thinking": {"type": "auto"}}, "one of enabled, disabled, adaptive, not 'auto'"),
        ({"reasoning_effort": "much"}, "one of none, low, medium, high, xhigh, max, not 'much'"),
    ],
)
def test_what_is_refused(request_fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        asked(request_fields)


def test_a_template_that_always_thinks() -> None:
    always = M31_TEMPLATE.replace("disabled", "quiet")
    for words in ({"reasoning_effort": "none"}, {"enable_thinking": False}, {"thinking_mode": "disabled"}):
        with pytest.raises(ValueError, match="can't turn thinking off; ask for a reasoning effort of low"):
            asked(words, always)
    assert asked({"reasoning_effort": "low"}, always) == ("enabled", "low")


def test_other_variables_of_the_template() -> None:
    names = {"model_identity": "You are a parrot.", "model_id": "m"}
    assert template_arguments({KWARGS: names}, M31_TEMPLATE, EFFORTS) == names
