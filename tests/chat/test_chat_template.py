"""The chat template against the rendering rules of MiniMax-M3's own."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE

NS = "]<]minimax[>["
IDENTITY = (
    "Your model version is MiniMax-M3, developed by MiniMax. Knowledge cutoff: January 2026. Founded in "
    "early 2022, MiniMax is a global AI foundation model company committed to advancing the frontiers of AI "
    "towards AGI."
)


def render(messages: list[dict[str, Any]], **kwargs: Any) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=CHAT_TEMPLATE, **kwargs)
    return rendered[0]


def body(messages: list[dict[str, Any]], **kwargs: Any) -> str:
    """What follows the system and developer blocks, which are always there."""
    return render(messages, **kwargs).split("[e~[\n", 2)[2]


def assistant(**message: Any) -> str:
    return body([{"role": "user", "content": "q"}, {"role": "assistant", **message}]).split("]~b]ai\n")[1]


def test_the_smallest_prompt_is_complete():
    assert render([{"role": "user", "content": "Hello"}], add_generation_prompt=True) == (
        f"]~!b[]~b]system\n{IDENTITY}\n\n<thinking_instructions>\n"
        "You have a thinking capability that allows you to reason step by step before responding. When "
        "thinking is enabled, wrap your reasoning in <mm:think></mm:think> tags before your response. When "
        "thinking is disabled, begin your response directly after the </mm:think> prefix. When thinking is "
        "adaptive, decide on your own whether to think for the current turn.\n"
        "Current thinking mode: adaptive. You are encouraged to think for complex decision-making, "
        "multi-step reasoning, or when analyzing function/tool results.\n"
        "</thinking_instructions>[e~[\n]~b]developer\nYou are a helpful assistant.[e~[\n"
        "]~b]user\nHello[e~[\n]~b]ai\n"
    )


@pytest.mark.parametrize(
    ("mode", "line", "prefix"),
    [
        ("enabled", "Current thinking mode: enabled. You MUST think", "<mm:think>"),
        ("disabled", "Current thinking mode: disabled. Do not output", "</mm:think>"),
        ("adaptive", "Current thinking mode: adaptive. You are encouraged", ""),
        ("something else", None, ""),
    ],
)
def test_the_thinking_mode_sets_its_line_and_the_start_of_the_reply(mode, line, prefix):
    prompt = render([{"role": "user", "content": "q"}], add_generation_prompt=True, thinking_mode=mode)
    assert prompt.endswith("]~b]ai\n" + prefix)
    assert (line in prompt) if line else ("Current thinking mode" not in prompt)


def test_enable_thinking_is_not_a_variable_of_this_template():
    messages = [{"role": "user", "content": "q"}]
    assert render(messages, enable_thinking=True) == render(messages)


def test_a_system_message_goes_to_the_developer_block_and_root_to_the_system_block():
    prompt = render(
        [
            {"role": "root", "content": "I am root."},
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "q"},
            {"role": "system", "content": "dropped"},
        ]
    )
    assert prompt.startswith("]~!b[]~b]system\nI am root.\n\n<thinking_instructions>")
    assert "]~b]developer\nBe brief.[e~[\n]~b]user\nq[e~[\n" in prompt
    assert "dropped" not in prompt


def test_model_identity_replaces_the_default_developer_text():
    prompt = render([{"role": "user", "content": "q"}], model_identity="You are a parrot.")
    assert "]~b]developer\nYou are a parrot.[e~[\n" in prompt


def test_list_content_is_joined_without_separators_and_media_become_their_token():
    content = [{"type": "text", "text": "a"}, {"type": "image"}, "b", {"type": "video"}, {"type": "audio"}]
    assert body([{"role": "user", "content": content}]) == "]~b]user\na]<]image[>[b]<]video[>[[e~[\n"


def test_reasoning_is_kept_for_every_turn_and_an_empty_one_is_a_bare_closer():
    assert assistant(content="hi") == "</mm:think>hi[e~[\n"
    assert assistant(content="hi", reasoning_content="why") == "<mm:think>why</mm:think>hi[e~[\n"
    assert assistant(content="<mm:think>\nwhy\n</mm:think>\n\nhi") == "<mm:think>why</mm:think>hi[e~[\n"
    assert assistant(content=None) == "</mm:think>[e~[\n"


def test_tool_arguments_of_every_kind():
    arguments = {
        "a": 1,
        "b": 1.5,
        "c": True,
        "d": None,
        "e": "x<y>\n",
        "g": {"h": [1, {"i": "j"}, [2, 3]]},
        "l": [],
        "n": [None, "z"],
    }
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    expected = (
        "</mm:think>text§<tool_call>\n"
        '§<invoke name="f">§<a>1§</a>§<b>1.5§</b>§<c>true§</c>§<e>x<y>\n§</e>'
        "§<g>§<h>§<item>1§</item>§<item>§<i>j§</i>§</item>§<item>§<item>2§</item>§<item>3§</item>§</item>§</h>§</g>"
        "§<l>§</l>§<n>§<item>§</item>§<item>z§</item>§</n>§</invoke>\n§</tool_call>[e~[\n"
    )
    assert assistant(content="text", tool_calls=[call]).replace(NS, "§") == expected
    assert assistant(content="text", tool_calls=[call["function"]]).replace(NS, "§") == expected


def test_arguments_that_are_still_json_text_are_refused():
    with pytest.raises(Exception, match="items"):
        assistant(content="", tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1}'}}])


def test_tool_results_share_one_block():
    call = {"function": {"name": "f", "arguments": {}}}
    rendered = body(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call, call]},
            {"role": "tool", "content": "one"},
            {"role": "tool", "content": [{"output": "two"}, {"type": "image"}]},
            {"role": "user", "content": "go on"},
        ]
    )
    assert (
        "]~b]tool\n<response>one</response>\n<response>two]<]image[>[</response>[e~[\n]~b]user\ngo on[e~[\n"
        in rendered
    )


def test_a_tool_result_without_a_call_is_refused():
    with pytest.raises(Exception, match="tool_calls"):
        body([{"role": "user", "content": "q"}, {"role": "tool", "content": "r"}])


def test_tools_are_listed_as_given():
    tool = {"type": "function", "function": {"name": "wetter", "description": "für Köln", "b": 1, "a": 2}}
    prompt = render([{"role": "user", "content": "q"}], tools=[tool]).replace(NS, "§")
    assert (
        "You are a helpful assistant.\n\n# Tools\n"
        "You may call one or more tools to assist with the user query.\n"
        "Here are the tools available in JSONSchema format:\n\n<tools>\n"
        '<tool>{"name": "wetter", "description": "für Köln", "b": 1, "a": 2}</tool>\n</tools>\n\n'
        "To call tools, wrap all invocations in a single §<tool_call>§</tool_call> block. Parameter values "
        "containing nested objects or arrays are recursively expanded into XML elements. Example:\n"
        "\n§<tool_call>\n"
        '§<invoke name="tool-name-1">§<param-1>value-1§</param-1>§<param-2>§<item>§<key-a>val-a§</key-a>'
        "§<key-b>val-b§</key-b>§</item>§</param-2>§</invoke>\n"
        '§<invoke name="tool-name-2">§<param-1>value-1§</param-1>§</invoke>\n'
        "§</tool_call>[e~[\n"
    ) in prompt
