"""Our patches of mlx-lm: other models notice nothing of them, also where upstream has changed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_m3_plugin.chat.vocabulary import is_m3
from mlx_m3_plugin.weights.files import is_m3 as is_m3_checkpoint
from tests.hosts.upstream_copies import RENAMED, Recorder, copy_of, get, has, patched, reads

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
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("llama")
    (directory / "config.json").write_text(json.dumps(LLAMA))
    mx.random.seed(3)
    model = llama.Model(llama.ModelArgs.from_dict(LLAMA))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    bare = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>").save_pretrained(directory)
    return directory


# What another model does with a module.  Each returns what came out, and what was read of stand-ins
# that have no more than stock reads.


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
    return type(wrapper).__name__, sorted(vars(wrapper)), wrapper.think_end, parser, reads(tokenizer, asked)


def use_generate(module: ModuleType, directory: Path) -> Any:
    if not has("mlx_lm.generate", "TextStateMachine"):
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
    state, seen = machine.make_state(), []
    for text in ("a<th", "ink>]<]mini", "max[>[b", "sto"):
        state, segments = get(type(machine), "split")(state, text)
        seen.append(segments)
    state, text, name = get(type(machine), "flush")(state)
    return seen, text, name, type(state[2]).__name__, reads(tokenizer)


def use_utils(module: ModuleType, directory: Path) -> Any:
    model, config = get(module, "load_model")(directory)
    shared, *_ = get(module, "sharded_load")(str(directory))
    logits = [made(mx.array([[1, 2, 3]])).tolist() for made in (model, shared)]
    return logits, config, type(model).__name__


USES: dict[str, Callable[[ModuleType, Path], Any]] = {
    "mlx_lm.tokenizer_utils": use_tokenizer_utils,
    "mlx_lm.generate": use_generate,
    "mlx_lm.utils": use_utils,
}
# All that our patches use of upstream.
NAMES = {
    "mlx_lm.tokenizer_utils": """
        TokenizerWrapper TokenizerWrapper.__init__(tokenizer) ._tokenizer ._think_start ._think_end
        ._think_start_tokens ._think_end_tokens ._tool_parser ._tool_call_start ._tool_call_end
        ._tool_call_start_tokens ._tool_call_end_tokens .has_chat_template _infer_tool_parser
    """,
    "mlx_lm.generate": """
        make_text_state_machine make_text_state_machine(tokenizer) make_text_state_machine(stop_words)
        TextStateMachine TextStateMachine.split TextStateMachine.split(state) TextStateMachine.split(text)
        TextStateMachine.flush TextStateMachine.flush(state) SequenceStateMachine SequenceStateMachine.match
        SequenceStateMachine.match(state) SequenceStateMachine.match(x)
        SequenceStateMachine.__init__(transitions) ._states
    """,
    "mlx_lm.utils": """
        load_model load_model(model_path) load_model(lazy) load_model(strict) sharded_load sharded_load(repo)
        sharded_load(pipeline_group) sharded_load(tensor_group) sharded_load(return_config) _download
        _download(allow_patterns) _get_classes load_config load_tokenizer
    """,
}
CASES = [(module, name) for module, names in NAMES.items() for name in names.split() if has(module, name)]


@pytest.mark.parametrize("module", USES)
def test_other_models_notice_nothing(module: str, llama_directory: Path) -> None:
    """The same results, and nothing read that stock does not read."""
    stock, ours = copy_of(module), copy_of(module)
    assert patched(ours) == []
    assert USES[module](ours, llama_directory) == USES[module](stock, llama_directory)


@pytest.mark.parametrize(("module", "name"), CASES)
def test_a_name_that_is_gone_breaks_no_other_model(module: str, name: str, llama_directory: Path) -> None:
    """And what keeps M3 from working is named."""
    stock, ours = copy_of(module, name), copy_of(module, name)
    reported = patched(ours)
    assert USES[module](ours, llama_directory) == USES[module](stock, llama_directory)
    lost = name.rstrip(")").replace("(", ".").rpartition(".")[2]
    assert any(lost in report and RENAMED not in report for report in reported)


def test_a_tokenizer_that_refuses_to_list_its_vocabulary_is_not_m3s() -> None:
    def refuse() -> dict[str, int]:
        raise NotImplementedError

    assert not is_m3(Recorder(get_vocab=refuse))
    assert not is_m3(Recorder())


def test_what_is_no_path_is_no_m3_checkpoint(tmp_path: Path) -> None:
    assert not any(map(is_m3_checkpoint, (Recorder(), None, 3, b"m3", tmp_path, "\0")))
