"""Guest manners: models and tokenizers that are not M3 do not notice that we are there."""

import json

import pytest

from tests.end_to_end.environments import Environment

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
