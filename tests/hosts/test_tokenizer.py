"""mlx-lm's tokenizer wrapper for M3: whatever a checkpoint's settings say, and for no other model."""

import copy
import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm import server
from mlx_lm.convert import convert
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE
from mlx_m3_plugin.hosts.mlx_lm import chat
from tests.chat.test_reply_cases import CASES, case_id, expected_calls, pieces_of, tools_of
from tests.chat.tool_rendering import marked
from tests.checkpoints.random_model import write_random_model
from tests.end_to_end.environments import here
from tests.hosts.native_mlx_lm import NATIVE

NS, THINK, END_OF_THINK = "]<]minimax[>[", "<mm:think>", "</mm:think>"
CALL = f'\n{NS}<invoke name="search">{NS}<query>mlx{NS}</query>{NS}</invoke>\n'
BLOCK = f"{NS}<tool_call>{CALL}{NS}</tool_call>"
BLOCK_OF_NONE = f'{NS}<tool_call>\n{NS}<invoke name="search">{NS}</invoke>\n{NS}</tool_call>'
PARSED = {"name": "search", "arguments": {"query": "mlx"}}
# From 0.32 on mlx-lm looks for markers in text, before in tokens.
ON_TEXT = hasattr(importlib.import_module("mlx_lm.generate"), "TextStateMachine")
only_on_text = pytest.mark.skipif(not ON_TEXT, reason="mlx-lm 0.31 looks for stop words in tokens")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading only."""
    directory = tmp_path_factory.mktemp("demo") / "m3"
    write_random_model(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> TokenizerWrapper:
    return load(demo)


@pytest.fixture
def checkpoint(demo: Path, tmp_path: Path) -> Path:
    """The same to be changed."""
    return Path(shutil.copytree(demo, tmp_path / "m3"))


def settings(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    """Of ``tokenizer_config.json``, after the changes."""
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return json.loads(file.read_text())


def run_script(script: str, *arguments: Any, **environ: str) -> Any:
    """What a script prints, as JSON, in a process of its own."""
    return json.loads(here().run("-c", script, *arguments, env=environ).stdout.splitlines()[-1])


def assert_speaks_m3(wrapper: TokenizerWrapper) -> None:
    assert wrapper.tool_parser(CALL, None) == PARSED
    assert (wrapper.tool_call_start, wrapper.tool_call_end) == (f"{NS}<tool_call>", f"{NS}</tool_call>")
    ids = wrapper.convert_tokens_to_ids
    assert wrapper.tool_call_start_tokens == (ids(NS), ids("<tool_call>"))
    assert wrapper.tool_call_end_tokens == (ids(NS), ids("</tool_call>"))
    # The vocabulary has ``<think>`` too, which stock would take.
    assert (wrapper.think_start, wrapper.think_end) == (THINK, END_OF_THINK)
    assert (wrapper.think_start_id, wrapper.think_end_id) == (ids(THINK), ids(END_OF_THINK))


# --- what checkpoints say ---


@pytest.mark.parametrize("named", [None, "json_tools", "minimax_m2", "minimax_m3"])
def test_a_parser_named_by_an_older_conversion_is_corrected(checkpoint: Path, named: str | None) -> None:
    settings(checkpoint, **{"tool_parser_type": named} if named else {})
    assert_speaks_m3(load(checkpoint))


def test_with_no_template_it_gets_ours(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    wrapper = load(checkpoint)
    assert wrapper.has_chat_template
    assert wrapper.chat_template == CHAT_TEMPLATE
    assert prompt(wrapper, [{"role": "user", "content": "Hello"}]).endswith("]~b]user\nHello[e~[\n]~b]ai\n")
    assert_speaks_m3(wrapper)


def test_with_a_template_it_keeps_it(checkpoint: Path) -> None:
    own = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(own)
    wrapper = load(checkpoint)
    assert wrapper.chat_template == own
    assert prompt(wrapper, [{"role": "user", "content": "Hello"}]) == "user: Hello\n"
    assert_speaks_m3(wrapper)


@pytest.mark.parametrize("named", [None, "json_tools"])
def test_a_conversion_names_no_parser_of_ours(checkpoint: Path, tmp_path: Path, named: str | None) -> None:
    settings(checkpoint, **{"tool_parser_type": named} if named else {})
    convert(str(checkpoint), str(tmp_path / "converted"))
    written = settings(tmp_path / "converted")
    assert written.get("tool_parser_type") == named
    assert "minimax_m3" not in json.dumps(written)
    assert_speaks_m3(load(tmp_path / "converted"))
    assert run_script(OPEN, tmp_path / "converted", MLX_M3_PLUGIN="off")["think"] == "<think>"


OPEN = """
import json, sys
from pathlib import Path
from mlx_lm.tokenizer_utils import load
print(json.dumps({"think": load(Path(sys.argv[1])).think_start}))
"""

LOAD_ALL = """
import inspect, json, sys
from mlx_lm import load
model, tokenizer, *_ = load(sys.argv[1])
parser = tokenizer.tool_parser
print(json.dumps([inspect.getfile(type(model)), parser(sys.argv[2], None), tokenizer.think_start]))
"""


def test_with_the_native_model_class(checkpoint: Path) -> None:
    settings(checkpoint, tool_parser_type="json_tools")
    file, parsed, think = run_script(LOAD_ALL, checkpoint, CALL, MLX_M3_PLUGIN_PREFER="native")
    assert ("mlx_m3_plugin" in file) == (NATIVE is None)
    assert (parsed, think) == (PARSED, THINK)


# --- prompts ---


def prompt(wrapper: TokenizerWrapper, messages: list[dict[str, Any]], **arguments: Any) -> str:
    return wrapper.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)


@pytest.mark.parametrize(
    ("arguments", "end", "mode"),
    [
        ({}, "", "adaptive"),
        ({"thinking_mode": "adaptive"}, "", "adaptive"),
        ({"thinking_mode": "enabled"}, THINK, "enabled"),
        ({"thinking_mode": "disabled"}, END_OF_THINK, "disabled"),
        ({"enable_thinking": True}, THINK, "enabled"),
        ({"enable_thinking": False}, END_OF_THINK, "disabled"),
        ({"enable_thinking": None}, "", "adaptive"),
        ({"thinking_mode": None, "enable_thinking": False}, END_OF_THINK, "disabled"),
        ({"thinking_mode": "adaptive", "enable_thinking": False}, "", "adaptive"),
    ],
)
def test_thinking_modes(tokenizer: TokenizerWrapper, arguments: dict[str, Any], end: str, mode: str) -> None:
    text = prompt(tokenizer, [{"role": "user", "content": "q"}], **arguments)
    assert text.endswith("]~b]ai\n" + end)
    assert f"Current thinking mode: {mode}." in text


def test_an_unknown_thinking_mode_is_an_error(tokenizer: TokenizerWrapper) -> None:
    with pytest.raises(
        ValueError, match="thinking_mode must be one of enabled, disabled, adaptive, not 'on'"
    ):
        prompt(tokenizer, [{"role": "user", "content": "q"}], thinking_mode="on")


@pytest.mark.parametrize(
    ("text", "arguments", "begins", "ends"),
    [
        ("q", {}, False, False),
        (f"What is {THINK}?", {}, False, False),
        (f"{END_OF_THINK} or {THINK}", {"thinking_mode": "disabled"}, False, True),
        (f"{THINK} or {END_OF_THINK}", {"thinking_mode": "enabled"}, True, False),
    ],
)
def test_only_the_end_of_a_prompt_says_that_a_reply_begins_in_reasoning(
    tokenizer: TokenizerWrapper, text: str, arguments: dict[str, Any], begins: bool, ends: bool
) -> None:
    messages = [{"role": "user", "content": text}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **arguments)
    last = len(tokens) - 1
    assert tokenizer.rfind_think_start(tokens) == (last if begins else -1)
    assert tokenizer.rfind_think_start(tokens, start=last - 10) == (last if begins else -1)
    assert tokenizer.rfind_think_end(tokens) == (last if ends else -1)


def conversation(**assistant: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "q"}, {"role": "assistant", **assistant}]


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "search", "arguments": arguments}}


@pytest.mark.parametrize(
    ("said", "rendered"),
    [
        ({"content": "b", "reasoning": "a"}, f"{THINK}a{END_OF_THINK}b"),
        ({"content": "b", "reasoning_content": "a"}, f"{THINK}a{END_OF_THINK}b"),
        ({"content": "b", "reasoning": "c", "reasoning_content": "a"}, f"{THINK}a{END_OF_THINK}b"),
        ({"content": "b", "reasoning": "a", "reasoning_content": None}, f"{THINK}a{END_OF_THINK}b"),
        ({"content": "b", "reasoning": None}, f"{END_OF_THINK}b"),
        ({"content": None, "tool_calls": [call({"query": "mlx"})]}, END_OF_THINK + BLOCK),
        ({"content": "", "tool_calls": [call('{"query": "mlx"}')]}, END_OF_THINK + BLOCK),
        ({"tool_calls": [call('{"query": "mlx"}')["function"]]}, END_OF_THINK + BLOCK),
        ({"tool_calls": [call("")]}, END_OF_THINK + BLOCK_OF_NONE),
        ({"tool_calls": [call(None)]}, END_OF_THINK + BLOCK_OF_NONE),
        ({"tool_calls": [call("null")]}, END_OF_THINK + BLOCK_OF_NONE),
        ({"tool_calls": [call(json.dumps('{"query": "mlx"}'))]}, END_OF_THINK + BLOCK),
    ],
)
def test_history_as_servers_get_it(tokenizer: TokenizerWrapper, said: dict[str, Any], rendered: str) -> None:
    messages = conversation(**said)
    before = copy.deepcopy(messages)
    assert prompt(tokenizer, messages).endswith(f"]~b]ai\n{rendered}[e~[\n]~b]ai\n")
    assert messages == before


@pytest.mark.parametrize("arguments", ['{"query": ', "[1]", "mlx", [1], 5])
def test_arguments_that_are_no_json_object_are_an_error(tokenizer: TokenizerWrapper, arguments: Any) -> None:
    with pytest.raises(ValueError, match="arguments of the call of search are not a JSON object: "):
        prompt(tokenizer, conversation(tool_calls=[call(arguments)]))


# --- replies, as the server takes them apart ---

Parts = list[tuple[str, str]]


class Request:
    def __init__(self, tools: Any = None) -> None:
        self.tools = tools


def taken_apart(
    wrapper: TokenizerWrapper,
    pieces: list[str],
    end: str = "stop",
    stop_words: tuple[str, ...] = (),
    **asked: Any,
) -> Parts:
    """What the server shows in each of its states.

    ``asked``: of the request, beside its tools.
    """
    replies = [response(piece) for piece in pieces]
    if end == "stop":
        replies.append(response("[e~[", end))
    else:
        replies[-1] = dataclasses.replace(replies[-1], finish_reason=end)
    context = SimpleNamespace(tool_parser=wrapper.tool_parser, prompt=asked.pop("prompt", []))
    generator = SimpleNamespace(model_provider=SimpleNamespace(tokenizer=wrapper))
    generate = chat.generate(server, lambda *_: (context, iter(replies)))
    request = Request(asked.pop("tools", None))
    handler = SimpleNamespace(body=asked)
    assert chat.completion_request(server, lambda _: request)(handler) is request
    arguments = SimpleNamespace(stop_words=stop_words, chat_template_kwargs=handler.chat_template_kwargs)
    _, responses = generate(generator, request, arguments)
    parts: Parts = []
    for state, text in _shown(responses):
        if text and parts and parts[-1][0] == state != "tool":
            parts[-1] = (state, parts[-1][1] + text)
        elif text:
            parts.append((state, text))
    return parts


def response(text: str, finish_reason: str | None = None) -> Any:
    fields = dict.fromkeys(field.name for field in dataclasses.fields(server.Response))
    if not ON_TEXT and finish_reason == "stop":
        text = ""
    return server.Response(**fields | {"text": text, "finish_reason": finish_reason})


def _shown(responses: Any) -> Parts:
    """As the server's loop reads them."""
    if not ON_TEXT:
        return [(one.state, one.text) for one in responses]
    machine = server.TextStateMachine
    state, parts = machine({"normal": []}).make_state(), []
    for one in responses:
        if one.finish_reason != "stop":
            state, segments = machine.split(state, one.text)
            parts += segments
    return parts


TOOL = ("tool", json.dumps(PARSED))
BLOCK_TOKENS = [NS, "<tool_call>", CALL, NS, "</tool_call>"]


@pytest.mark.parametrize(
    ("pieces", "parts"),
    [
        (["Hello"], [("normal", "Hello")]),
        ([THINK, "Hm", END_OF_THINK, "Hello"], [("reasoning", "Hm"), ("normal", "Hello")]),
        ([END_OF_THINK, "Hello"], [("normal", "Hello")]),
        (["Hello", *BLOCK_TOKENS], [("normal", "Hello"), TOOL]),
        # In the midst of reasoning, which goes on after it.
        ([THINK, "Hm", *BLOCK_TOKENS, "so"], [("reasoning", "Hm"), TOOL, ("reasoning", "so")]),
        # What is no call is text, and so is the namespace token without a block.
        (["Hel", NS, "lo"], [("normal", f"Hel{NS}lo")]),
        ([THINK, "H", NS, "m"], [("reasoning", f"H{NS}m")]),
        (["x", NS], [("normal", f"x{NS}")]),
        (["x", NS, "<tool_call>", "no"], [("normal", f"x{NS}<tool_call>no")]),
        (["x", NS, "<tool_call>", CALL[:60]], [("normal", f"x{NS}<tool_call>{CALL[:60]}")]),
        # What a marker may begin with is no marker.
        (["a[0", "]"], [("normal", "a[0]")]),
        (["x ", "<", "mm"], [("normal", "x <mm")]),
        ([THINK, "a[0", "]", END_OF_THINK, "[", "]"], [("reasoning", "a[0]"), ("normal", "[]")]),
    ],
)
@pytest.mark.parametrize("end", ["stop", "length"])
def test_a_reply_taken_apart(tokenizer: TokenizerWrapper, pieces: list[str], parts: Parts, end: str) -> None:
    assert taken_apart(tokenizer, pieces, end) == parts


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_faults_that_m3_writes(tokenizer: TokenizerWrapper, case: dict[str, Any]) -> None:
    for pieces in pieces_of(case["text"]):
        for end in ("stop", "length"):
            parts = taken_apart(tokenizer, pieces, end, tools=tools_of(case))
            calls = [json.loads(text) for state, text in parts if state == "tool"]
            check_case(case, [[call["name"], call["arguments"]] for call in calls], parts)


def check_case(case: dict[str, Any], calls: list[Any], parts: Parts) -> None:
    said = {name: "".join(text for state, text in parts if state == name) for name in ("reasoning", "normal")}
    assert calls == expected_calls(case)
    assert said["reasoning"] == case["reasoning"]
    assert said["normal"].strip() == marked(case["content"]).strip()


def test_a_prompt_may_end_in_white_space(tokenizer: TokenizerWrapper) -> None:
    for blanks in ("", "\n", " \n"):
        tokens = tokenizer.encode(f"ai{THINK}{blanks}", add_special_tokens=False)
        assert tokenizer.rfind_think_start(tokens) == tokens.index(tokenizer.think_start_id)
        assert taken_apart(tokenizer, ["Hm"], prompt=tokens) == [("reasoning", "Hm")]
    assert taken_apart(tokenizer, ["Hm"], prompt=[*tokens, tokenizer.think_end_id]) == [("normal", "Hm")]


def test_tool_choice_none(tokenizer: TokenizerWrapper) -> None:
    whole = "".join(BLOCK_TOKENS)
    assert taken_apart(tokenizer, BLOCK_TOKENS, tool_choice="none") == [("normal", whole)]
    assert taken_apart(tokenizer, BLOCK_TOKENS, tool_choice="auto") == [TOOL]


def test_a_call_is_sent_when_its_invoke_closes(tokenizer: TokenizerWrapper) -> None:
    """With the responses that come after it still to come."""
    pieces = iter([response(piece) for piece in [NS, "<tool_call>", CALL.strip()]])

    def replies() -> Any:
        yield from pieces
        yield response("\n")
        raise AssertionError("the call was not sent")

    context = SimpleNamespace(tool_parser=tokenizer.tool_parser, prompt=[])
    generator = SimpleNamespace(model_provider=SimpleNamespace(tokenizer=tokenizer))
    generate = chat.generate(server, lambda *_: (context, replies()))
    _, responses = generate(generator, SimpleNamespace(tools=None), SimpleNamespace(stop_words=[]))
    found: Parts = []
    while TOOL not in found:
        found += _shown([next(responses)])


@only_on_text
@pytest.mark.parametrize("word", ["]then", "END", "]<]minimax[>[x"])
def test_a_stop_word_is_found_in_pieces(tokenizer: TokenizerWrapper, word: str) -> None:
    for cut in range(1, len(word)):
        pieces = ["Hello ]<", word[:cut], word[cut:]]
        assert taken_apart(tokenizer, pieces, stop_words=(word,)) == [("normal", "Hello ]<")]


def test_the_servers_formatter_reads_the_parts(tokenizer: TokenizerWrapper) -> None:
    formatter = server.ToolCallFormatter(tokenizer.tool_parser, None)
    (made,) = formatter([text for state, text in taken_apart(tokenizer, BLOCK_TOKENS) if state == "tool"])
    assert made["function"]["name"] == "search"
    assert json.loads(made["function"]["arguments"]) == PARSED["arguments"]


# --- other models ---

OTHER_MODEL = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from mlx_lm import server
from mlx_lm.tokenizer_utils import load

wrapper = load(Path(sys.argv[1]))
messages = json.loads(sys.argv[2])
seen = {"class": [(c.__module__, c.__name__) for c in type(wrapper).__mro__]}
seen |= {name: str(getattr(wrapper, name)) for name in sys.argv[3].split() if hasattr(wrapper, name)}
seen["parser"] = wrapper.tool_parser and wrapper.tool_parser.__module__
for arguments in ({}, {"enable_thinking": False}, {"thinking_mode": sys.argv[6]}, {"tokenize": False}):
    prompt = wrapper.apply_chat_template(messages, add_generation_prompt=True, **arguments)
    seen[str(arguments)] = prompt
tokens = wrapper.apply_chat_template(messages, add_generation_prompt=True)
seen["found"] = [wrapper.rfind_think_start(tokens), wrapper.rfind_think_end(tokens)]
fake = SimpleNamespace(_state_machine_cache={})
machine = server.ResponseGenerator._make_state_machine(fake, "model", wrapper, ["]then"])
machine = next(m for m in machine if hasattr(m, "make_state"))
state, seen["told"] = machine.make_state(), []
for token in wrapper.encode(sys.argv[4], add_special_tokens=False):
    if hasattr(machine, "split"):
        state, told = machine.split(state, wrapper.decode([token]))
    else:
        state, *told = machine.match(state, token)
    seen["told"].append(told)
if hasattr(machine, "flush"):
    seen["flushed"] = machine.flush(state)[1:]
wrapper.save_pretrained(sys.argv[5])
seen["saved"] = json.loads((Path(sys.argv[5]) / "tokenizer_config.json").read_text())
print(json.dumps(seen))
"""
ATTRIBUTES = """think_start think_end think_start_tokens think_end_tokens chat_template has_chat_template
tool_call_start tool_call_end tool_call_start_tokens tool_call_end_tokens structural_markers eos_token_ids"""
# As Qwen's, in short.
OTHER_TEMPLATE = """{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ m.reasoning }}
{%- for call in m.tool_calls or [] %}{%- set tool_call = call.function %}
<tool_call>{"name": {{ tool_call.name }}, "arguments": {{ tool_call.arguments }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}{{ '<|im_start|>assistant\n' }}{{ '<think>\n' if enable_thinking else '' }}"""


def seen(checkpoint: Path, mode: str, **environ: str) -> dict[str, Any]:
    calls = [call("{}"), call("no JSON")] if mode == "on" else []
    messages = json.dumps(conversation(content=f"{THINK}b", reasoning="a", tool_calls=calls))
    reply = f"<think>Hm {NS}</think>[0] {NS}<tool_call>{CALL}</tool_call> {THINK} ] {NS}"
    saved = checkpoint.parent / "saved"
    return run_script(OTHER_MODEL, checkpoint, messages, ATTRIBUTES, reply, saved, mode, **environ)


def test_other_models_are_served_as_without_us(checkpoint: Path) -> None:
    """M3's vocabulary without M3's markers, with a template and a conversation that M3 has not."""
    file = checkpoint / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("mm:think>", "some>").replace(NS, "<some>"), encoding="utf-8")
    (checkpoint / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    with_us = seen(checkpoint, "on")
    assert (with_us["think_start"], with_us["parser"]) == ("<think>", "mlx_lm.tool_parsers.json_tools")
    assert with_us == seen(checkpoint, "on", MLX_M3_PLUGIN="off")


def test_what_is_compared_of_other_models_would_show_us(checkpoint: Path) -> None:
    with_us, stock = seen(checkpoint, "disabled"), seen(checkpoint, "disabled", MLX_M3_PLUGIN="off")
    different = {name for name in with_us if with_us[name] != stock.get(name)}
    assert different >= {"class", "think_start", "tool_call_start", "parser", "told"}
