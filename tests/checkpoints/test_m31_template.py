"""M3.1's chat template through both hosts, and the commands that reason with an effort."""

import io
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mlx_m3_plugin.chat.reply import ReplyParser
from mlx_m3_plugin.startup.settings import EFFORT
from tests.checkpoints.m31_template import give_m31_template
from tests.checkpoints.random_model import write_random_model

NS, THINK, END = "]<]minimax[>[", "<mm:think>", "</mm:think>"
Render = Callable[..., str]
QUESTION = [{"role": "user", "content": "q"}]


@pytest.fixture(scope="module")
def m31(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("m31") / "m3.1"
    write_random_model(directory, vision=True)
    return give_m31_template(directory)


def in_mlx_lm(checkpoint: Path) -> Render:
    from mlx_lm.tokenizer_utils import load

    tokenizer = load(checkpoint)

    def render(messages: Any, **arguments: Any) -> str:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **arguments
        )

    return render


def in_mlx_vlm(checkpoint: Path) -> Render:
    import_module("mlx_vlm.models.minimax_m3_vl")
    from mlx_vlm.prompt_utils import apply_chat_template
    from mlx_vlm.utils import load_processor

    processor = load_processor(checkpoint)
    config = {"model_type": "minimax_m3_vl"}
    return lambda messages, **arguments: apply_chat_template(processor, config, messages, **arguments)


@pytest.fixture(scope="module", params=[in_mlx_lm, in_mlx_vlm])
def render(request: pytest.FixtureRequest, m31: Path) -> Render:
    return request.param(m31)


def parts_of(prompt: str) -> list[tuple[str, str]]:
    """Roles and texts; the last turn is the one that is to be written."""
    start, *turns = prompt.split("]~b]")
    assert start == "]~!b["
    return [(role, text.removesuffix("[e~[\n")) for role, _, text in (t.partition("\n") for t in turns)]


def test_the_smallest_prompt(render: Render) -> None:
    assert render(QUESTION) == (
        "]~!b[]~b]system\nYou are MiniMax-M3.1, made by MiniMax. Your knowledge ends in January 2026.\n\n"
        f"<thinking_instructions>\nReason between {THINK} and {END}.\nCurrent thinking mode: adaptive.\n"
        "</thinking_instructions>[e~[\n]~b]developer\nYou are a helpful assistant.[e~[\n"
        "]~b]user\nq[e~[\n]~b]ai\n"
    )


@pytest.mark.parametrize(
    ("arguments", "mode", "end"),
    [
        ({"thinking_mode": "enabled"}, "enabled", THINK),
        ({"enable_thinking": True}, "enabled", THINK),
        ({"thinking_mode": "disabled"}, "disabled", END),
        ({"thinking_mode": "adaptive"}, "adaptive", ""),
    ],
)
def test_thinking_modes(render: Render, arguments: dict[str, Any], mode: str, end: str) -> None:
    prompt = render(QUESTION, **arguments)
    assert f"Current thinking mode: {mode}." in prompt
    assert parts_of(prompt)[-1] == ("ai", end)


@pytest.mark.parametrize(
    ("arguments", "effort"),
    [
        ({}, None),
        ({"reasoning_effort": "low"}, "low"),
        ({"effort": "high"}, "high"),
        ({"effort": "high", "reasoning_effort": "xhigh"}, "xhigh"),
    ],
)
def test_an_effort_stands_last_in_the_system_turn(
    render: Render, arguments: dict[str, Any], effort: str | None
) -> None:
    role, text = parts_of(render(QUESTION, model_id="m", **arguments))[0]

    asked = f"\n\n<effort>{effort}</effort>" if effort else ""
    assert role == "system"
    assert text.partition("</thinking_instructions>")[2] == f"\n\n<model_id>m</model_id>{asked}"


def test_every_turn_of_a_history(render: Render) -> None:
    """System messages are developers' at their place, every reasoning is kept, calls are M3's."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": ["n", {"b": "c"}]}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b", "reasoning_content": "a"},
        {"role": "user", "content": "r"},
        {"role": "system", "content": "Be long."},
        {"role": "assistant", "content": "x", "reasoning": "why", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": f"{THINK}d{END}e"},
        {"role": "user", "content": "s"},
        {"role": "assistant", "content": "f"},
        {"role": "user", "content": "t"},
    ]
    tool = {"type": "function", "function": {"name": "f", "b": 1, "a": 2}}
    (_, developer, *turns) = parts_of(render(messages, tools=[tool]))
    assert developer == (
        "developer",
        'Be brief.\n\n# Tools\n<tools>\n<tool>{"name": "f", "b": 1, "a": 2}</tool>\n</tools>',
    )
    items = f"{NS}<item>n{NS}</item>{NS}<item>{NS}<b>c{NS}</b>{NS}</item>"
    invoke = f'{NS}<invoke name="f">{NS}<a>{items}{NS}</a>{NS}</invoke>'
    called = f"{THINK}why{END}x{NS}<tool_call>\n{invoke}\n{NS}</tool_call>"
    assert turns == [
        ("user", "q"),
        ("ai", f"{THINK}a{END}b"),
        ("user", "r"),
        ("developer", "Be long."),
        ("ai", called),
        ("tool", "<response>42</response>"),
        ("ai", f"{THINK}d{END}e"),
        ("user", "s"),
        ("ai", f"{END}f"),
        ("user", "t"),
        ("ai", ""),
    ]
    # What the history says is what the parser of replies reads.
    parser = ReplyParser([tool])
    events = parser.feed(called) + parser.finish()
    assert [(e.kind, e.text) for e in events if e.text] == [("reasoning", "why"), ("content", "x")]
    assert [e.call.as_dict() for e in events if e.call] == [
        {"name": "f", "arguments": {"a": ["n", {"b": "c"}]}}
    ]


def test_replies_are_read_as_m3s(m31: Path) -> None:
    from mlx_lm.tokenizer_utils import load

    from tests.vlm.test_vlm_chat import parser_of

    tokenizer = load(m31)
    assert (tokenizer.think_start, tokenizer.tool_call_start) == (THINK, f"{NS}<tool_call>")
    for mode, in_reasoning in (("enabled", True), ("disabled", False), ("adaptive", False)):
        tokens = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, thinking_mode=mode)
        assert (tokenizer.rfind_think_start(tokens) >= 0) is in_reasoning
    import_module("mlx_vlm.models.minimax_m3_vl")
    from mlx_vlm.utils import load_processor

    assert parser_of(load_processor(m31)) == "minimax_m3"


# --- efforts of commands ---

COMMANDS = {
    "mlx_lm.generate": ("generate", ["--prompt", "q"]),
    "mlx_lm.chat": ("stream_generate", []),
    "mlx_vlm.generate": ("generate", ["--prompt", "q"]),
    "mlx_vlm.chat": ("stream_generate", []),
}


def prompt_of_command(command: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """What a command of the installed library asks its model; it generates nothing."""
    asked: list[Any] = []

    def generate(model: Any, processor: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(prompt if isinstance(prompt, str) else processor.decode(list(prompt)))
        raise SystemExit

    name, arguments = COMMANDS[command]
    module = import_module("mlx_vlm.generate.dispatch" if command == "mlx_vlm.generate" else command)
    monkeypatch.setattr(module, name, generate)
    monkeypatch.setattr("sys.argv", [command, "--model", str(checkpoint), *arguments, *options])
    monkeypatch.setattr("sys.stdin", io.StringIO("q\n/exit\n" if "vlm" in command else "question\nq\n"))
    with pytest.raises(SystemExit):
        module.main()
    return asked[0]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("effort", [None, "low"])
def test_the_effort_of_a_command(
    m31: Path, monkeypatch: pytest.MonkeyPatch, command: str, effort: str | None
) -> None:
    """An option where there is one, our variable everywhere; with neither it is the template's own."""
    if effort:
        monkeypatch.setenv(EFFORT, effort)
    assert ("<effort>low</effort>" in prompt_of_command(command, m31, monkeypatch)) is bool(effort)
    if command == "mlx_lm.generate":
        option = "--chat-template-config", json.dumps({"reasoning_effort": "max"})
        assert "<effort>max</effort>" in prompt_of_command(command, m31, monkeypatch, *option)


def test_an_effort_that_means_nothing_is_refused(
    render: Render, m31: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(EFFORT, "none")
    with pytest.raises(ValueError, match=f"{EFFORT}='none' is not understood; use low, medium"):
        render(QUESTION)
    monkeypatch.setenv(EFFORT, "low")
    m3 = tmp_path / "m3"
    write_random_model(m3, vision=True)
    for host in (in_mlx_lm, in_mlx_vlm):
        with pytest.raises(ValueError, match=f"chat template does not take one; unset {EFFORT}"):
            host(m3)(QUESTION)
