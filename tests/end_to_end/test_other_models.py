"""Guest manners: models and tokenizers that are not M3 do not notice that we are there."""

import json
import re
from pathlib import Path

import pytest

from tests.end_to_end.environments import Environment
from tests.end_to_end.server_process import server_process
from tests.end_to_end.vlm_server import Server

# A dense and a mixture-of-experts architecture, saved, loaded and run by stock mlx-lm.
RUN = """
import hashlib, importlib, json, sys, tempfile
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

config = json.loads(sys.argv[1])
arch = importlib.import_module("mlx_lm.models." + config["model_type"])
mx.random.seed(7)
model = arch.Model(arch.ModelArgs.from_dict(config))
with tempfile.TemporaryDirectory() as directory:
    path = Path(directory)
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    model, _ = load_model(path)
    cache = make_prompt_cache(model)
    tokens = mx.random.randint(0, config["vocab_size"], (1, 60))
    pieces = [tokens[:, :41], *mx.split(tokens[:, 41:], 19, 1)]
    logits = [model(piece, cache=cache) for piece in pieces]
    logits = mx.concatenate(logits, axis=1)
mx.eval(logits)
print(arch.__file__.split("site-packages")[1], hashlib.sha256(bytes(memoryview(logits))).hexdigest())
"""

TOKENIZER = """
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from mlx_lm.tokenizer_utils import TokenizerWrapper
bare = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
bare.add_tokens(["<think>", "</think>", "<mm:think>"])
wrapper = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]"))
print(wrapper.think_start, wrapper.think_end, wrapper.think_start_id, wrapper.think_end_id)
"""

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}
DENSE = {"model_type": "llama", **COMMON}
MIXTURE = {
    "model_type": "qwen3_moe",
    **COMMON,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=lambda config: config["model_type"])
def test_logits_are_bit_identical(guest: Environment, stock: Environment, config: dict) -> None:
    with_us, without_us = (e.run("-c", RUN, json.dumps(config)) for e in (guest, stock))
    assert with_us.stdout == without_us.stdout
    assert len(with_us.stdout.split()[-1]) == 64


def test_a_tokenizer_without_both_markers_keeps_its_own(guest: Environment, stock: Environment) -> None:
    assert guest.run("-c", TOKENIZER).stdout == stock.run("-c", TOKENIZER).stdout
    assert guest.run("-c", TOKENIZER).stdout.startswith("<think> </think>")


# --- upstream has renamed what we use ---

# All names with an underscore that our patches use, in all of upstream's files.
RENAME = r"""
import importlib.machinery, re, sys
sys.modules["torch"] = None
NAMES = "_infer_tool_parser _infer_tool_parser_from_processor _download _get_classes _states _tokenizer "
NAMES += "_think_start _think_end _think_start_tokens _think_end_tokens _tool_parser _tool_call_start "
NAMES += "_tool_call_end _tool_call_start_tokens _tool_call_end_tokens _split_thinking _update "
NAMES += "_build_open_close_markers _prompt_has_open_thinking _prompt_thinking_already_closed "
NAMES += "TextStateMachine SequenceStateMachine ThinkingStreamState ResponseGenerator build_gen_args"
RENAMED = re.compile(rf"\b({'|'.join(NAMES.split())})\b")
get_code = importlib.machinery.SourceFileLoader.get_code

def renamed(self, name):
    if not name.startswith(("mlx_lm", "mlx_vlm")) or "mlx_m3_plugin" in self.path:
        return get_code(self, name)
    source = self.get_data(self.path).decode()
    return compile(RENAMED.sub(r"\1_renamed", source), self.path, "exec")

importlib.machinery.SourceFileLoader.get_code = renamed
"""
MISSING = {
    "mlx_lm.server": ("_download", "_tokenizer"),
    "mlx_vlm.server": ("build_gen_args", "_split_thinking"),
}


@pytest.fixture(scope="module")
def other(stock: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a Qwen2 that both libraries open, with a tokenizer and a template."""
    directory = tmp_path_factory.mktemp("other")
    stock.run("-c", WRITE, directory, json.dumps({"model_type": "qwen2", **COMMON}))
    return directory


WRITE = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

directory = Path(sys.argv[1])
config = json.loads(sys.argv[2])
mx.random.seed(3)
model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
(directory / "config.json").write_text(json.dumps(config))
words = {chr(97 + n) * k: 20 * k + n for k in (1, 2, 3) for n in range(20)} | {"</s>": 0, "[UNK]": 1}
bare = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", unk_token="[UNK]")
tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
tokenizer.save_pretrained(directory)
"""


@pytest.mark.parametrize("script", MISSING)
def test_they_are_served_where_upstream_has_renamed_what_we_use(
    script: str, guest: Environment, stock: Environment, other: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / script
    renamed.write_text(f"{RENAME}\nfrom {script} import main\nmain()\n")
    answers, logs = [], []
    for environment in (guest, stock):
        log = tmp_path / f"{len(logs)}.log"
        with server_process(environment, str(renamed), other, log) as address:
            answers.append(Server(address, other).ask("aa b cc", max_tokens=8))
        logs.append(log.read_text())
    assert answers[0]["message"] == answers[1]["message"]
    assert answers[0]["message"]["content"]
    for name in MISSING[script]:
        assert re.search(rf"mlx-m3-plugin: cannot extend .* {name}\b", logs[0])
    assert "mlx-m3-plugin" not in logs[1]
