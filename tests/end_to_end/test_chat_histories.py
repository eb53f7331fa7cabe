"""What goes back to M3: every protocol's history is the prompt that M3's template makes of the same turns."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE
from tests.end_to_end import scripted_model
from tests.end_to_end.chat_cases import streamed_or_not
from tests.end_to_end.chat_hosts import Host, mlx_lm_host, mlx_vlm_host
from tests.end_to_end.scripted_model import NS

TOOL = {
    "name": "f",
    "description": "",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
TOOLS = [{"type": "function", "function": TOOL}]
RESPONSES_TOOLS = [{"type": "function", **TOOL}]
MESSAGES_TOOLS = [{"name": "f", "description": "", "input_schema": TOOL["parameters"]}]
CALL = f'{NS}<invoke name="f">{NS}<a>%d{NS}</a>{NS}</invoke>\n'
BLOCK = f"{NS}<tool_call>\n{CALL % 1}{CALL % 2}{NS}</tool_call>"
# As M3 writes them: the second with text before its calls.
TURNS = (f"<mm:think>Why 1?</mm:think>{BLOCK}", f"<mm:think>Why 2?</mm:think>Once more.{BLOCK}")
LAST = "<mm:think>Why 3?</mm:think>Done.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_model.write_scripted_model(tmp_path_factory.mktemp("scripted") / "m3")


@pytest.fixture(scope="module")
def vlm(model: Path) -> Iterator[Host]:
    with pytest.MonkeyPatch.context() as patch, mlx_vlm_host(model, patch) as running:
        yield running


@pytest.fixture(scope="module")
def lm(model: Path) -> Iterator[Host]:
    with pytest.MonkeyPatch.context() as patch, mlx_lm_host(model, patch) as running:
        yield running


def transcript(*turns: str, mode: str = "adaptive", system: str | None = None) -> str:
    """The prompt that M3's own turns are in: what it wrote, and two answers of tools after each."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "Go."})
    (prompt,), _ = render_jinja_template(
        [messages], chat_template=CHAT_TEMPLATE, tools=TOOLS, thinking_mode=mode, add_generation_prompt=False
    )
    for turn in turns:
        prompt += f"]~b]ai\n{turn}[e~[\n"
        if NS in turn:
            prompt += "]~b]tool\n<response>one</response>\n<response>two</response>[e~[\n"
        else:
            prompt += "]~b]user\nAnd now?[e~[\n"
    return prompt + "]~b]ai\n" + {"enabled": "<mm:think>", "disabled": "</mm:think>"}.get(mode, "")


# --- one conversation by each protocol ---


def outputs_of(calls: list[Any]) -> list[dict[str, Any]]:
    answers = zip(calls, ("one", "two"), strict=True)
    return [{"type": "function_call_output", "call_id": id, "output": output} for id, output in answers]


def next_input(response: dict[str, Any]) -> list[dict[str, Any]]:
    calls = [item["call_id"] for item in response["output"] if item["type"] == "function_call"]
    return outputs_of(calls) if calls else [{"role": "user", "content": "And now?"}]


def ask_responses(host: Host, stream: bool, items: list[Any], **more: Any) -> dict[str, Any]:
    answer = host.post("/v1/responses", {"input": items, "tools": RESPONSES_TOOLS, "stream": stream, **more})
    return answer[-1]["response"] if stream else answer


def by_items(host: Host, stream: bool) -> None:
    items: list[Any] = [{"role": "user", "content": "Go."}]
    for host.reply in (*TURNS, LAST, "Bye."):
        response = ask_responses(host, stream, items)
        items += [*response["output"], *next_input(response)]


def by_id(host: Host, stream: bool) -> None:
    items: list[Any] = [{"role": "user", "content": "Go."}]
    before = {}
    for host.reply in (*TURNS, LAST, "Bye."):
        response = ask_responses(host, stream, items, **before)
        items, before = next_input(response), {"previous_response_id": response["id"]}


def ask_messages(host: Host, stream: bool, messages: list[Any], **more: Any) -> list[dict[str, Any]]:
    """The blocks of the answer."""
    body = {"messages": messages, "tools": MESSAGES_TOOLS, "max_tokens": 99, "stream": stream, **more}
    answer = host.post("/v1/messages", body)
    if not stream:
        return answer["content"]
    blocks: list[dict[str, Any]] = []
    for event in answer:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            name = next(name for name in ("text", "thinking", "partial_json", "signature") if name in delta)
            if name == "partial_json":
                blocks[-1]["input"] = json.loads(delta[name])
            else:
                blocks[-1][name] += delta[name]
    return blocks


def by_blocks(host: Host, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "Go."}]
    for host.reply in (*TURNS, LAST, "Bye."):
        blocks = ask_messages(host, stream, messages)
        calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
        results = [
            {"type": "tool_result", "tool_use_id": id, "content": text}
            for id, text in zip(calls, ("one", "two"), strict=bool(calls))
        ]
        messages.append({"role": "assistant", "content": blocks})
        messages.append({"role": "user", "content": results or "And now?"})


def by_chat(host: Host, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "Go."}]
    for host.reply in (*TURNS, LAST, "Bye."):
        message = ask_chat(host, stream, messages)
        calls = [call["id"] for call in message.get("tool_calls") or ()]
        messages.append(message)
        for id, text in zip(calls, ("one", "two"), strict=bool(calls)):
            messages.append({"role": "tool", "tool_call_id": id, "content": text})
        if not calls:
            messages.append({"role": "user", "content": "And now?"})


def ask_chat(host: Host, stream: bool, messages: list[Any], **more: Any) -> dict[str, Any]:
    answer = host.post(
        "/v1/chat/completions", {"messages": messages, "tools": TOOLS, "stream": stream, **more}
    )
    if not stream:
        return answer["choices"][0]["message"]
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning": "", "tool_calls": []}
    for event in answer:
        for choice in event["choices"]:
            for name in ("content", "reasoning"):
                message[name] += choice["delta"].get(name) or ""
            message["tool_calls"] += choice["delta"].get("tool_calls") or []
    return message


@streamed_or_not
@pytest.mark.parametrize("converse", [by_chat, by_items, by_id, by_blocks])
def test_the_prompt_is_what_m3_wrote(vlm: Host, converse: Any, stream: bool) -> None:
    check(vlm, converse, stream)


@streamed_or_not
def test_the_prompt_is_what_m3_wrote_in_mlx_lm(lm: Host, stream: bool) -> None:
    check(lm, by_chat, stream)


def check(host: Host, converse: Any, stream: bool) -> None:
    host.prompts.clear()
    converse(host, stream)
    turns = (*TURNS, LAST)
    assert host.prompts == [transcript(*turns[:n]) for n in range(4)]
