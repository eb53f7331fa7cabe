"""Chats of a stock mlx-vlm with a scripted M3: a server and its clients, and the terminal."""

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

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

VLM = Version(version("mlx-vlm"))
# 0.6 has no prefix cache for models with caches of their own, and parses calls that no tool was offered for.
IS_FLOOR = Version("0.7") > VLM
PREFIX_CACHE = {"APC_ENABLED": "1", "APC_BLOCK_SIZE": "16"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_model.write_scripted_model(tmp_path_factory.mktemp("scripted") / "m3")


@pytest.fixture(scope="module")
def server(guest: Environment, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(guest, "mlx_vlm.server", model, log, env=PREFIX_CACHE) as running:
        yield running


@pytest.fixture(scope="module")
def other_server(
    guest: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ChatServer, Path]]:
    """One that thinks by default and remembers nothing, and whose model's markers are special tokens."""
    model = scripted_model.write_scripted_model(tmp_path_factory.mktemp("special") / "m3", True)
    log = tmp_path_factory.mktemp("other") / "log"
    with serving(guest, "mlx_vlm.server", model, log, "--enable-thinking") as running:
        yield running, model


def mode_of(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"extra_body": arguments}


# --- replies ---


@pytest.mark.some(5)
@streamed_or_not
@every_mode
def test_a_reply_in_every_mode(
    server: ChatServer, arguments: dict[str, Any], tokens: int, stream: bool
) -> None:
    """As fields of the request, and in ``chat_template_kwargs``."""
    for extra in (arguments, {"chat_template_kwargs": arguments}):
        answer = server.ask(question(3), stream, tools=TOOLS, extra_body=extra)
        assert answer.said == expected(3, thought=tokens != WITHOUT_REASONING)
        assert answer.tokens == tokens


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        # M3's own name goes first, the request's own fields before those that it hands on.
        ({"thinking_mode": "adaptive", "enable_thinking": False}, 12),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, 11),
        ({"enable_thinking": True, "chat_template_kwargs": {"thinking_mode": "disabled"}}, WITHOUT_REASONING),
        ({"reasoning_effort": "high"}, 11),
        ({"reasoning_effort": "none"}, WITHOUT_REASONING),
    ],
)
def test_what_goes_first(server: ChatServer, arguments: dict[str, Any], tokens: int) -> None:
    assert server.ask(question(3), tools=TOOLS, extra_body=arguments).tokens == tokens


@streamed_or_not
def test_a_reply_that_chooses_not_to_think(server: ChatServer, model: Path, stream: bool) -> None:
    """In adaptive mode it then begins with the closing marker."""
    bias = {token_id(model, THINK): -1000, token_id(model, END_OF_THINK): 5}
    answer = server.ask(question(11), stream, tools=TOOLS, logit_bias=bias)
    assert answer.said == expected(11, thought=False)
    assert answer.tokens == WITHOUT_REASONING + 1


@streamed_or_not
def test_calls_where_no_tool_was_offered(server: ChatServer, stream: bool) -> None:
    """mlx-vlm takes them for text, from 0.7 on: all of it is there."""
    answer = server.ask(question(5), stream)
    if IS_FLOOR:
        assert [name for name, _ in answer.calls] == ["search", "fetch"]
    else:
        assert answer.content == content(5) + scripted_model.block(5)
        assert (answer.calls, answer.finish_reason) == ([], "stop")
    assert answer.reasoning == REASONING


@streamed_or_not
def test_a_server_that_thinks_by_default_and_markers_that_are_special_tokens(
    other_server: tuple[ChatServer, Path], stream: bool
) -> None:
    server, _ = other_server
    answer = server.ask(question(1), stream, tools=TOOLS)
    assert answer.said == expected(1)
    assert answer.tokens == 11
    silent = server.ask(question(1), stream, tools=TOOLS, extra_body={"enable_thinking": False})
    assert silent.said == expected(1, thought=False)
    # Without tools too, when others' special tokens are left out of the text.
    assert server.ask(question(1), stream).reasoning == REASONING


@pytest.mark.some(6)
@streamed_or_not
@pytest.mark.parametrize("text", [THINK, END_OF_THINK, f"{END_OF_THINK}{THINK}", f"{NS}<tool_call>"])
@pytest.mark.parametrize("mode", ["enabled", "disabled", "adaptive"])
def test_markers_that_a_user_writes_are_text(server: ChatServer, mode: str, text: str, stream: bool) -> None:
    asked = f"{text} What is {text}? {question(2)} {text}"
    answer = server.ask(asked, stream, tools=TOOLS, extra_body={"thinking_mode": mode})
    assert answer.said == expected(2, thought=mode != "disabled")


def test_sixteen_at_once_get_each_their_own(server: ChatServer) -> None:
    modes = ({}, {"thinking_mode": "enabled"}, {"thinking_mode": "disabled"})

    def ask(topic: int) -> Expected:
        extra = modes[topic % 3]
        return server.ask(question(topic), stream=topic % 2 == 0, tools=TOOLS, extra_body=extra).said

    topics = range(len(TOPICS))
    with ThreadPoolExecutor(len(topics)) as clients:
        answers = list(clients.map(ask, topics))
    assert len(topics) == 16
    assert answers == [expected(topic, thought=topic % 3 != 2) for topic in topics]


def test_calls_come_as_they_are_complete(server: ChatServer) -> None:
    chunks = server.chunks(question(7), tools=TOOLS)
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    told = [[call.function.name for call in delta.tool_calls or ()] for delta in deltas]
    told = [names for names in told if names]
    assert told == ([["search", "fetch"]] if Version("0.7.1") > VLM else [["search"], ["fetch"]])


# --- replies that end early ---


@pytest.mark.some(6)
@streamed_or_not
@pytest.mark.parametrize(("max_tokens", "parts"), CUTS.items())
def test_max_tokens(
    server: ChatServer, max_tokens: int, parts: tuple[bool, str | None, int], stream: bool
) -> None:
    """Complete calls are there, the rest is text.  If there are calls, mlx-vlm gives them as the reason."""
    thought, said, n_calls = parts
    request = {"max_tokens": max_tokens, "tools": TOOLS}
    answer = server.ask(question(6), stream, extra_body={"thinking_mode": "enabled"}, **request)
    reasoning, text = REASONING if thought else "", "" if said is None else content(6) + said
    reason = "tool_calls" if n_calls else "length"
    # mlx-vlm puts blanks where calls were, and takes white space away at both ends of what it streams.
    shown = " ".join(answer.said[1].split())
    assert answer.said == (reasoning, answer.said[1], calls(6)[:n_calls], reason)
    assert shown == " ".join(text.split())
    assert answer.tokens == max_tokens


@streamed_or_not
def test_the_end_of_what_was_said_is_not_lost(server: ChatServer, model: Path, stream: bool) -> None:
    """Although it may begin a marker: here the reply ends where the marker of calls was to come."""
    bias = {token_id(model, NS): -1000, token_id(model, EOS): 5}
    answer = server.ask(question(4), stream, tools=TOOLS, logit_bias=bias)
    assert answer.said == (REASONING, "Looking up [topic-04]", [], "stop")


# --- conversations ---


def test_ten_rounds_of_tools_go_on_in_the_cache(
    server: ChatServer, other_server: tuple[ChatServer, Path]
) -> None:
    """With history as the client gives it back, of streamed replies and of others."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question(9)}]
    thinking = {"extra_body": {"thinking_mode": "adaptive"}}
    before = None
    for turn in range(10):
        stream = turn % 2 == 1
        request = {"stream": stream, "logprobs": not stream, "tools": TOOLS, **thinking}
        answer = server.ask(messages, **request)
        afresh = other_server[0].ask(messages, **request)
        assert answer.said == afresh.said == expected(9)
        assert answer.logprobs == pytest.approx(afresh.logprobs, abs=1e-4)
        assert len(answer.logprobs) == (0 if stream else answer.tokens - 1)
        assert afresh.cached == 0
        assert answer.prompt == afresh.prompt
        if before and not IS_FLOOR:
            # mlx-vlm keeps the prompt of the turn before, and not the reply to it.
            assert before.prompt - 1 <= answer.cached <= before.prompt + before.tokens
        before = answer
        messages.append(answer.message)
        messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": f"Nothing yet, after {turn} minutes."}
            for call in answer.message["tool_calls"]
        ]


def ask_by_items(server: ChatServer, turns: list[Any]) -> tuple[list[Any], int, int]:
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    answer = post(
        server, "/v1/responses", {"model": server.model, "temperature": 0, "input": turns, "tools": tools}
    )
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "Nothing yet."}
        for item in answer["output"]
        if item["type"] == "function_call"
    ]
    assert len(results) == 2
    usage = answer["usage"]
    cached = usage["input_tokens_details"]["cached_tokens"]
    return [*turns, *answer["output"], *results], usage["input_tokens"], cached


def ask_by_blocks(server: ChatServer, turns: list[Any]) -> tuple[list[Any], int, int]:
    functions = [tool["function"] for tool in TOOLS]
    tools = [{"name": f["name"], "input_schema": f["parameters"]} for f in functions]
    body = {"model": server.model, "temperature": 0, "max_tokens": 400, "messages": turns, "tools": tools}
    answer = post(server, "/v1/messages", body)
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": "Nothing yet."}
        for block in answer["content"]
        if block["type"] == "tool_use"
    ]
    assert len(results) == 2
    turns = [
        *turns,
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": results},
    ]
    cached = answer["usage"]["cache_read_input_tokens"]
    return turns, answer["usage"]["input_tokens"] + cached, cached


@pytest.mark.skipif(IS_FLOOR, reason="mlx-vlm has a prefix cache for M3's caches from 0.7 on")
@pytest.mark.parametrize("ask", [ask_by_items, ask_by_blocks])
def test_the_other_protocols_go_on_in_the_cache(server: ChatServer, ask: Any) -> None:
    turns, length, _ = ask(server, [{"role": "user", "content": question(7)}])
    for _ in range(3):
        before = length
        turns, length, cached = ask(server, turns)
        # At the least all of the prompt before; what is written anew would be 0 or the system's part.
        assert before - 1 <= cached < length


@pytest.mark.parametrize(
    ("messages", "arguments", "complaint"),
    [
        ([], {"thinking_mode": "on"}, "thinking_mode must be one of enabled, disabled, adaptive, not 'on'"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "search", "arguments": "[1]"}}]}],
            {},
            "the arguments of the call of search are not a JSON object: [1]",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "search", "arguments": '{"a":'}}]}],
            {},
            'the arguments of the call of search are not a JSON object: {\\"a\\":',
        ),
    ],
)
def test_a_request_that_cannot_be_right_is_refused(
    server: ChatServer, messages: list[Any], arguments: dict[str, Any], complaint: str
) -> None:
    import openai

    asked = [{"role": "user", "content": question(0)}, *messages]
    with pytest.raises(openai.BadRequestError) as refusal:
        server.ask(asked, extra_body=arguments)
    assert complaint in refusal.value.response.text
    assert server.ask(question(0), tools=TOOLS).said == expected(0)


# --- other protocols ---


def post(server: ChatServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


@pytest.mark.parametrize("thinking", ["enabled", "adaptive", "disabled"])
def test_messages_of_anthropic(server: ChatServer, model: Path, thinking: str) -> None:
    tools = [{"name": t["function"]["name"], "input_schema": t["function"]["parameters"]} for t in TOOLS]
    body = {"model": str(model), "max_tokens": 40, "temperature": 0, "tools": tools}
    body |= {"messages": [{"role": "user", "content": question(13)}], "thinking": {"type": thinking}}
    reply = post(server, "/v1/messages", body)
    told = [(block["type"], block.get("thinking") or block.get("text")) for block in reply["content"]]
    thought = [] if thinking == "disabled" else [("thinking", REASONING)]
    assert told == [*thought, ("text", content(13)), ("tool_use", None), ("tool_use", None)]
    assert [(b["name"], b["input"]) for b in reply["content"] if b["type"] == "tool_use"] == calls(13)
    assert reply["stop_reason"] == "tool_use"


def test_responses(server: ChatServer, model: Path) -> None:
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    body = {"model": str(model), "input": question(14), "max_output_tokens": 40, "temperature": 0}
    reply = post(server, "/v1/responses", body | {"tools": tools})
    thought = [s["text"] for item in reply["output"] if item["type"] == "reasoning" for s in item["summary"]]
    made = [(i["name"], json.loads(i["arguments"])) for i in reply["output"] if i["type"] == "function_call"]
    assert (thought, made) == ([REASONING], calls(14))
    assert NS not in json.dumps(reply)


# --- the example ---

RUN_EXAMPLE = """
import sys
sys.path.insert(0, sys.argv[1])
import tool_agent_mlx_vlm as example
example.MOST_ROUNDS = 2
example.main(sys.argv[2])
"""


def test_the_example(server: ChatServer, guest: Environment) -> None:
    """Its loop goes round; the scripted model asks for tools that it does not have."""
    env = {"M3_SERVER": f"{server.address}/v1", "M3_MODEL": server.model}
    run = guest.run("-c", RUN_EXAMPLE, CHECKOUT / "examples", question(12), env=env, check=False)
    told = [f"{name}({json.dumps(arguments)}) -> KeyError: '{name}'" for name, arguments in calls(12)]
    # It offers no schema for them, so numbers are text.
    told = [line.replace("1.5", '"1.5"').replace("12}", '"12"}') for line in told]
    told = [REASONING, told[0], "", told[1]]
    assert run.stderr.splitlines() == [*told, *told, "no answer after 2 rounds of tools"]
    assert run.stdout == content(12) * 2
    assert run.returncode == 1


# --- the terminal ---


@pytest.fixture(scope="module")
def thinking_twin(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_thinking_twin(model, tmp_path_factory.mktemp("twin") / "model")


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("options", "thought"),
    [
        ((), THINK + REASONING + END_OF_THINK),
        (("--enable-thinking",), REASONING + END_OF_THINK),
        (("--thinking-mode", "enabled"), REASONING + END_OF_THINK),
        (("--thinking-mode", "adaptive"), THINK + REASONING + END_OF_THINK),
        (("--thinking-mode", "disabled"), ""),
    ],
)
def test_generate_prints_what_it_prints_of_other_models(
    guest: Environment, model: Path, thinking_twin: Path, options: tuple[str, ...], thought: str
) -> None:
    """Stock separates nothing here: it prints replies as they are."""
    fixed = ("--prompt", question(8), "--temperature", "0", "--max-tokens", "30", "--no-verbose")
    ours, other = (
        guest.run_script("mlx_vlm.generate", "--model", directory, *fixed, *options).stdout
        for directory in (model, thinking_twin)
    )
    # mlx-vlm warns of the line break after tokens that no byte-level vocabulary has but this one.
    assert ours.removeprefix("Warning: could not decode bytes: ").startswith(f"{thought}{content(8)}{NS}")
    assert ours == other.replace("think>", "mm:think>")


def test_chat_prints_what_it_prints_of_other_models(
    guest: Environment, model: Path, thinking_twin: Path
) -> None:
    ours, other = (
        guest.run_script(
            "mlx_vlm.chat", "--model", directory, "--temperature", "0", input=f"{question(8)}\n/exit\n"
        ).stdout
        for directory in (model, thinking_twin)
    )
    reply = f"{THINK}{REASONING}{END_OF_THINK}"
    assert "".join(reply.split()) in "".join(ours.split())
    assert "".join(reply.replace("mm:think>", "think>").split()) in "".join(other.split())
