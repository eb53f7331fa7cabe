"""Our patches of mlx-vlm: other models notice nothing of them, also where upstream has changed."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_m3_plugin.hosts.mlx_vlm import prompts
from mlx_m3_plugin.hosts.mlx_vlm.patches import PATCHES
from tests.hosts.upstream_copies import (
    RENAMED,
    Recorder,
    Use,
    apply,
    cases,
    check_nothing_noticed,
    check_without,
    copy_of,
    get,
    reads,
    write_checkpoint,
)
from tests.vlm import vlm_runs

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = import_module("mlx_vlm.models.qwen2")
    mx.random.seed(3)
    model = module.Model(module.ModelConfig.from_dict(QWEN2))
    return write_checkpoint(tmp_path_factory.mktemp("other"), QWEN2, model)


def use_utils(module: ModuleType, directory: Path) -> Any:
    model = get(module, "load_model")(directory)
    logits = model.language_model(mx.array([[1, 2, 3]])).logits.tolist()
    processor = get(module, "load_processor")(directory, add_detokenizer=False)
    tokenizer = Recorder(encode=lambda text, add_special_tokens: [len(text)])
    criteria = get(module, "ThinkingBudgetCriteria")(tokenizer, 1, "</think>", "<think>", True)
    forced = [criteria(token) for token in (7, 3, 3, 3)]
    saved = directory / "saved"
    weights = Recorder(parameters=lambda: {"a": mx.zeros(2)})
    get(module, "save_weights")(saved, weights)
    get(module, "save_config")({"model_type": "qwen2", "b": 1}, saved / "config.json")
    files = sorted(file.name for file in saved.iterdir()), (saved / "config.json").read_text()
    return logits, type(processor).__name__, forced, files, reads(tokenizer, weights)


def use_drafters(module: ModuleType, directory: Path) -> Any:
    drafter, kind = get(module, "load_drafter")(str(directory))
    return type(drafter).__name__, kind


def use_generate_common(module: ModuleType, directory: Path) -> Any:
    state, cache = get(module, "PromptCacheState")(), Recorder(offset=2)
    get(state, "update")([1, 2, 3], [cache])
    return state.token_ids, state.find_prefix_length([1, 2, 3, 4]), reads(cache)


def use_speculation(module: ModuleType, directory: Path) -> Any:
    drafter = Recorder(config=SimpleNamespace(target_layer_ids=[0]))
    kept = get(module, "SpeculativePrefill")("dflash", drafter)
    for number in range(3):
        get(kept, "append")(SimpleNamespace(hidden_states=[mx.full((1, 2, 4), number)]))
    output = get(kept, "finish")(SimpleNamespace(hidden_states=[mx.ones((1, 1, 4))]))
    return output.hidden_states[0].tolist(), reads(drafter)


def use_generate_ar(module: ModuleType, directory: Path) -> Any:
    model = import_module("mlx_vlm.utils").load_model(directory)
    steps = get(module, "generate_step")(
        mx.array([[1, 2]]), model, None, None, max_tokens=3, temperature=0.0, repetition_penalty=1.5
    )
    generator = get(module, "BatchGenerator")(model.language_model, vlm_runs.Processor())
    processor = lambda tokens, logits: logits
    uids = get(generator, "insert")([[1, 2]], 1, None, [[processor]])
    return [int(token) for token, _ in steps], type(generator).__name__, len(uids)


def use_dflash(module: ModuleType, directory: Path) -> Any:
    drafter = Recorder(accept_lens=[2, 0, 1], draft_lens=[3, 3, 3])
    sizes = [get(module, "_dflash_next_block_size")(drafter, n, 9) for n in (1, 4, 8)]
    return sizes, reads(drafter)


def use_quant_utils(module: ModuleType, directory: Path) -> Any:
    model = nn.Sequential(nn.Linear(64, 8))
    nn.quantize(model)
    return type(get(module, "dequantize_model")(model).layers[0]).__name__


def use_moe_offload(module: ModuleType, directory: Path) -> Any:
    model = Recorder(layers=[])
    with pytest.raises((OSError, ValueError)) as error:
        get(module, "patch_model")(model, str(directory))
    return type(error.value).__name__, str(error.value), reads(model)


def use_prompt_utils(module: ModuleType, directory: Path) -> Any:
    class Processor(Recorder):
        def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
            return repr((messages, kwargs))

    processors = Processor(chat_template="t"), Processor(chat_template="t")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b", "reasoning": "a"}]
    tools = [{"type": "function", "function": {"name": "f", "b": 1, "a": 2}}]
    config = SimpleNamespace(model_type="qwen2_vl")
    prompt = get(module, "apply_chat_template")(processors[0], config, messages)
    made = get(module, "get_chat_template")(processors[1], messages, True, tools=tools)
    return prompt, made, reads(*processors)


def use_dataset(module: ModuleType, directory: Path) -> Any:
    class Processor(Recorder):
        def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
            return repr((messages, kwargs))

    processor = Processor(chat_template="t")
    dataset = get(module, "VisionDataset")([], {"model_type": "qwen2_vl"}, processor)
    dataset._prepare = lambda prompt, *media: prompt
    row = {"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "f"}]}
    return get(dataset, "process")(row), reads(processor)


def use_registry(module: ModuleType, directory: Path) -> Any:
    tokenizer = Recorder(chat_template="<tool_call>{{ tool_call.name }}")
    processor = Recorder(tokenizer=tokenizer)
    return get(module, "_infer_tool_parser_from_processor")(processor), reads(tokenizer, processor)


def use_endpoints(module: ModuleType, directory: Path) -> Any:
    from fastapi import APIRouter

    app = import_module("mlx_vlm.server.app")
    given = vars(app._protocol_deps)
    deps = Recorder(**given, **{name + RENAMED: value for name, value in given.items()})
    router = APIRouter()
    get(module, "register_routes")(router, deps)
    build = module._build_gen_args
    processor = Recorder(config=None)
    made = build(SimpleNamespace(), processor)
    count = module._count_thinking_tag_tokens("<think></think>", None, None)
    return len(router.routes), type(made).__name__, vars(made), count, reads(deps, processor)


def use_generation(module: ModuleType, directory: Path) -> Any:
    def put(item: Any) -> None:
        item.rqueue.put(SimpleNamespace(uid="one"))

    generator = Recorder(
        wait_until_ready=lambda: None,
        draft_model=None,
        requests=SimpleNamespace(put=put),
        _cancel=None,
        _preprocess_request=lambda *args, **kwargs: {"input_ids": mx.array([[1, 2]])},
        _make_thinking_budget_criteria=lambda *args: None,
    )
    kind = get(module, "ResponseGenerator")
    context, tokens = get(kind, "generate")(generator, "hello")
    asked = Recorder(enable_thinking=False)
    is_open = get(kind, "_prompt_has_open_thinking")(generator, asked, mx.array([[1]]))
    return context.uid, type(tokens).__name__, is_open, reads(generator, asked)


def use_responses_state(module: ModuleType, directory: Path) -> Any:
    state, seen = get(module, "ThinkingStreamState")(True, "<think>", "</think>"), []
    for text in ("a</thi", "nk>b<mm:think>", "]<]minimax[>[<tool_call>"):
        seen.append(vars(get(state, "feed")(text)))
    seen.append(get(module, "_split_thinking")("<mm:think>a</mm:think>b"))
    # The whole text is M3's marker, and the model is another.
    seen.append(get(module, "_split_thinking")("<mm:think>"))
    items = [{"type": "reasoning", "summary": []}, {"type": "message", "role": "user", "content": "a"}]
    seen.append(get(module, "_response_items_to_chat")(items))
    seen.append(get(module, "_response_output_items_from_text")("a", "id", None, [], {}))
    if "suppress_tool_call_content" in "".join(vars(module)):
        seen.append(get(module, "suppress_tool_call_content")("<tool_call>", False, "<tool_call>", "a"))
    return type(state).__name__, seen


def use_streaming(module: ModuleType, directory: Path) -> Any:
    parser = Recorder(__name__="a.json_tools", tool_call_start="<c>", tool_call_end="</c>")
    parser.parse_tool_call = lambda text, tools: json.loads(text)
    state = get(module, "ToolCallDeltaState")(parser, [1])
    deltas = get(state, "feed")('<c>{"name": "f", "arguments": {"a": 1}}</c>')
    fields = {"tools": [1], "parser_name": "another"}
    bare = Recorder(**fields, **{name + RENAMED: value for name, value in fields.items()})
    get(get(module, "ToolCallDeltaState"), "feed")(bare, "text")
    return [delta["function"] for delta in deltas], reads(parser, bare)


def use_extractor(module: ModuleType, directory: Path) -> Any:
    parser = Recorder(tool_call_start="<c>", tool_call_end="</c>", parse_tool_call=lambda text, tools: [])
    return vars(get(module, "process_tool_calls")("a <c>1</c> b", parser, [])), reads(parser)


USES: dict[str, Use] = {
    "mlx_vlm.utils": use_utils,
    "mlx_vlm.speculative.drafters": use_drafters,
    "mlx_vlm.generate.common": use_generate_common,
    "mlx_vlm.speculative.utils": use_speculation,
    "mlx_vlm.generate.ar": use_generate_ar,
    "mlx_vlm.speculative.dflash": use_dflash,
    "mlx_vlm.quant_utils": use_quant_utils,
    "mlx_vlm.moe_offload": use_moe_offload,
    "mlx_vlm.prompt_utils": use_prompt_utils,
    "mlx_vlm.trainer.vlm.sft.dataset": use_dataset,
    "mlx_vlm.tools.registry": use_registry,
    "mlx_vlm.tool_parsers": use_registry,
    "mlx_vlm.server.openai": use_endpoints,
    "mlx_vlm.server.anthropic": use_endpoints,
    "mlx_vlm.server.generation": use_generation,
    "mlx_vlm.server.responses_state": use_responses_state,
    "mlx_vlm.tools.extractor": use_extractor,
    "mlx_vlm.tools.streaming": use_streaming,
}


@pytest.mark.some(100, 100)
@pytest.mark.parametrize("module", USES)
def test_other_models_notice_nothing(module: str, other: Path) -> None:
    check_nothing_noticed(PATCHES, module, USES[module], other)


@pytest.mark.some(60, 20)
@pytest.mark.parametrize(("module", "name"), cases(PATCHES))
def test_a_name_that_is_gone_breaks_no_other_model(module: str, name: str, other: Path) -> None:
    check_without(PATCHES, module, name, USES[module], other)


def test_endpoints_that_are_given_other_functions_keep_them(caplog: pytest.LogCaptureFixture) -> None:
    from mlx_m3_plugin.hosts.mlx_vlm.requests import _Dependencies

    deps = _Dependencies(SimpleNamespace(build_gen_args=lambda asked, processor: asked, other=1))
    assert deps.build_gen_args("a request", None) == "a request"
    assert deps.other == 1
    assert "no parameter request" in caplog.text
    with pytest.raises(AttributeError, match="count_thinking_tag_tokens"):
        _ = deps.count_thinking_tag_tokens


def test_arguments_without_a_field_that_ours_sets_stay_upstreams(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlx_m3_plugin.hosts.mlx_vlm.requests import _Dependencies

    class OtherArguments(Recorder):
        def to_template_kwargs(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr("mlx_vlm.server.generation.GenerationArguments", OtherArguments)
    processor, made = nn.Identity(), OtherArguments()
    prompts.remember(processor)
    deps = _Dependencies(SimpleNamespace(build_gen_args=lambda request, processor: made))
    assert deps.build_gen_args(SimpleNamespace(), processor) is made
    assert "GenerationArguments has no parameter enable_thinking" in caplog.text


# --- what is saved ---


class Savable(nn.Module):
    """As our models are, for ``save_weights``."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.description = {"quantization": {"group_size": 32, "bits": bits}, "pack_shared_expert": True}

    def as_stored(self) -> Any:
        return SimpleNamespace(parameters=lambda: {"a": mx.zeros(2)}), self.description


def test_each_config_describes_the_weights_beside_it(tmp_path: Path) -> None:
    utils = copy_of("mlx_vlm.utils")
    assert apply(PATCHES, utils)[1] == []

    def saved(name: str) -> Any:
        utils.save_config({"model_type": "minimax_m3_vl", "text_config": {}}, tmp_path / name / "config.json")
        return json.loads((tmp_path / name / "config.json").read_text())

    (tmp_path / "floats").mkdir()
    utils.save_weights(tmp_path / "eight", Savable(8))
    utils.save_weights(str(tmp_path / "x" / ".." / "four"), Savable(4))
    assert "quantization" not in saved("floats")
    assert saved("eight")["quantization"]["bits"] == 8
    assert saved("four")["quantization"]["bits"] == 4
    # It is said once: other weights may lie there by then.
    assert "quantization" not in saved("eight")


# --- who is M3 ---


def test_processors_are_known_by_identity() -> None:
    class Equal:
        """Equal to everything, and refuses to list a vocabulary."""

        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return True

        def get_vocab(self) -> dict[str, int]:
            raise NotImplementedError

    processor, another = Equal(), Equal()
    processor.tokenizer = Equal()  # type: ignore[attr-defined]
    prompts.remember(processor)
    prompts.remember(None)
    assert prompts.is_m3(processor)
    assert prompts.is_m3(processor.tokenizer)  # type: ignore[attr-defined]
    assert not any(map(prompts.is_m3, (another, None, 3, "minimax_m3_vl")))
    known = len(prompts._known)
    del processor
    assert len(prompts._known) == known - 2
