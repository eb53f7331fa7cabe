"""Patches of third-party servers, on stand-ins for the modules that they need.

``tests/third_party`` runs the servers themselves.
"""

import asyncio
import copy
import json
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as upstream
from mlx_lm.utils import load_model

from mlx_m3_plugin.chat.markers import NAMESPACE as N
from mlx_m3_plugin.chat.markers import THINK_END, THINK_START
from mlx_m3_plugin.hosts import patching
from mlx_m3_plugin.hosts.third_party import exo, mlx_openai_server, rapid_mlx, vllm_mlx, vmlx
from mlx_m3_plugin.startup import hook
from tests.end_to_end.environments import here
from tests.hosts.upstream_copies import apply

CHECKPOINT = Path(__file__).parents[1] / "golden" / "as_published"
HOSTS = (vllm_mlx, rapid_mlx, mlx_openai_server, vmlx, exo)
PATCHES = [patch for host in HOSTS for patch in host.PATCHES]
BLOCK = f'{N}<tool_call>\n{N}<invoke name="f">{N}<n>3{N}</n>{N}<s>3{N}</s>{N}</invoke>\n{N}</tool_call>'
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer"}, "s": {"type": "string"}},
        },
    },
}


# --- stand-ins: no more than our patches need ---


def reasoning() -> dict[str, Any]:
    class ReasoningParser:
        def __init__(self, tokenizer: Any = None) -> None: ...
        def extract_reasoning(self, model_output: str) -> Any: ...
        def extract_reasoning_streaming(
            self, previous_text: str, current_text: str, delta_text: str
        ) -> Any: ...
        def reset_state(self) -> None: ...

    @dataclass
    class DeltaMessage:
        reasoning: str | None = None
        content: str | None = None

    registered: dict[str, Any] = {}

    def register_parser(name: str, parser_class: Any) -> None:
        registered[name] = parser_class

    return locals()


def tool_parsers() -> dict[str, Any]:
    class ToolParser:
        def __init__(self, tokenizer: Any = None) -> None: ...
        def extract_tool_calls(self, model_output: str, request: Any = None) -> Any: ...
        def extract_tool_calls_streaming(
            self, previous_text: str, current_text: str, delta_text: str, request: Any = None
        ) -> Any: ...
        def reset(self) -> None: ...

    @dataclass
    class ExtractedToolCallInformation:
        tools_called: bool
        tool_calls: list[Any]
        content: str | None = None

    registered: dict[str, Any] = {}

    class ToolParserManager:
        @classmethod
        def register_module(cls, name: str, module: Any = None) -> Any:
            registered[name] = module

    return locals()


def server() -> dict[str, Any]:
    _reasoning_parser_name = None

    def _build_reasoning_parser(engine: Any = None) -> Any:
        return engine._reasoning_parser_name

    def _detect_implicit_thinking(engine: Any, chat_kwargs: Any) -> bool:
        return bool(engine._apply_chat_template([]).endswith("<think>"))

    return locals()


def memory_cache() -> dict[str, Any]:
    def _trim_cache_offset(cache: list[Any], trim_by: int) -> list[Any] | None:
        return copy.deepcopy(cache)

    return locals()


def mllm_cache_compat() -> dict[str, Any]:
    def first_incompatible_mllm_cache_type(caches: list[Any], *, allow_arrays_cache: bool = False) -> Any:
        return next((type(held).__name__ for held in caches if type(held) is not upstream.KVCache), None)

    return locals()


def output_router() -> dict[str, Any]:
    class OutputRouter:
        @classmethod
        def from_tokenizer(cls, tokenizer: Any) -> Any:
            return cls() if "<think>" in tokenizer.get_vocab() else None

    return locals()


def helpers() -> dict[str, Any]:
    config = SimpleNamespace(reasoning_parser_name=None)

    def get_config() -> Any:
        return config

    def _client_signalled_reasoning_intent(*sources: Any) -> bool:
        return False

    def _extract_thinking_from_request(request: Any) -> bool | None:
        return request.enable_thinking

    return locals()


def app_parsers() -> dict[str, Any]:
    UNIFIED_PARSER_MAP: dict[str, Any] = {"harmony": None}

    def get_unified_parser(parser_name: str) -> Any:
        return UNIFIED_PARSER_MAP.get(parser_name)

    class ParserManager:
        @staticmethod
        def create_parsers(reasoning_parser_name: Any = None, tool_parser_name: Any = None) -> Any: ...

    return locals()


def app_handler() -> dict[str, Any]:
    class MLXLMHandler:
        def __init__(self, name: str | None) -> None:
            self.reasoning_parser_name, self.tool_parser_name = name, None

        async def _prepare_text_request(self, request: Any) -> Any:
            await asyncio.sleep(0)
            return [], {"chat_template_kwargs": request}

    return locals()


def minimax_m3_register() -> dict[str, Any]:
    _PACKAGE, _VENDORED = "mlx_lm.models.minimax_m3_of_vmlx", Path("minimax_m3.py")

    def register_minimax_m3_runtime() -> bool:
        return _PACKAGE in sys.modules

    return locals()


def model_output_parsers() -> dict[str, Any]:
    def parse_tool_calls(responses: Any, tool_parser: Any, tools: Any) -> Any:
        return responses

    ToolCallItem = ToolCallResponse = SimpleNamespace
    return locals()


STAND_INS: dict[str, Callable[[], dict[str, Any]]] = {
    "vllm_mlx.reasoning": reasoning,
    "vllm_mlx.tool_parsers": tool_parsers,
    "vllm_mlx.server": server,
    "rapid_mlx.reasoning": reasoning,
    "rapid_mlx.tool_parsers": tool_parsers,
    "rapid_mlx.memory_cache": memory_cache,
    "rapid_mlx.mllm_cache_compat": mllm_cache_compat,
    "rapid_mlx.output_router": output_router,
    "rapid_mlx.service.helpers": helpers,
    "app.parsers": app_parsers,
    "app.handler.mlx_lm": app_handler,
    "vmlx_engine.models.minimax_m3.minimax_m3_register": minimax_m3_register,
    "exo.worker.runner.llm_inference.model_output_parsers": model_output_parsers,
}


def stand_in(name: str) -> Any:
    module: Any = ModuleType(name)
    vars(module).update(STAND_INS[name]())
    return module


def patched(name: str) -> Any:
    module = stand_in(name)
    applied, errors = apply(PATCHES, module)
    assert (len(applied), errors) == (sum(patch.module == name for patch in PATCHES), [])
    return module


@pytest.fixture(autouse=True)
def all_are_the_hosts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "other_programs" not in request.node.name:
        monkeypatch.setattr(patching, "_is_of", lambda name, module: True)


# --- rules of every patch ---


def test_every_patch_has_a_stand_in() -> None:
    assert STAND_INS.keys() == {patch.module for patch in PATCHES}


@pytest.mark.parametrize(
    ("module", "need"), [(patch.module, need) for patch in PATCHES for need in patch.needs]
)
def test_a_need_that_is_gone_is_said(module: str, need: str) -> None:
    """The rest of the module works as ever, and other patches of it are applied."""
    damaged = stand_in(module)
    path, parameters, attributes = patching.parse_need(need)
    owner, _, leaf = path.rpartition(".")
    if parameters or attributes:
        setattr(getattr(damaged, owner) if owner else damaged, leaf, lambda: None)
    else:
        delattr(getattr(damaged, owner) if owner else damaged, leaf)
    before = dict(vars(damaged))
    applied, errors = apply(PATCHES, damaged)
    affected = [patch for patch in PATCHES if patch.module == module and need in patch.needs]
    assert len(applied) == sum(patch.module == module for patch in PATCHES) - len(affected)
    assert len(errors) == 1
    assert all(patch.what in errors[0] for patch in affected)
    if not applied:
        assert vars(damaged) == before


def test_other_programs_with_a_package_named_app() -> None:
    module: Any = ModuleType("app.parsers")
    module.__file__ = "/somewhere/app/parsers.py"
    assert apply(PATCHES, module) == ([], [])
    module.__name__ = "mlx_lm.utils"
    assert not patching._is_of("mlx-lm", module)
    assert patching._is_of("mlx-lm", sys.modules["mlx_lm.utils"])


# --- parsers of vllm-mlx and rapid-mlx ---


@pytest.mark.parametrize("host", ["vllm_mlx", "rapid_mlx"])
def test_reasoning_is_split(host: str) -> None:
    parser = patched(f"{host}.reasoning").registered["minimax_m3"]()
    asks = f"{THINK_START}Why?{THINK_END}I ask.{BLOCK}"
    assert parser.extract_reasoning(asks) == ("Why?", f"I ask.{BLOCK}")
    assert parser.extract_reasoning(f"Why?{THINK_END}Yes.") == ("Why?", "Yes.")
    assert parser.extract_reasoning(f"{THINK_END}Yes.", enable_thinking=None) == (None, "Yes.")
    assert parser.extract_reasoning("Why", enable_thinking=True) == ("Why", None)
    assert parser.extract_reasoning("Yes.") == (None, "Yes.")
    for reply, opens, expected in (
        (asks, False, ("Why?", f"I ask.{BLOCK}")),
        (f"Why?{THINK_END}Yes. <", True, ("Why?", "Yes. <")),
        ("Yes.", False, ("", "Yes.")),
    ):
        parser.configure_request(enable_thinking=opens)
        assert streamed_reasoning(parser, reply) == expected
        parser.reset_state(opens)
        assert streamed_reasoning(parser, reply) == expected


def streamed_reasoning(parser: Any, reply: str) -> tuple[str, str]:
    messages = [parser.extract_reasoning_streaming("", "", letter) for letter in reply]
    messages = [message for message in [*messages, parser.finalize_stream()] if message]
    return "".join(m.reasoning or "" for m in messages), "".join(m.content or "" for m in messages)


@pytest.mark.parametrize("host", ["vllm_mlx", "rapid_mlx"])
@pytest.mark.parametrize("request_of", [dict, lambda **given: SimpleNamespace(**given)])
def test_calls_are_typed(host: str, request_of: Any) -> None:
    parser = patched(f"{host}.tool_parsers").registered["minimax_m3"]()
    request = request_of(tools=[SimpleNamespace(model_dump=lambda: TOOL)])
    reply = f"{THINK_START}Why?{THINK_END}I ask.{BLOCK} And {BLOCK} <"
    whole = parser.extract_tool_calls(reply, request)
    arguments = {"n": 3, "s": "3"}
    assert [(call["name"], json.loads(call["arguments"])) for call in whole.tool_calls] == [
        ("f", arguments)
    ] * 2
    assert (whole.tools_called, whole.content) == (True, "I ask. And  <")
    plain = parser.extract_tool_calls("Yes.", request)
    assert (plain.tools_called, plain.content) == (False, "Yes.")
    for _ in range(2):  # A parser reads one reply after another.
        content, calls = streamed_calls(parser, reply, request)
        assert content == whole.content
        assert [call["index"] for call in calls] == [0, 1]
        assert [json.loads(call["function"]["arguments"]) for call in calls] == [arguments] * 2
    for letter in "<":
        parser.extract_tool_calls_streaming("", letter, letter, request=request)
    assert parser.flush_held_content("<") == "<"


def streamed_calls(parser: Any, reply: str, request: Any) -> tuple[str, list[Any]]:
    deltas = [
        parser.extract_tool_calls_streaming(reply[:n], reply[: n + 1], letter, request=request)
        for n, letter in enumerate(reply)
    ]
    deltas = [delta for delta in [*deltas, parser.finalize_streaming(reply)] if delta]
    content = "".join(delta.get("content", "") for delta in deltas)
    return content, [call for delta in deltas for call in delta.get("tool_calls", [])]


def test_vllm_mlx_knows_whether_a_prompt_opens_reasoning() -> None:
    module, stock = patched("vllm_mlx.server"), stand_in("vllm_mlx.server")

    def engine(end: str) -> Any:
        return SimpleNamespace(_apply_chat_template=lambda messages, **options: f"...{end}")

    def detects(module: Any) -> list[bool]:
        ends = (THINK_START, THINK_END, "<think>")
        return [module._detect_implicit_thinking(engine(end), {}) for end in ends]

    assert detects(module) == detects(stock) == [False, False, True]
    module._reasoning_parser_name = "minimax_m3"
    assert detects(module) == [True, False, False]


# --- rapid-mlx ---


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(CHECKPOINT)[0]


def test_rapid_mlx_reuses_a_shared_prefix(model: Any) -> None:
    """Its stored entry is cut where prompts part, stays as it is, and what cannot be cut is a miss."""
    trim = patched("rapid_mlx.memory_cache")._trim_cache_offset
    first, following = (mx.random.randint(0, 64, (1, n)) for n in (200, 90))
    stored = model.make_cache()
    model(first, cache=stored)
    for n_shared in (70, 199, 200):
        reused = model(following, cache=trim(stored, 200 - n_shared))[0]
        prompt = mx.concatenate([first[:, :n_shared], following], axis=1)
        assert mx.abs(reused - model(prompt)[0, n_shared:]).max().item() <= 1e-4
        for entry in stored:  # From now on as it comes from disk.
            entry.__class__ = upstream.CacheList
    assert trim(stored, 201) is None
    stored[-1].caches = [upstream.QuantizedKVCache()]
    assert trim(stored, 10) is None


def test_rapid_mlx_trims_other_models_as_ever() -> None:
    module, stock = patched("rapid_mlx.memory_cache"), stand_in("rapid_mlx.memory_cache")
    others: list[Any] = [
        [upstream.CacheList(upstream.KVCache(), upstream.KVCache())],
        [upstream.KVCache()],
        [None],
        [],
        None,
    ]
    for cache in others:
        ours, theirs = (made._trim_cache_offset(cache, 1) for made in (module, stock))
        assert str(type(ours)) == str(type(theirs))
        assert [type(entry) for entry in ours or ()] == [type(entry) for entry in theirs or ()]


def test_rapid_mlx_takes_m3_with_vision() -> None:
    """The name is all that counts, as the class is mlx-vlm's."""
    first_incompatible = patched("rapid_mlx.mllm_cache_compat").first_incompatible_mllm_cache_type
    held = type("MiniMaxM3KVCache", (), {})()
    assert first_incompatible([upstream.KVCache(), held]) is None
    assert first_incompatible([held, upstream.RotatingKVCache(4)]) == "RotatingKVCache"
    assert first_incompatible([upstream.RotatingKVCache(4)], allow_arrays_cache=True) == "RotatingKVCache"


def test_rapid_mlx_routes_by_m3s_markers() -> None:
    router = patched("rapid_mlx.output_router").OutputRouter
    others = SimpleNamespace(get_vocab=lambda: {"<think>": 1})
    m3 = SimpleNamespace(get_vocab=lambda: {"<think>": 1, THINK_START: 2, THINK_END: 3, N: 4})
    assert type(router.from_tokenizer(others)) is router
    assert router.from_tokenizer(m3) is None


def test_rapid_mlx_leaves_reasoning_to_clients() -> None:
    module = patched("rapid_mlx.service.helpers")
    given = {
        mode: SimpleNamespace(enable_thinking=None, chat_template_kwargs={"thinking_mode": mode})
        for mode in ("enabled", "adaptive", "disabled", None)
    }
    given["none"] = SimpleNamespace(enable_thinking=True, chat_template_kwargs=None)

    def answers() -> tuple[bool, list[Any]]:
        asked = [module._extract_thinking_from_request(request) for request in given.values()]
        return module._client_signalled_reasoning_intent(*given.values()), asked

    assert answers() == (False, [None, None, None, None, True])
    module.config.reasoning_parser_name = "minimax_m3"
    assert answers() == (True, [True, False, False, None, True])


# --- mlx-openai-server ---


def test_mlx_openai_server_reads_each_reply_by_its_own_request() -> None:
    parser_of = patched("app.parsers").get_unified_parser
    handler = patched("app.handler.mlx_lm").MLXLMHandler("minimax_m3")

    async def answer(options: dict[str, Any], reply: str) -> Any:
        prepared = await handler._prepare_text_request(options)
        assert prepared == ([], {"chat_template_kwargs": options})
        await asyncio.sleep(0)
        parser, streaming = parser_of("minimax_m3")(), parser_of("minimax_m3")()
        parts = [streaming.parse_streaming(letter)[0] for letter in reply]
        parts.append(streaming.handle_parse_streaming_end()[0])
        whole = parser.parse(reply)
        for key in ("reasoning_content", "content"):
            assert "".join(part[key] or "" for part in parts) == (whole[key] or "")
        assert [c for part in parts for c in part["tool_calls"] or ()] == (whole["tool_calls"] or [])
        return whole

    async def both() -> Any:
        return await asyncio.gather(
            answer({"tools": [TOOL]}, f"{THINK_START}Why?{THINK_END}I ask.{BLOCK}"),
            answer({"enable_thinking": True}, f"Why?{THINK_END}Yes."),
        )

    called, thought = asyncio.run(both())
    (call,) = called["tool_calls"]
    assert (call["name"], json.loads(call["arguments"])) == ("f", {"n": 3, "s": "3"})
    assert (called["reasoning_content"], called["content"]) == ("Why?", "I ask.")
    assert thought == {"reasoning_content": "Why?", "content": "Yes.", "tool_calls": None}


def test_mlx_openai_server_prepares_other_models_as_ever() -> None:
    handler = patched("app.handler.mlx_lm").MLXLMHandler(None)
    given: ContextVar[Any] = mlx_openai_server._TEMPLATE_ARGUMENTS

    async def prepare() -> Any:
        return await handler._prepare_text_request({"a": 1}), given.get(None)

    assert asyncio.run(prepare()) == (([], {"chat_template_kwargs": {"a": 1}}), None)


# --- exo ---


@dataclass
class Response:
    """Of one token."""

    text: str
    finish_reason: str | None = None
    is_thinking: bool = False
    usage: int = 0
    stats: int = 0

    def model_copy(self, update: dict[str, Any]) -> "Response":
        return replace(self, **update)


def test_exo_finds_calls_of_several_tokens() -> None:
    parse = patched("exo.worker.runner.llm_inference.model_output_parsers").parse_tool_calls
    m3, other = (SimpleNamespace(start_parsing=start) for start in (f"{N}<tool_call>", "<tool_call>"))
    thought, pieces = Response("I ask.", is_thinking=True), [f"Well.{N}", *BLOCK.removeprefix(N)]
    reply = [thought, None, *map(Response, pieces), Response("", "stop", usage=7, stats=8)]
    first, nothing, text, call = parse(reply, m3, [TOOL])
    assert (first, nothing) == (thought, None)
    assert (text.text, text.finish_reason) == ("Well.", None)
    assert (call.usage, call.stats) == (7, 8)
    assert [(made.name, json.loads(made.arguments)) for made in call.tool_calls] == [
        ("f", {"n": 3, "s": "3"})
    ]
    plain = [Response("43"), Response(".", "stop")]
    assert list(parse(plain, m3, None)) == plain
    assert parse(reply, other, [TOOL]) is reply


def test_exo_sets_the_offset_that_it_has_trimmed_to(model: Any) -> None:
    """Wherever an entry has one, as with a ``KVCache``."""
    tokens = mx.random.randint(0, 64, (1, 150))
    cache = model.make_cache()
    model(tokens, cache=cache)
    for entry in cache:
        entry.trim(50)
        entry.offset = 100
    reused = model(tokens[:, 100:], cache=cache)[0]
    assert mx.abs(reused - model(tokens)[0, 100:]).max().item() <= 1e-4


# --- vmlx ---


def test_vmlx_counts_heads_of_caches(model: Any) -> None:
    counts = model.cache_list_head_counts
    cache = model.make_cache()
    model(mx.array([[1, 2]]), cache=cache)
    assert counts == [[held.keys.shape[1] for held in entry.caches] for entry in cache]


@pytest.mark.parametrize("prefer", ["native", "plugin"])
def test_vmlx_has_its_own_class_where_native_ones_are_preferred(
    prefer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_M3_PLUGIN_PREFER", prefer)
    module = patched("vmlx_engine.models.minimax_m3.minimax_m3_register")
    module._VENDORED = tmp_path / "minimax_m3.py"
    module._VENDORED.write_text("Model = 'vmlx'")
    name = "mlx_lm.models.minimax_m3_of_vmlx"
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert module.register_minimax_m3_runtime() is (prefer == "native")
    assert (name in sys.modules) is (prefer == "native")
    assert getattr(sys.modules.pop(name, None), "Model", "ours") == ("vmlx" if prefer == "native" else "ours")


# --- the hook ---


def test_modules_that_import_mlx_lm_in_their_midst_are_patched(tmp_path: Path) -> None:
    """The hook waits for hosts too: once mlx_lm comes, such a module is half made."""
    (tmp_path / "rapid_mlx").mkdir()
    (tmp_path / "rapid_mlx" / "__init__.py").write_text("")
    (tmp_path / "rapid_mlx" / "memory_cache.py").write_text(
        "import mlx_lm\ndef _trim_cache_offset(cache, trim_by):\n    return cache\n"
    )
    program = """
import json
from rapid_mlx.memory_cache import _trim_cache_offset
from mlx_m3_plugin.startup import hook
print(json.dumps([hook.status["patched"]["rapid_mlx.memory_cache"], hook.status["errors"]]))
"""
    done = here().run("-c", program, cwd=tmp_path)
    assert json.loads(done.stdout) == [["prefixes are cut where prompts part"], []]
    assert hook.status["errors"] == []
