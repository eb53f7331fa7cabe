"""Our patches of mlx-lm: other models notice nothing of them, also where upstream has changed."""

import ast
import re
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from mlx_m3_plugin.chat.markers import has_m3_markers
from mlx_m3_plugin.hosts.mlx_lm.chat import ATTRIBUTES, become_m3, is_m3_wrapper
from mlx_m3_plugin.hosts.mlx_lm.patches import PATCHES
from mlx_m3_plugin.hosts.mlx_vlm.patches import PATCHES as VLM_PATCHES
from mlx_m3_plugin.startup.hook import PATCH_GROUP
from mlx_m3_plugin.weights.headers import is_m3 as is_m3_checkpoint
from tests.hosts.test_third_party import PATCHES as THIRD_PARTY_PATCHES
from tests.hosts.upstream_copies import (
    RENAMED,
    Recorder,
    Use,
    cases,
    check_nothing_noticed,
    check_without,
    get,
    is_of_old_releases,
    reads,
    write_checkpoint,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 16,
}


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mx.random.seed(3)
    model = llama.Model(llama.ModelArgs.from_dict(LLAMA))
    return write_checkpoint(tmp_path_factory.mktemp("llama"), LLAMA, model)


class Tokenizer(Recorder):
    def apply_chat_template(self, messages: Any, enable_thinking: bool = False) -> str:
        return ""


def use_tokenizer_utils(module: ModuleType, directory: Path) -> Any:
    vocabulary = {"a": 0, "<think>": 1, "</think>": 2}
    tokenizer = Tokenizer(eos_token_id=2, get_vocab=lambda: vocabulary, chat_template="<arg_key>")
    wrapper = get(module, "TokenizerWrapper")(tokenizer, lambda tokenizer: None)
    infer = get(module, "_infer_tool_parser")
    takes_tokenizer = infer.__wrapped__ if hasattr(infer, "__wrapped__") else infer
    asked = Recorder(chat_template="<arg_key>")
    names = takes_tokenizer.__code__.co_varnames[:1]
    parser = infer("<arg_key>" if names[0].startswith("chat_template") else asked)
    # From mlx-lm 0.32 on.
    markers = wrapper.structural_markers if hasattr(type(wrapper), "structural_markers") else None
    rfind = get(wrapper, "rfind_think_end")([1, 2, 2])
    made = type(wrapper).__name__, sorted(vars(wrapper)), wrapper.think_end, markers, rfind
    return made, parser, reads(tokenizer, asked)


def use_generate(module: ModuleType, directory: Path) -> Any:
    return _text_of_llama(module, directory), _automaton(module)


def _text_of_llama(module: ModuleType, directory: Path) -> Any:
    from mlx_lm.utils import load

    responses = module.stream_generate(*load(str(directory)), "a a", max_tokens=3)
    return [(response.text, response.token, response.finish_reason) for response in responses]


def _automaton(module: ModuleType) -> Any:
    names = "".join(vars(module))
    if "TextStateMachine" not in names:
        machine = get(module, "SequenceStateMachine")
        made = machine({"normal": [((1, 2), "reasoning")], "reasoning": [((3,), "normal")]})
        state, seen = made.make_state(), []
        for token in (0, 1, 2, 5, 3, 4):
            state, matched, name = get(machine, "match")(state, token)
            seen.append((matched, name))
        return seen
    tokenizer = Recorder(
        has_thinking=True,
        think_start="<think>",
        has_tool_calling=False,
        structural_markers=(),
        response_transitions={},
    )
    # A model that stock would not ask for its closing marker.
    tokenizer.has_thinking = False
    machine = get(module, "make_text_state_machine")(tokenizer, ["stop"])
    state, seen = get(machine, "make_state")(), []
    for text in ("a<th", "ink>]<]mini", "max[>[b", "sto"):
        state, segments = get(type(machine), "split")(state, text)
        seen.append(segments)
    state, text, name = get(type(machine), "flush")(state)
    return seen, text, name, type(state[2]).__name__, reads(tokenizer)


def use_utils(module: ModuleType, directory: Path) -> Any:
    model, config = get(module, "load_model")(directory)
    shared, *_ = get(module, "sharded_load")(str(directory))
    get(module, "dequantize_model")(shared)
    logits = [made(mx.array([[1, 2, 3]])).tolist() for made in (model, shared)]
    get(module, "save_model")(directory / "saved", model)
    return logits, config, type(model).__name__


def use_server(module: ModuleType, directory: Path) -> Any:
    body = {"messages": [], "tool_choice": "none"}
    handler = SimpleNamespace(stream=False, **dict.fromkeys(("body", f"body{RENAMED}"), body))
    request = get(get(module, "APIHandler"), "handle_chat_completions")(handler)
    context = SimpleNamespace(tool_parser=None, prompt=[1], sequences={(1,): "x"})

    def answer(asked: tuple[Any, ...]) -> None:
        for response in (context, SimpleNamespace(text="a", match=None), None):
            asked[0].put(response)

    generator = SimpleNamespace(
        requests=SimpleNamespace(put=answer),
        generation_available=lambda: True,
        _await_response=lambda queue: queue.get(),
    )
    made, responses = get(get(module, "ResponseGenerator"), "generate")(generator, request, None)
    return vars(request), made is context, [response.text for response in responses]


def use_awq(module: ModuleType, directory: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["awq", "--bits", "many"])
        with pytest.raises(SystemExit) as end:
            get(module, "main")()
    return end.value.code


USES: dict[str, Use] = {
    "mlx_lm.tokenizer_utils": use_tokenizer_utils,
    "mlx_lm.generate": use_generate,
    "mlx_lm.server": use_server,
    "mlx_lm.utils": use_utils,
    "mlx_lm.quant.awq": use_awq,
}


@pytest.mark.some(100, 100)
@pytest.mark.parametrize("module", USES)
def test_other_models_notice_nothing(module: str, llama_directory: Path) -> None:
    check_nothing_noticed(PATCHES, module, USES[module], llama_directory)


@pytest.mark.some(40, 20)
@pytest.mark.parametrize(("module", "name"), cases(PATCHES))
def test_a_name_that_is_gone_breaks_no_other_model(module: str, name: str, llama_directory: Path) -> None:
    check_without(PATCHES, module, name, USES[module], llama_directory)


def test_every_attribute_that_we_set_on_a_wrapper_is_looked_for() -> None:
    """A renamed one would be set for nothing, and nobody would know."""

    class Wrapper:
        def __init__(self) -> None:
            vars(self).update(
                _tokenizer=Recorder(
                    convert_tokens_to_ids=lambda tokens: [1, 2],
                    encode=lambda text, add_special_tokens: [3],
                ),
                has_chat_template=False,
                set=set(),
            )

        def __setattr__(self, name: str, value: Any) -> None:
            self.set.add(name)
            super().__setattr__(name, value)

    wrapper = Wrapper()
    become_m3(wrapper)
    assert is_m3_wrapper(wrapper)
    assert wrapper.set - {"__class__"} == set(ATTRIBUTES) - {"_tokenizer"}


# --- both lists ---

ALL = PATCHES + VLM_PATCHES + THIRD_PARTY_PATCHES


def test_the_hook_waits_for_every_patched_module() -> None:
    waited_for = {entry_point.name for entry_point in entry_points(group=PATCH_GROUP)}
    assert waited_for == {patch.module for patch in ALL}


def test_each_function_is_replaced_once() -> None:
    assert [name for name, n in Counter((patch.module, patch.path) for patch in ALL).items() if n > 1] == []
    for module in {patch.module for patch in ALL}:
        given = [patch.what for patch in ALL if patch.module == module and not is_of_old_releases(patch)]
        assert len(given) == len(set(given))


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.target)
def test_each_patch_says_when_it_goes(patch: Any) -> None:
    if patch.until.startswith("test_"):
        of_hosts = patch in THIRD_PARTY_PATCHES
        file = "third_party/test_servers.py" if of_hosts else "upstream/test_upstream.py"
        faults = ast.parse((Path(__file__).parents[1] / file).read_text())
        assert patch.until in [node.name for node in faults.body if isinstance(node, ast.FunctionDef)]
    elif not is_of_old_releases(patch):
        assert re.match("never: .", patch.until)


def test_a_tokenizer_that_refuses_to_list_its_vocabulary_is_not_m3s() -> None:
    def refuse() -> dict[str, int]:
        raise NotImplementedError

    assert not has_m3_markers(Recorder(get_vocab=refuse))
    assert not has_m3_markers(Recorder())


def test_what_is_not_a_path_is_not_an_m3_checkpoint(tmp_path: Path) -> None:
    assert not any(map(is_m3_checkpoint, (Recorder(), None, 3, b"m3", tmp_path, "\0")))
