"""Agents' own clients, four rounds of tools each: what they send back is what M3 wrote."""

import json
from typing import Any

import pytest

from tests.end_to_end.chat_cases import streamed_or_not
from tests.end_to_end.chat_hosts import Host
from tests.end_to_end.scripted_model import NS

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "double", "description": "Doubles it.", "parameters": PARAMETERS}
CALL = f'{NS}<invoke name="double">{NS}<a>%d{NS}</a>{NS}</invoke>\n'
ROUNDS = [
    f"<mm:think>Round {n}?</mm:think>{'Once more.' if n % 2 else ''}{NS}<tool_call>\n"
    f"{CALL % n}{CALL % (10 * n)}{NS}</tool_call>"
    for n in range(4)
]
ANSWER = "<mm:think>All is known.</mm:think>\n\nDone: <b>4</b> rounds.\n"
# Of the last prompt, from the first question on.
TURNS = "Go.[e~[\n" + "".join(
    f"]~b]ai\n{written}[e~[\n]~b]tool\n<response>{2 * n}</response>\n<response>{20 * n}</response>[e~[\n"
    for n, written in enumerate(ROUNDS)
)


def check(host: Host, answer: str) -> None:
    assert answer == "\n\nDone: <b>4</b> rounds.\n"
    assert host.prompt.partition("]~b]user\n")[2] == f"{TURNS}]~b]ai\n"


def double(arguments: str) -> str:
    return str(2 * json.loads(arguments)["a"])


def openai_client(host: Host) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{host.address}/v1", api_key="none", timeout=60, max_retries=0)


def chat(host: Host) -> str:
    tools = [{"type": "function", "function": FUNCTION}]
    messages: list[Any] = [{"role": "user", "content": "Go."}]
    with openai_client(host) as client:
        while True:
            asked = {"model": host.model, "messages": messages, "tools": tools}
            message = client.chat.completions.create(**asked).choices[0].message
            if not message.tool_calls:
                return message.content
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                result = double(call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def test_openai_chat(vlm: Host, lm: Host) -> None:
    for host in (vlm, lm):
        host.replies[:] = [*ROUNDS, ANSWER]
        check(host, chat(host))


@streamed_or_not
@pytest.mark.parametrize("by_id", [False, True])
def test_openai_responses(vlm: Host, by_id: bool, stream: bool) -> None:
    vlm.replies[:] = [*ROUNDS, ANSWER]
    items: list[Any] = [{"role": "user", "content": "Go."}]
    before: dict[str, Any] = {}
    with openai_client(vlm) as client:
        while True:
            asked = {"model": vlm.model, "tools": [{"type": "function", **FUNCTION}], "input": items}
            response = client.responses.create(**asked, **before, stream=stream)
            if stream:
                response = list(response)[-1].response
            calls = [item for item in response.output if item.type == "function_call"]
            if not calls:
                break
            results = [
                {"type": "function_call_output", "call_id": call.call_id, "output": double(call.arguments)}
                for call in calls
            ]
            if by_id:
                items, before = results, {"previous_response_id": response.id}
            else:
                items += [*response.output, *results]
    check(vlm, response.output_text)


@streamed_or_not
def test_anthropic_messages(vlm: Host, stream: bool) -> None:
    import anthropic

    vlm.replies[:] = [*ROUNDS, ANSWER]
    tools = [{"name": "double", "description": "Doubles it.", "input_schema": PARAMETERS}]
    messages: list[Any] = [{"role": "user", "content": "Go."}]
    asked: dict[str, Any] = {"model": vlm.model, "max_tokens": 999, "tools": tools, "messages": messages}
    with anthropic.Anthropic(base_url=vlm.address, api_key="none", max_retries=0) as client:
        while True:
            if stream:
                with client.messages.stream(**asked) as events:
                    message = events.get_final_message()
            else:
                message = client.messages.create(**asked)
            messages.append({"role": "assistant", "content": message.content})
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": str(2 * block.input["a"])}
                for block in message.content
                if block.type == "tool_use"
            ]
            if not results:
                break
            messages.append({"role": "user", "content": results})
    check(vlm, message.content[-1].text)


def test_openai_agents(vlm: Host) -> None:
    from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    @function_tool(name_override="double", description_override="Doubles it.")
    def doubled(a: int) -> str:
        return str(2 * a)

    set_tracing_disabled(True)
    vlm.replies[:] = [*ROUNDS, ANSWER]
    client = AsyncOpenAI(base_url=f"{vlm.address}/v1", api_key="none", max_retries=0)
    model = OpenAIResponsesModel(vlm.model, client)
    check(vlm, Runner.run_sync(Agent("m3", model=model, tools=[doubled]), "Go.").final_output)
