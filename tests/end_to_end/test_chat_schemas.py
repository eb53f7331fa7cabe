"""Structured output of ``mlx_vlm.server``, from a scripted model: in every mode and protocol, with tools and
beside requests without a schema."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.end_to_end.chat_cases import calls, expected, question, token_id
from tests.end_to_end.chat_hosts import Host, mlx_vlm_host
from tests.end_to_end.chat_server import ChatServer
from tests.end_to_end.scripted_model import END_OF_THINK, NS, REASONING, THINK, TOOLS

SCHEMA = {
    "type": "object",
    "properties": {"a": {"const": "yes"}},
    "required": ["a"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
ANSWER = {"a": "yes"}
FUNCTIONS = [tool["function"] for tool in TOOLS]
MODES = ["adaptive", "enabled", "disabled"]


def masked(logits: mx.array, mask: Any) -> mx.array:
    """What llguidance and mlx-vlm have Metal kernels for."""
    words = np.array(mask, copy=False).reshape(-1).view(np.uint8)
    allowed = mx.array(np.unpackbits(words, bitorder="little")[: logits.shape[-1]].astype(bool))
    return mx.where(allowed, logits, -mx.inf)


@pytest.fixture(scope="module")
def host(model: Path) -> Iterator[Host]:
    from mlx_vlm import structured

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(structured, "_apply_llguidance_mask"):
            patch.setattr(structured, "_apply_llguidance_mask", masked)
        else:
            patch.setattr("llguidance.mlx.apply_token_bitmask", masked)
        with mlx_vlm_host(model, patch, generates=True) as running:
            yield running


@pytest.fixture(scope="module")
def server(host: Host) -> ChatServer:
    return ChatServer(host.address, Path(), host.model)


@pytest.mark.some(3)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_reasoning_first_and_then_the_schema(server: ChatServer, mode: str, stream: bool) -> None:
    for tools in ({}, {"tools": TOOLS}):
        answer = server.ask(
            question(3), stream, response_format=FORMAT, extra_body={"thinking_mode": mode}, **tools
        )
        assert json.loads(answer.content) == ANSWER
        assert answer.reasoning == ("" if mode == "disabled" else REASONING)
        assert (answer.calls, answer.finish_reason) == ([], "stop")


def test_in_adaptive_mode_it_may_not_think(server: ChatServer, model: Path) -> None:
    """And begin with the closing marker, as M3 does, or with the answer."""
    closes = {token_id(model, THINK): -1000, token_id(model, END_OF_THINK): 5}
    begins = {token_id(model, THINK): -1000, token_id(model, END_OF_THINK): -1000}
    for bias in (closes, begins):
        answer = server.ask(question(3), response_format=FORMAT, logit_bias=bias)
        assert (answer.reasoning, json.loads(answer.content)) == ("", ANSWER)


@pytest.mark.some(2)
@pytest.mark.parametrize("mode", MODES)
def test_with_tools_it_may_call_instead(server: ChatServer, model: Path, mode: str) -> None:
    wants = {"response_format": FORMAT, "logit_bias": {token_id(model, NS): 5}}
    answer = server.ask(question(3), tools=TOOLS, extra_body={"thinking_mode": mode}, **wants)
    assert (answer.calls, answer.content, answer.finish_reason) == (calls(3), "", "tool_calls")
    # Where no tool is offered, it can't.
    answer = server.ask(question(3), extra_body={"thinking_mode": mode}, **wants)
    assert json.loads(answer.content) == ANSWER


def test_an_object_of_any_kind(server: ChatServer, model: Path) -> None:
    brace = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]["}"]
    answer = server.ask(question(3), response_format={"type": "json_object"}, logit_bias={brace: 5})
    assert (answer.reasoning, json.loads(answer.content)) == (REASONING, {})


@pytest.mark.some(1)
@pytest.mark.parametrize("mode", MODES)
def test_the_other_protocols(host: Host, mode: str) -> None:
    asked = {"thinking_mode": mode, "temperature": 0}
    text = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    tools = [{"type": "function", **function} for function in FUNCTIONS]
    reply = host.post("/v1/responses", asked | {"input": question(3), "text": text, "tools": tools})
    said = [part["text"] for item in reply["output"] if item["type"] == "message" for part in item["content"]]
    assert [json.loads(one) for one in said] == [ANSWER]
    messages = [{"role": "user", "content": question(3)}]
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    reply = host.post(
        "/v1/messages", asked | {"messages": messages, "output_config": config, "max_tokens": 99}
    )
    thought = [block["thinking"] for block in reply["content"] if block["type"] == "thinking"]
    assert thought == ([] if mode == "disabled" else [REASONING])
    assert json.loads(reply["content"][-1]["text"]) == ANSWER


def test_beside_others_without_a_schema(server: ChatServer) -> None:
    def ask(n: int) -> Any:
        schema = {"response_format": FORMAT} if n % 2 else {}
        return server.ask(question(n), stream=n % 3 == 0, tools=TOOLS, **schema)

    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(ask, range(6)))
    for n, answer in enumerate(answers):
        if n % 2:
            assert (answer.reasoning, json.loads(answer.content)) == (REASONING, ANSWER)
        else:
            assert answer.said == expected(n)
