"""Chats of a stock mlx-lm with a scripted M3: a server and its ``openai`` client, and the terminal."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import scripted_model
from tests.end_to_end.chat_cases import (
    CUTS,
    WITHOUT_REASONING,
    Expected,
    calls,
    every_mode,
    expected,
    question,
    streamed_or_not,
    token_id,
    write_thinking_twin,
)
from tests.end_to_end.chat_server import ChatServer, serving
from tests.end_to_end.environments import CHECKOUT, Environment
from tests.end_to_end.scripted_model import END_OF_THINK, EOS, NS, REASONING, THINK, TOOLS, TOPICS, content


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_model.write_scripted_model(tmp_path_factory.mktemp("scripted") / "m3")


@pytest.fixture(scope="module")
def server(guest: Environment, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    with serving(guest, "mlx_lm.server", model, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def reserved_server(
    guest: Environment, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ChatServer]:
    """One that does not think unless it is asked to, and that remembers nothing."""
    log = tmp_path_factory.mktemp("reserved") / "log"
    options = ("--chat-template-args", '{"enable_thinking": false}', "--prompt-cache-size", "0")
    with serving(guest, "mlx_lm.server", model, log, *options) as running:
        yield running


# --- replies ---


@pytest.mark.some(5)
@streamed_or_not
@every_mode
def test_a_reply_in_every_mode(
    server: ChatServer, arguments: dict[str, Any], tokens: int, stream: bool
) -> None:
    answer = server.ask(question(3), stream, tools=TOOLS, extra_body={"chat_template_kwargs": arguments})
    assert answer.said == expected(3, thought=tokens != WITHOUT_REASONING)
    assert answer.tokens == tokens


@streamed_or_not
def test_a_reply_that_chooses_not_to_think(server: ChatServer, model: Path, stream: bool) -> None:
    """In adaptive mode it then begins with the closing marker."""
    bias = {token_id(model, THINK): -1000, token_id(model, END_OF_THINK): 5}
    answer = server.ask(question(11), stream, tools=TOOLS, logit_bias=bias)
    assert answer.said == expected(11, thought=False)
    assert answer.tokens == WITHOUT_REASONING + 1


@streamed_or_not
def test_without_tools_a_call_is_a_call_all_the_same(server: ChatServer, stream: bool) -> None:
    """With arguments that are JSON where they look like it: nothing is known of the tools."""
    reasoning, text, (search, fetch), reason = server.ask(question(5), stream).said
    assert (reasoning, text, reason) == (REASONING, content(5), "tool_calls")
    assert search[1]["tags"] == [{"name": "a", "weight": 1.5}, {"name": "b"}]
    assert fetch == ("fetch", {"id": 5})


@streamed_or_not
def test_tool_choice_none_means_no_call(server: ChatServer, stream: bool) -> None:
    reasoning, text, calls_made, reason = server.ask(
        question(5), stream, tools=TOOLS, tool_choice="none"
    ).said
    assert (reasoning, calls_made, reason) == (REASONING, [], "stop")
    assert text == content(5) + scripted_model.block(5)


@streamed_or_not
def test_thinking_as_the_command_line_says(reserved_server: ChatServer, stream: bool) -> None:
    answer = reserved_server.ask(question(1), stream, tools=TOOLS)
    assert answer.said == expected(1, thought=False)
    assert answer.tokens == WITHOUT_REASONING


@every_mode
def test_the_request_goes_before_the_command_line(
    reserved_server: ChatServer, arguments: dict[str, Any], tokens: int
) -> None:
    answer = reserved_server.ask(question(1), tools=TOOLS, extra_body={"chat_template_kwargs": arguments})
    assert answer.tokens == (tokens if arguments else WITHOUT_REASONING)
    assert answer.said == expected(1, thought=answer.tokens != WITHOUT_REASONING)


@pytest.mark.some(6)
@streamed_or_not
@pytest.mark.parametrize("text", [THINK, END_OF_THINK, f"{END_OF_THINK}{THINK}", f"{NS}<tool_call>"])
@pytest.mark.parametrize("mode", ["enabled", "disabled", "adaptive"])
def test_markers_that_a_user_writes_are_text(server: ChatServer, mode: str, text: str, stream: bool) -> None:
    asked = f"{text} What is {text}? {question(2)} {text}"
    arguments = {"chat_template_kwargs": {"thinking_mode": mode}}
    assert server.ask(asked, stream, tools=TOOLS, extra_body=arguments).said == expected(
        2, thought=mode != "disabled"
    )


def test_sixteen_at_once_get_each_their_own(server: ChatServer) -> None:
    def ask(topic: int) -> Expected:
        return server.ask(question(topic), stream=topic % 2 == 0, tools=TOOLS).said

    topics = range(len(TOPICS))
    with ThreadPoolExecutor(len(topics)) as clients:
        answers = list(clients.map(ask, topics))
    assert len(topics) == 16
    assert answers == [expected(topic) for topic in topics]


# --- replies that end early ---


@pytest.mark.some(6)
@streamed_or_not
@pytest.mark.parametrize(("max_tokens", "parts"), CUTS.items())
@pytest.mark.parametrize("seed", [None, 0], ids=["in a batch", "alone"])
def test_max_tokens(
    server: ChatServer, max_tokens: int, parts: tuple[bool, str | None, int], seed: int | None, stream: bool
) -> None:
    """Complete calls are there, the rest is text, and the reason says that there was more to come."""
    thought, said, n_calls = parts
    request = {"max_tokens": max_tokens, "seed": seed, "tools": TOOLS}
    thinking = {"chat_template_kwargs": {"thinking_mode": "enabled"}}
    answer = server.ask(question(6), stream, extra_body=thinking, **request)
    reasoning, text = REASONING if thought else "", "" if said is None else content(6) + said
    assert answer.said == (reasoning, text, calls(6)[:n_calls], "length")
    assert answer.tokens == max_tokens


@streamed_or_not
@pytest.mark.parametrize("seed", [None, 0], ids=["in a batch", "alone"])
def test_the_end_of_what_was_said_is_not_lost(
    server: ChatServer, model: Path, seed: int | None, stream: bool
) -> None:
    """Although it may begin a marker: here the reply ends where the marker of calls was to come."""
    bias = {token_id(model, NS): -1000, token_id(model, EOS): 5}
    answer = server.ask(question(4), stream, tools=TOOLS, logit_bias=bias, seed=seed)
    assert answer.said == (REASONING, "Looking up [topic-04]", [], "stop")


# --- conversations ---


def test_ten_rounds_of_tools_go_on_in_the_cache(server: ChatServer, reserved_server: ChatServer) -> None:
    """With history as the client gives it back, of streamed replies and of others."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question(9)}]
    thinking = {"chat_template_kwargs": {"thinking_mode": "adaptive"}}
    before = None
    for turn in range(10):
        stream = turn % 2 == 1
        request = {"stream": stream, "logprobs": not stream, "tools": TOOLS, "extra_body": thinking}
        answer, afresh = server.ask(messages, **request), reserved_server.ask(messages, **request)
        assert answer.said == afresh.said == expected(9)
        assert answer.logprobs == pytest.approx(afresh.logprobs, abs=1e-4)
        assert len(answer.logprobs) == (0 if stream else answer.tokens)
        assert afresh.cached == 0
        if before:
            # The prompt of the turn before, and all of the reply to it.
            assert answer.cached == before.prompt + before.tokens
        before = answer
        messages.append(answer.message)
        messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": f"Nothing yet, after {turn} minutes."}
            for call in answer.message["tool_calls"]
        ]


@pytest.mark.parametrize(
    ("messages", "arguments", "complaint"),
    [
        ([], {"thinking_mode": "on"}, "thinking_mode must be one of enabled, disabled, adaptive, not 'on'"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "search", "arguments": "[1]"}}]}],
            {},
            "the arguments of the call of search are not a JSON object: [1]",
        ),
    ],
)
def test_a_request_that_cannot_be_right_is_refused(
    server: ChatServer, messages: list[Any], arguments: dict[str, Any], complaint: str
) -> None:
    import openai

    asked = [{"role": "user", "content": question(0)}, *messages]
    with pytest.raises(openai.APIStatusError) as refusal:
        server.ask(asked, extra_body={"chat_template_kwargs": arguments})
    assert complaint in refusal.value.response.text
    assert server.ask(question(0), tools=TOOLS).said == expected(0)


RUN_EXAMPLE = """
import sys
sys.path.insert(0, sys.argv[1])
import tool_agent_mlx_lm as example
example.MOST_ROUNDS = 2
example.main(sys.argv[2])
"""


def test_the_example(server: ChatServer, guest: Environment) -> None:
    """Its loop goes round; the scripted model asks for tools that it does not have."""
    env = {"M3_SERVER": f"{server.address}/v1"}
    run = guest.run("-c", RUN_EXAMPLE, CHECKOUT / "examples", question(12), env=env, check=False)
    told = [f"{name}({json.dumps(arguments)}) -> KeyError: '{name}'" for name, arguments in calls(12)]
    # It offers no schema for them, so numbers are text.
    told = [line.replace("1.5", '"1.5"').replace("12}", '"12"}') for line in told]
    assert run.stderr.splitlines() == [*told, *told, "no answer after 2 rounds of tools"]
    assert run.returncode == 1


# --- the terminal ---


@pytest.fixture(scope="module")
def thinking_twin(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_thinking_twin(model, tmp_path_factory.mktemp("twin") / "model")


@pytest.mark.some(1)
@pytest.mark.parametrize("mode", ["enabled", "disabled", "adaptive"])
def test_generate_prints_what_it_prints_of_other_models(
    guest: Environment, model: Path, thinking_twin: Path, mode: str
) -> None:
    """Stock separates nothing here: it prints replies as they are."""
    options = ("--prompt", question(8), "--temp", "0", "--max-tokens", "30", "--verbose", "False")
    options += ("--chat-template-config", json.dumps({"thinking_mode": mode}))
    ours, other = (
        guest.run_script("mlx_lm.generate", "--model", directory, *options).stdout
        for directory in (model, thinking_twin)
    )
    thought = {"enabled": REASONING + END_OF_THINK, "disabled": ""}.get(
        mode, THINK + REASONING + END_OF_THINK
    )
    assert ours.startswith(f"{thought}{content(8)}{NS}<tool_call>\n")
    assert ours == other.replace("think>", "mm:think>")


def test_chat_prints_what_it_prints_of_other_models(
    guest: Environment, model: Path, thinking_twin: Path
) -> None:
    ours, other = (
        guest.run_script("mlx_lm.chat", "--model", directory, input=f"{question(8)}\nq\n").stdout
        for directory in (model, thinking_twin)
    )
    reply = f"{THINK}{REASONING}{END_OF_THINK}{content(8)}"
    assert reply in ours
    assert reply.replace("mm:think>", "think>") in other
