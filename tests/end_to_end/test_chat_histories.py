"""What goes back to M3: every protocol's history is the prompt that M3's template makes of the same turns."""

import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version

from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE
from tests.end_to_end.chat_cases import streamed_or_not
from tests.end_to_end.chat_hosts import Host
from tests.end_to_end.scripted_model import NS

IS_FLOOR = Version(version("mlx-vlm")) < Version("0.7")
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
        if f"{NS}</tool_call>" in turn:
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


def by_items(host: Host, stream: bool, turns: Sequence[str] = TURNS) -> None:
    items: list[Any] = [{"role": "user", "content": "Go."}]
    for host.reply in (*turns, LAST, "Bye."):
        response = ask_responses(host, stream, items)
        items += [*response["output"], *next_input(response)]


def by_id(host: Host, stream: bool, turns: Sequence[str] = TURNS) -> None:
    items: list[Any] = [{"role": "user", "content": "Go."}]
    before = {}
    for host.reply in (*turns, LAST, "Bye."):
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


def by_blocks(host: Host, stream: bool, turns: Sequence[str] = TURNS) -> None:
    messages: list[Any] = [{"role": "user", "content": "Go."}]
    for host.reply in (*turns, LAST, "Bye."):
        blocks = ask_messages(host, stream, messages)
        calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
        results = [
            {"type": "tool_result", "tool_use_id": id, "content": text}
            for id, text in zip(calls, ("one", "two"), strict=bool(calls))
        ]
        messages.append({"role": "assistant", "content": blocks})
        messages.append({"role": "user", "content": results or "And now?"})


def by_chat(host: Host, stream: bool, turns: Sequence[str] = TURNS) -> None:
    messages: list[Any] = [{"role": "user", "content": "Go."}]
    for host.reply in (*turns, LAST, "Bye."):
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


def check(host: Host, converse: Any, stream: bool, turns: Sequence[str] = TURNS) -> None:
    host.prompts.clear()
    converse(host, stream, turns)
    said = (*turns, LAST)
    assert host.prompts == [transcript(*said[:n]) for n in range(len(said) + 1)]


# --- the order of parts, and how they are joined ---


def turns_of(host: Host) -> str:
    """The prompt from the first question on."""
    return host.prompt.partition("]~b]user\n")[2]


def texts(*parts: str, kind: str = "text") -> list[dict[str, str]]:
    return [{"type": kind, "text": part} for part in parts]


def test_blocks_keep_their_order(vlm: Host) -> None:
    thought = {"type": "thinking", "thinking": "Why?", "signature": ""}
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t"}
    vlm.reply = "Yes."
    ask_messages(
        vlm,
        False,
        [
            {"role": "user", "content": texts(" Go", ".\n")},
            {
                "role": "assistant",
                "content": [
                    thought,
                    *texts("I ", "ask."),
                    use,
                ],
            },
            {"role": "user", "content": [{**result, "content": texts("o", "ne")}, *texts("Be ", "brief. ")]},
            {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, *texts("Done.")]},
            {"role": "user", "content": texts("Again")},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [*texts("So:"), {**result, "content": "one"}]},
        ],
    )
    call = f"{NS}<tool_call>\n{CALL % 1}{NS}</tool_call>[e~[\n"
    answer = "]~b]tool\n<response>one</response>[e~[\n"
    assert turns_of(vlm) == (
        f" Go.\n[e~[\n]~b]ai\n<mm:think>Why?</mm:think>I ask.{call}{answer}]~b]user\nBe brief. [e~[\n"
        f"]~b]ai\n</mm:think>Done.[e~[\n]~b]user\nAgain[e~[\n]~b]ai\n</mm:think>{call}"
        f"]~b]user\nSo:[e~[\n{answer}]~b]ai\n"
    )


def test_a_call_that_is_demanded_is_asked_for(vlm: Host) -> None:
    ask_messages(vlm, False, [{"role": "user", "content": texts("Go.")}], tool_choice={"type": "any"})
    asked_for = "You must call one or more of the available functions"
    assert (asked_for in vlm.prompt) == (not IS_FLOOR)


def test_items_are_whole_turns(vlm: Host) -> None:
    """Also what was thought in a reply that was cut off, and calls and texts in any order."""
    vlm.reply = "Yes."
    call = {"type": "function_call", "name": "f", "arguments": '{"a": 1}', "call_id": "t"}
    output = {"type": "function_call_output", "call_id": "t", "output": texts("o", "ne", kind="input_text")}
    thought = {"type": "reasoning", "summary": texts("Why?", kind="summary_text")}
    better = {**thought, "content": texts("Why ", "indeed?", kind="reasoning_text")}
    said = {"type": "message", "role": "assistant", "content": texts("I ", "ask.", kind="output_text")}
    ask_responses(
        vlm,
        False,
        [
            {"role": "user", "content": texts(" Go", ".\n", kind="input_text")},
            thought,
            {"role": "user", "content": "Now!"},
            better,
            call,
            said,
            output,
            said,
            thought,
            said,
            {"role": "user", "content": "Well?"},
        ],
        instructions="Be kind.",
    )
    block = f"{NS}<tool_call>\n{CALL % 1}{NS}</tool_call>[e~[\n"
    assert "]~b]developer\nBe kind.\n\n# Tools" in vlm.prompt
    assert turns_of(vlm) == (
        " Go.\n[e~[\n]~b]ai\n<mm:think>Why?</mm:think>[e~[\n]~b]user\nNow![e~[\n"
        f"]~b]ai\n<mm:think>Why indeed?</mm:think>I ask.{block}]~b]tool\n<response>one</response>[e~[\n"
        "]~b]ai\n</mm:think>I ask.[e~[\n]~b]ai\n<mm:think>Why?</mm:think>I ask.[e~[\n"
        "]~b]user\nWell?[e~[\n]~b]ai\n"
    )


def test_content_lists_of_chats(vlm: Host, lm: Host) -> None:
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said = {"role": "assistant", "content": texts(" I ", "ask. "), "reasoning_content": "Why?"}
    messages = [
        {"role": "user", "content": texts(" Go", ".\n")},
        said,
        {"role": "user", "content": texts("So", "?")},
        {**said, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t", "content": texts("o", "ne")},
    ]
    for host in (vlm, lm):
        host.reply = "Yes."
        ask_chat(host, False, messages)
        assert turns_of(host) == (
            " Go.\n[e~[\n]~b]ai\n<mm:think>Why?</mm:think> I ask. [e~[\n]~b]user\nSo?[e~[\n"
            f"]~b]ai\n<mm:think>Why?</mm:think> I ask. {NS}<tool_call>\n{CALL % 1}{NS}</tool_call>[e~[\n"
            "]~b]tool\n<response>one</response>[e~[\n]~b]ai\n"
        )


TWICE = json.dumps('{"a": 1}')
ARGUMENTS = {'{"a": 1}': CALL % 1, TWICE: CALL % 1, "null": "", "": "", '"null"': "", '""': ""}


def history_with(arguments: Any) -> list[Any]:
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"role": "tool", "tool_call_id": "t", "content": "one"}
    return [{"role": "user", "content": "Go."}, {"role": "assistant", "tool_calls": [call]}, answer]


def test_arguments_of_calls(vlm: Host, lm: Host) -> None:
    for host in (vlm, lm):
        host.reply = "Yes."
        for arguments, written in ARGUMENTS.items():
            ask_chat(host, False, history_with(arguments))
            assert (written or f'{NS}<invoke name="f">{NS}</invoke>\n') in turns_of(host)
        for arguments in ("[1]", "5", "{", '"x"', json.dumps("[1]")):
            complaint = host.refusal("/v1/chat/completions", {"messages": history_with(arguments)})
            assert "the arguments of the call of f are not a JSON object" in complaint


def test_arguments_of_calls_in_the_other_protocols(vlm: Host) -> None:
    for arguments, written in ARGUMENTS.items():
        call = {"type": "function_call", "name": "f", "arguments": arguments, "call_id": "t"}
        output = {"type": "function_call_output", "call_id": "t", "output": "one"}
        ask_responses(vlm, False, [{"role": "user", "content": "Go."}, call, output])
        assert (written or f'{NS}<invoke name="f">{NS}</invoke>\n') in turns_of(vlm)
    for body in (
        {"input": [{"type": "function_call", "name": "f", "arguments": "[1]", "call_id": "t"}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": [1]}]}]},
    ):
        path = "/v1/responses" if "input" in body else "/v1/messages"
        assert "are not a JSON object" in vlm.refusal(path, body)


# --- replies, streamed and not ---

SYNTAX = "Call <mm:thinks> and </tool_call>, <|x|>!"
Reply = tuple[str, str, str, int]
REPLIES: list[Reply] = [
    ("</mm:think>\n\nAnswer\n", "", "\n\nAnswer\n", 0),
    ("<mm:think>\n Why? \n</mm:think>  <b>Yes</b>\n\n", "\n Why? \n", "  <b>Yes</b>\n\n", 0),
    (f"<mm:think>Why?</mm:think>One <b>two</b>.{BLOCK}", "Why?", "One <b>two</b>.", 2),
    (f"</mm:think>\n\nOne.{BLOCK} Two.{BLOCK}\n\nThree.\n", "", "\n\nOne. Two.\n\nThree.\n", 4),
    (f"<mm:think>No {NS}<tool_call> yet.</mm:think>See {NS}.", f"No {NS}<tool_call> yet.", f"See {NS}.", 0),
    (f"</mm:think>{SYNTAX}", "", SYNTAX, 0),
    # Cut off in the second call.
    (f"</mm:think>One.{NS}<tool_call>\n{CALL % 1}{CALL[:40]}", "", f"One.\n{CALL[:40]}", 1),
]


def said_by_chat(host: Host, stream: bool) -> tuple[str, str, int]:
    message = ask_chat(host, stream, [{"role": "user", "content": "Go."}])
    return message.get("reasoning") or "", message["content"] or "", len(message.get("tool_calls") or ())


def said_by_items(host: Host, stream: bool) -> tuple[str, str, int]:
    body = {"input": "Go.", "tools": RESPONSES_TOOLS, "stream": stream}
    answer = host.post("/v1/responses", body)
    said = {"reasoning": "", "message": "", "function_call": 0}
    output = answer[-1]["response"]["output"] if stream else answer["output"]
    for item in output:
        parts = item.get("summary") or item.get("content") or ()
        is_call = item["type"] == "function_call"
        said[item["type"]] += 1 if is_call else "".join(part["text"] for part in parts)
    if stream and not IS_FLOOR:
        for name, kind in (("reasoning", "reasoning_text"), ("message", "output_text")):
            deltas = [event["delta"] for event in answer if event["type"] == f"response.{kind}.delta"]
            assert "".join(deltas) == said[name]
    return said["reasoning"], said["message"], said["function_call"]


def said_by_blocks(host: Host, stream: bool) -> tuple[str, str, int]:
    blocks = ask_messages(host, stream, [{"role": "user", "content": "Go."}])
    said = {kind: "".join(b.get(kind, "") for b in blocks) for kind in ("thinking", "text")}
    return said["thinking"], said["text"], sum(block["type"] == "tool_use" for block in blocks)


@streamed_or_not
@pytest.mark.parametrize("said", [said_by_chat, said_by_items, said_by_blocks])
def test_a_reply_is_the_same_streamed_or_not(vlm: Host, said: Any, stream: bool) -> None:
    for vlm.reply, *expected in REPLIES:
        if IS_FLOOR and said is said_by_chat and not stream and expected[2]:
            # mlx-vlm 0.6 takes tags and white space out of text beside calls.
            expected[1] = re.sub("<[^>]+>", "", expected[1]).strip()
        assert said(vlm, stream) == tuple(expected), vlm.reply


@pytest.mark.parametrize("converse", [by_items, by_id, by_blocks, by_chat])
def test_text_that_mentions_the_syntax_goes_back(vlm: Host, converse: Any) -> None:
    check(vlm, converse, False, [reply for reply, *_, calls in REPLIES if not calls])


@streamed_or_not
def test_a_reply_of_mlx_lm_is_the_same_streamed_or_not(lm: Host, stream: bool) -> None:
    for lm.reply, *expected in REPLIES:
        assert said_by_chat(lm, stream) == tuple(expected), lm.reply


def test_the_role_comes_once(lm: Host) -> None:
    """Clients add up what deltas say."""
    lm.reply = f"<mm:think>Why?</mm:think>One.{BLOCK}"
    body = {"messages": [{"role": "user", "content": "Go."}], "tools": TOOLS, "stream": True}
    for _ in range(2):
        events = lm.post("/v1/chat/completions", body)
        roles = ["role" in choice["delta"] for event in events for choice in event["choices"]]
        assert len(roles) > 3
        assert [n for n, has_role in enumerate(roles) if has_role] == [0]


@streamed_or_not
def test_stop_words_break_no_marker(lm: Host, stream: bool) -> None:
    lm.reply = f"<mm:think>Why?</mm:think>One.{BLOCK}"
    for word in ("]", "<]", "think", "minimax", "mm:", "[<"):
        message = ask_chat(lm, stream, [{"role": "user", "content": "Go."}], stop=[word])
        assert (message["reasoning"], message["content"], len(message["tool_calls"])) == ("Why?", "One.", 2)


@streamed_or_not
def test_a_character_that_is_cut(vlm: Host, lm: Host, stream: bool) -> None:
    for host, cut in ((vlm, "</mm:think>Wei\ufffd"), (lm, "</mm:think>Wei\N{OWL}")):
        host.reply, host.limit = cut, 3
        while len("".join(host.pieces())) < len(cut) and host is vlm:
            host.limit += 1
        if host is lm:
            host.limit = 5
        message = ask_chat(host, stream, [{"role": "user", "content": "Go."}])
        assert message["content"] == "Wei"
        host.limit = None


# --- summaries ---


@pytest.mark.skipif(IS_FLOOR, reason="mlx-vlm 0.6 has no compaction")
def test_a_summary_does_not_think(vlm: Host) -> None:
    """Although the client's own requests do: upstream asks for the summary in their words."""
    items = []
    for n in range(4):
        items.append({"role": "user", "content": f"{n}: {'Go on. ' * 200}"})
        items.append({"role": "assistant", "content": "Yes."})
    vlm.reply = "</mm:think>All went on."
    for asked in ({"thinking_mode": "enabled"}, {"chat_template_kwargs": {"reasoning_effort": "high"}}):
        body = {"input": items, "max_output_tokens": 64, "keep_tokens": 8, **asked}
        output = vlm.post("/v1/responses/compact", body)["output"]
        assert vlm.prompt.endswith("]~b]ai\n</mm:think>")
        assert [item["type"] for item in output] == ["compaction"]
        ask_responses(vlm, False, [*output, {"role": "user", "content": "Well?"}])
        assert "Conversation handoff:\nAll went on.[e~[" in vlm.prompt


# --- long conversations ---

LONG = [
    f"<mm:think>Thought {n}.</mm:think>{'Said.' if n % 3 else ''}"
    f"{NS}<tool_call>\n{CALL % n}{CALL % 5}{NS}</tool_call>"
    for n in range(100)
]


@pytest.mark.parametrize("converse", [by_chat, by_items, by_id, by_blocks])
def test_a_hundred_rounds(vlm: Host, converse: Any, count: Any) -> None:
    """Each prompt is the one before it, and what M3 wrote: so a prefix cache has all of it."""
    check(vlm, converse, False, LONG[: count(6, 100)])


def test_a_hundred_rounds_in_mlx_lm(lm: Host, count: Any) -> None:
    test_a_hundred_rounds(lm, by_chat, count)
