"""mlx-vlm's own functions on replies of M3, and on everything that is not M3's."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_vlm.server import responses_state
from mlx_vlm.utils import ThinkingBudgetCriteria
from packaging.version import Version

from mlx_m3_plugin.chat import tool_calls
from mlx_m3_plugin.chat.markers import THINK_END, THINK_START
from mlx_m3_plugin.hosts.mlx_vlm.prompts import _InTheirOrder
from mlx_m3_plugin.hosts.mlx_vlm.replies import _rewriter, _RewrittenTokens
from mlx_m3_plugin.hosts.mlx_vlm.requests import arguments_of
from tests.chat.test_reply_cases import CASES, case_id, expected_calls, pieces_of, tools_of
from tests.chat.tool_rendering import marked
from tests.chat.tool_replies import MARKERS, sample
from tests.checkpoints.random_model import write_random_model
from tests.end_to_end.environments import here

HAS_BUDGETS = Version(version("mlx-vlm")) >= Version("0.7")
M3 = (THINK_START, THINK_END)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
Said = tuple[str, str, list[tuple[str, Any]]]


@dataclass
class Token:
    """As the server's, as far as replies go."""

    text: str
    finish_reason: str | None = None
    token_count: int = 1


def rewritten(
    pieces: list[str], in_reasoning: bool, ends: bool = True, tools: list[Any] | None = None
) -> list[str]:
    tokens = [Token(piece) for piece in pieces]
    tokens[-1].finish_reason = "stop" if ends else None
    prompt = "]~b]ai\n" + (THINK_START if in_reasoning else "")
    rewriter = _rewriter(prompt, SimpleNamespace(tools=tools or TOOLS))
    return [token.text for token in _RewrittenTokens(iter(tokens), rewriter)]


def calls_in(text: str) -> tuple[list[tuple[str, Any]], str]:
    found: Any = responses_state.process_tool_calls(text, tool_calls, TOOLS)
    found = found if isinstance(found, dict) else vars(found)
    made, rest = found["calls"], found["remaining_text"]
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in made], rest


def whole(text: str) -> Said:
    """What ``chat/completions`` says of a whole reply."""
    reasoning, content = responses_state._split_thinking(text, *M3)
    calls, rest = calls_in(text)
    if calls:
        content = responses_state._split_thinking(rest, *M3)[1]
    return reasoning or "", content, calls


def streamed(pieces: list[str]) -> Said:
    """And of one that streams."""
    state, said = responses_state.ThinkingStreamState(False, *M3), {"reasoning": "", "content": ""}
    blocks = _BlocksTakenOut()
    for piece in pieces:
        delta = state.feed(piece)
        said["reasoning"] += delta.reasoning or ""
        said["content"] += blocks.feed(piece, delta.content) or ""
    said["content"] += blocks.finish() or ""
    return said["reasoning"], said["content"], calls_in("".join(pieces))[0]


class _BlocksTakenOut:
    """By whichever of its ways the installed version has."""

    def __init__(self) -> None:
        self.full, self.in_call = "", False
        if hasattr(responses_state, "ToolCallStreamState"):
            markers = tool_calls.tool_call_start, tool_calls.tool_call_end
            self.state = responses_state.ToolCallStreamState(*markers)

    def feed(self, raw: str, content: str | None) -> str | None:
        if hasattr(self, "state"):
            return self.state.feed(content)
        self.full += raw
        suppress = responses_state.suppress_tool_call_content
        self.in_call, shown = suppress(self.full, self.in_call, tool_calls.tool_call_start, content)
        return shown

    def finish(self) -> str | None:
        return self.state.feed(None, last=True) if hasattr(self, "state") else None


def words(text: str) -> list[str]:
    """Its pieces; spaces between them may be anywhere."""
    return text.split()


def test_what_servers_say_of_random_replies(count: Callable[[int, int], int], fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(count(300, 3000)):
        made = sample(rng)
        cuts = sorted(rng.choices(range(len(made.text) + 1), k=rng.randint(0, 12)))
        pieces = [made.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(made.text)], strict=True)]
        told = rewritten(pieces, made.in_reasoning, ends=rng.random() < 0.8)
        expected = [(call.name.strip(), call.arguments) for call in made.says.calls]
        for reasoning, content, calls in (whole("".join(told)), streamed(told)):
            assert "".join(words(reasoning)) == "".join(words(made.says.reasoning)), made.text
            assert "".join(words(content)) == "".join(words(made.says.content)), made.text
            assert calls == expected, made.text


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_faults_that_m3_writes(case: dict[str, Any]) -> None:
    for pieces in pieces_of(case["text"]):
        shown = rewritten(pieces, False, tools=tools_of(case))
        for reasoning, content, calls in (whole("".join(shown)), streamed(shown)):
            assert list(map(list, calls)) == expected_calls(case)
            assert reasoning == case["reasoning"]
            assert content.strip() == marked(case["content"]).strip()


def test_content_and_reasoning_are_exact() -> None:
    text = "<mm:think>\n why \n</mm:think>\n\n <think>hi</think> "
    told = rewritten([text], False)
    assert whole("".join(told)) == ("\n why \n", "\n\n <think>hi</think> ", [])
    reasoning, content, _ = streamed(told)
    assert (reasoning, content.strip()) == ("\n why \n", "<think>hi</think>")


# --- arguments ---


@dataclass
class Arguments:
    """Of mlx-vlm's, what M3's are made from."""

    enable_thinking: bool = False
    thinking_budget: int | None = None
    thinking_start_token: str | None = None
    thinking_end_token: str | None = None
    skip_special_tokens: bool = True
    logits_processors: Any = None
    reasoning: bool | None = None

    def to_template_kwargs(self) -> dict[str, Any]:
        return {"enable_thinking": self.enable_thinking}


@pytest.mark.parametrize(
    ("request_fields", "made", "mode"),
    [
        ({}, {}, "adaptive"),
        ({}, {"enable_thinking": True}, "enabled"),
        ({"enable_thinking": False}, {"enable_thinking": True}, "disabled"),
        ({"thinking_mode": "adaptive"}, {"enable_thinking": True}, "adaptive"),
        ({"reasoning": {"effort": "none"}}, {}, "disabled"),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True}, "adaptive"),
    ],
)
def test_arguments(request_fields: dict[str, Any], made: dict[str, Any], mode: str) -> None:
    request = SimpleNamespace(**request_fields, model_fields_set=set(request_fields))
    arguments = arguments_of(Arguments(**made), request)
    assert arguments.to_template_kwargs()["thinking_mode"] == mode
    assert arguments.enable_thinking is (mode != "disabled")
    assert (arguments.thinking_start_token, arguments.thinking_end_token) == M3
    assert arguments.skip_special_tokens is False


def test_other_template_arguments_reach_the_template() -> None:
    extra = {"chat_template_kwargs": {"model_identity": "You are a parrot.", "enable_thinking": True}}
    request = SimpleNamespace(**extra, model_fields_set=set(extra))
    kwargs = arguments_of(Arguments(), request).to_template_kwargs()
    assert kwargs["model_identity"] == "You are a parrot."
    assert kwargs["thinking_mode"] == "enabled"


# --- prompts ---


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "m3"
    write_random_model(directory, vision=True)
    return directory


@pytest.fixture(scope="module")
def processor(demo: Path) -> Any:
    # As ``load`` does.
    import_module("mlx_vlm.models.minimax_m3_vl")
    from mlx_vlm.utils import load_processor

    return load_processor(demo)


CONFIG = {"model_type": "minimax_m3_vl"}


def prompt(processor: Any, messages: Any, **kwargs: Any) -> str:
    from mlx_vlm.prompt_utils import apply_chat_template

    return apply_chat_template(processor, CONFIG, messages, **kwargs)


def test_a_history_keeps_its_reasoning(processor: Any) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b", "reasoning_content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "d", "reasoning": "\nc\n"},
        {"role": "user", "content": "s"},
    ]
    rendered = prompt(processor, messages)
    assert f"]~b]ai\n{THINK_START}a{THINK_END}b[e~[" in rendered
    assert f"]~b]ai\n{THINK_START}\nc\n{THINK_END}d[e~[" in rendered


def test_tools_are_rendered_in_their_order(processor: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d", "b": 1, "a": 2}}
    assert '<tool>{"name": "f", "description": "d", "b": 1, "a": 2}</tool>' in prompt(
        processor, [{"role": "user", "content": "q"}], tools=[tool]
    )
    assert list(_InTheirOrder([tool])) == [tool]


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        ({}, ""),
        ({"enable_thinking": False}, ""),
        ({"enable_thinking": True}, THINK_START),
        ({"thinking_mode": "disabled"}, THINK_END),
        ({"thinking_mode": "adaptive", "enable_thinking": True}, ""),
    ],
)
def test_thinking_modes(processor: Any, arguments: dict[str, Any], end: str) -> None:
    """The commands say ``enable_thinking=False`` when nobody has said anything."""
    assert prompt(processor, "q", **arguments).endswith("]~b]ai\n" + end)


def test_an_unknown_thinking_mode_is_an_error(processor: Any) -> None:
    with pytest.raises(ValueError, match="thinking_mode must be one of"):
        prompt(processor, "q", thinking_mode="on")


def test_with_no_template_it_gets_ours(demo: Path, processor: Any, tmp_path: Path) -> None:
    from mlx_vlm.utils import load_processor

    directory = Path(shutil.copytree(demo, tmp_path / "m3"))
    (directory / "chat_template.jinja").unlink()
    assert prompt(load_processor(directory), "q").endswith("]~b]user\nq[e~[\n]~b]ai\n")
    own = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}"
    (directory / "chat_template.jinja").write_text(own)
    with_own = load_processor(directory)
    assert prompt(with_own, "q") == "user: q\n"
    assert parser_of(with_own) == "minimax_m3"


def parser_of(processor: Any) -> str | None:
    try:
        from mlx_vlm.tools.registry import _infer_tool_parser_from_processor
    except ModuleNotFoundError:
        from mlx_vlm.tool_parsers import _infer_tool_parser_from_processor
    return _infer_tool_parser_from_processor(processor)


# --- texts ---


@pytest.mark.parametrize("text", ["ab c\ufffd", "\ufffd", "a\ufffd b\ufffd", "x \U0001f600", "x y"])
def test_a_text_keeps_its_end(processor: Any, text: str) -> None:
    """Of a character that is cut off, U+FFFD is left, as in transformers and mlx-lm."""
    from mlx_vlm.tokenizer_utils import make_streaming_detokenizer

    tokenizer = processor.tokenizer
    tokens = tokenizer.encode(text, add_special_tokens=False)
    for end in range(1, len(tokens) + 1):
        detokenizer, said = make_streaming_detokenizer(processor), ""
        for token in tokens[:end]:
            detokenizer.add_token(token)
            said += detokenizer.last_segment
        detokenizer.finalize()
        assert said + detokenizer.last_segment == tokenizer.decode(tokens[:end])


# --- budgets ---


@pytest.mark.skipif(not HAS_BUDGETS, reason="mlx-vlm 0.6 cannot tell whether a prompt opens reasoning")
@pytest.mark.parametrize("enabled", [True, False])
def test_a_thinking_budget_of_the_command_line(processor: Any, enabled: bool) -> None:
    """Given with the markers of other models, and with ``--enable-thinking`` or without."""
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = tokenizer.convert_tokens_to_ids
    criteria = ThinkingBudgetCriteria(tokenizer, 2, "</think>", "<think>", enabled)
    said = [] if enabled else [ids(THINK_START)]
    forced = [criteria(token) for token in [*said, 1, 2, 3, 4]]
    assert forced[-1] == ids(THINK_END)
    assert not any(forced[:-2])
    # Nothing is counted where nothing is thought.
    assert not any(map(ThinkingBudgetCriteria(tokenizer, 2, "</think>", "<think>", False), range(1, 9)))


# --- other models ---

OTHERS = """
import json, random, sys
from types import SimpleNamespace
sys.modules["torch"] = None
from mlx_vlm.server import app, openai, responses_state
from mlx_vlm import prompt_utils
from mlx_vlm.utils import ThinkingBudgetCriteria
from transformers import AutoTokenizer

rng, seen = random.Random(5), []
pieces = ["<think>", "</think>", "<mm:think>", "</mm:think>", "]<]minimax[>[", "Hm", "\\n", " ", "]", "<"]
pieces += ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": 1}}', "<channel|>"]
json_tools = SimpleNamespace(
    __name__="json_tools", tool_call_start="<tool_call>", tool_call_end="</tool_call>",
    parse_tool_call=lambda text, tools: json.loads(text),
)
for _ in range(300):
    text = [rng.choice(pieces) for _ in range(rng.randint(1, 9))]
    for markers in ((None, None), ("<think>", "</think>")):
        state = responses_state.ThinkingStreamState(rng.random() < 0.5, *markers)
        seen.append([vars(state.feed(piece)) for piece in text])
        seen.append(responses_state._split_thinking("".join(text), *markers))
    found = responses_state.process_tool_calls("".join(text), json_tools, [])
    made = found["calls"] if isinstance(found, dict) else found.calls
    seen.append([call["function"] for call in made])
    if hasattr(responses_state, "suppress_tool_call_content"):
        seen.append(responses_state.suppress_tool_call_content("".join(text), False, "<tool_call>", "Hm"))
    if hasattr(openai, "ToolCallDeltaState"):
        try:
            deltas = openai.ToolCallDeltaState(json_tools, [1]).feed("".join(text))
            seen.append([delta["function"] for delta in deltas])
        except Exception as error:
            seen.append(repr(error))

processor = AutoTokenizer.from_pretrained(sys.argv[1])
tools = [{"type": "function", "function": {"name": "f", "b": 1, "a": 2}}]
call = {"function": {"name": "f", "arguments": "no JSON"}}
messages = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "<mm:think>b", "reasoning": "a"},
    {"role": "assistant", "tool_calls": [call]},
][: int(sys.argv[2])]
for kwargs in ({}, {"enable_thinking": True}, {"tools": tools}, {"thinking_mode": "enabled"}):
    seen.append(prompt_utils.apply_chat_template(processor, {"model_type": sys.argv[3]}, messages, **kwargs))
request = openai.ChatRequest(model="m", messages=messages[:1], chat_template_kwargs={"model_id": "x"})
request.thinking_mode = "enabled"
arguments = openai._build_gen_args(request, processor)
seen.append([type(arguments).__mro__[0].__qualname__, vars(arguments), arguments.to_template_kwargs()])
seen.append(openai._count_thinking_tag_tokens("<think></think><mm:think></mm:think>"))
seen.append(vars(ThinkingBudgetCriteria(processor, 5, "</think>", "<think>", True)))
seen[-1].pop("tokenizer")

seen.append(str(prompt_utils.get_chat_template(processor, messages[:2], True, tools=tools)))
print(json.dumps(seen, default=str))
"""


def seen(checkpoint: Path, messages: int = 3, model_type: str = "qwen2_vl", **environ: str) -> Any:
    done = here().run("-c", OTHERS, checkpoint, str(messages), model_type, env=environ)
    return json.loads(done.stdout.splitlines()[-1])


def test_other_models_are_served_as_without_us(demo: Path, tmp_path: Path) -> None:
    from tests.hosts.test_tokenizer import OTHER_TEMPLATE

    directory = Path(shutil.copytree(demo, tmp_path / "other"))
    file = directory / "tokenizer.json"
    text = file.read_text(encoding="utf-8").replace("mm:think>", "some>").replace(MARKERS[2], "<some>")
    file.write_text(text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    with_us, without = seen(directory), seen(directory, MLX_M3_PLUGIN="off")
    assert len(with_us) > 1500
    for one, other in zip(with_us, without, strict=True):
        assert one == other


def test_what_is_compared_of_other_models_would_show_us(demo: Path) -> None:
    assert seen(demo, 2, "minimax_m3_vl") != seen(demo, 2, "minimax_m3_vl", MLX_M3_PLUGIN="off")
