"""What requests ask of M3 in every protocol, and what is refused: modes, effort, template arguments."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.m31_template import give_m31_template
from tests.end_to_end import scripted_model
from tests.end_to_end.chat_hosts import Host, mlx_lm_host

ASKED = [{"role": "user", "content": "Go."}]
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": ASKED},
    RESPONSES: {"input": "Go."},
    MESSAGES: {"messages": ASKED, "max_tokens": 9},
}
ENDS = {"enabled": "]~b]ai\n<mm:think>", "disabled": "]~b]ai\n</mm:think>", "adaptive": "]~b]ai\n"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With M3.1's template, which has effort as well."""
    return give_m31_template(scripted_model.write_scripted_model(tmp_path_factory.mktemp("scripted") / "m31"))


@pytest.fixture(scope="module")
def lm(model: Path) -> Iterator[Host]:
    args = '{"enable_thinking": true, "reasoning_effort": "max"}'
    with (
        pytest.MonkeyPatch.context() as patch,
        mlx_lm_host(model, patch, "--chat-template-args", args) as running,
    ):
        yield running


def asked(host: Host, path: str, **fields: Any) -> tuple[str, str | None]:
    """Mode and effort of the prompt."""
    host.post(path, BODIES[path] | fields)
    (mode,) = (mode for mode in ENDS if f"Current thinking mode: {mode}" in host.prompt)
    assert host.prompt.endswith(ENDS[mode])
    effort = host.prompt.partition("<effort>")[2].partition("</effort>")[0]
    return mode, effort or None


# In each protocol's own words, and in those that all take.
WORDS: list[tuple[str, dict[str, Any], str, str | None]] = [
    (CHAT, {"reasoning_effort": "high"}, "enabled", "high"),
    (CHAT, {"reasoning_effort": "none"}, "disabled", None),
    (CHAT, {"thinking_mode": "adaptive", "reasoning_effort": "low"}, "adaptive", "low"),
    (RESPONSES, {"reasoning": {"effort": "low"}}, "enabled", "low"),
    (RESPONSES, {"reasoning": {"effort": "none"}}, "disabled", None),
    (MESSAGES, {"output_config": {"effort": "medium"}}, "enabled", "medium"),
    (MESSAGES, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "adaptive", "low"),
    (MESSAGES, {"thinking": {"type": "disabled"}}, "disabled", None),
    *((path, {}, "adaptive", None) for path in BODIES),
    *((path, {"thinking_mode": "enabled"}, "enabled", None) for path in BODIES),
    *((path, {"chat_template_kwargs": {"reasoning_effort": "max"}}, "enabled", "max") for path in BODIES),
    *((path, {"chat_template_kwargs": {"thinking_mode": "disabled"}}, "disabled", None) for path in BODIES),
]


def test_mlx_vlm_takes_every_word(vlm: Host) -> None:
    for path, fields, mode, effort in WORDS:
        assert asked(vlm, path, **fields) == (mode, effort), (path, fields)


def test_mlx_lm_takes_every_word_as_a_field(lm: Host) -> None:
    """What a request does not say, the command line says."""
    for path, fields, mode, effort in WORDS:
        expected = mode if fields else "enabled", None if "none" in str(fields) else effort or "max"
        assert asked(lm, CHAT, **fields) == expected, (path, fields)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"chat_template_kwargs": {"chat_template": "PWNED"}}, "not 'chat_template'"),
    ({"chat_template_kwargs": {"messages": []}}, "not 'messages'"),
    ({"chat_template_kwargs": {"tools": []}}, "not 'tools'"),
    ({"thinking_mode": "on"}, "one of enabled, disabled, adaptive, not 'on'"),
    ({"reasoning_effort": "much"}, "one of none, low, medium, high, xhigh, max, not 'much'"),
    ({"logit_bias": {"999999": 5}}, "there is no token 999999"),
    ({"logit_bias": {"-1": 5}}, "there is no token -1"),
]


def test_mlx_vlm_refuses(vlm: Host) -> None:
    for fields, complaint in REFUSED:
        for path in BODIES:
            assert complaint in vlm.refusal(path, BODIES[path] | fields), (path, fields)


def test_mlx_lm_refuses(lm: Host) -> None:
    more = [
        ({"stop": 5}, "stop must be a string or a list of strings, not 5"),
        ({"stop": [5]}, "stop must be a string or a list of strings"),
        ({"chat_template_kwargs": "none"}, "chat_template_kwargs must be an object"),
        ({"response_format": {"type": "json_object"}}, "offer the schema as a tool"),
    ]
    for fields, complaint in [*REFUSED, *more]:
        assert complaint in lm.refusal(CHAT, BODIES[CHAT] | fields), fields
    assert asked(lm, CHAT) == ("enabled", "max")
