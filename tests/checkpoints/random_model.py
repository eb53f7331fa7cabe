"""A tiny, complete MiniMax-M3 checkpoint with random weights, in the published layout.

It says nothing sensible.  It is there so that every stock command can be tried in seconds,
on any machine, without a download: all of M3's parts are in it, and its block budget is 32
tokens, so that an ordinary prompt passes it many times.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE
from mlx_m3_plugin.model.config import TextConfig, text_config_of

from . import random_vision

# Markers that belong to the text of a reply: decoding keeps them.
_MARKUP_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "]<]minimax[>[",
    "<mm:think>",
    "</mm:think>",
)
_CONTROL_TOKENS = (
    "]!p~[",
    "]~b]",
    "[e~[",
    "]!d~[",
    "]<]image[>[",
    "]<]video[>[",
    "]<]start of image[>[",
    "]<]end of image[>[",
    "]<]start of video[>[",
    "]<]end of video[>[",
    "]<]vision pad[>[",
    "]~!b[",
)
_WORD_PIECES = 640
_PAD, _END = "]!p~[", "[e~["


@dataclass(frozen=True)
class RandomModel:
    """What was written: where, the number of parameters, bytes of weights, the seed, and if it sees."""

    path: str
    parameters: int
    bytes: int
    seed: int
    vision: bool = False


def write_random_model(directory: str | Path, seed: int = 0, vision: bool = False) -> RandomModel:
    """Write the checkpoint into ``directory``.

    Weights are float32: MLX's CPU backend has no expert matmul for 16-bit floats.  The same
    seed gives the same weights.

    Args:
        vision: with a vision tower, the processors' files, and a picture to show it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return _write_files(directory, seed, vision)


def _write_files(directory: Path, seed: int, vision: bool) -> RandomModel:
    tokenizer = m3_tokenizer()
    vocabulary = tokenizer.get_vocab()
    token_id = {token: vocabulary[token] for token in (*_CONTROL_TOKENS, *_MARKUP_TOKENS)}
    config = m3_config(tokenizer.get_vocab_size(), token_id)
    random = np.random.default_rng(seed)
    weights = dict(random_weights(text_config_of(config), random))
    if vision:
        config = random_vision.with_vision(config)
        weights |= random_vision.random_vision_weights(config, random)
        weights["language_model.lm_head.weight"][random_vision.unspeakable(tokenizer, token_id[_END])] = 0
        (directory / random_vision.PICTURE).write_bytes(random_vision.picture())

    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    n_bytes = sum(w.nbytes for w in weights.values())
    _write_json(
        directory / "model.safetensors.index.json",
        {
            "metadata": {"total_size": n_bytes},
            "weight_map": dict.fromkeys(sorted(weights), "model.safetensors"),
        },
    )
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": token_id["]~b]"],
            "eos_token_id": token_id[_END],
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 0.95,
            "top_k": 40,
        },
    )
    write_processing(directory, tokenizer, config["text_config"]["max_position_embeddings"], vision)
    return RandomModel(str(directory), sum(w.size for w in weights.values()), n_bytes, seed, vision)


def write_processing(
    directory: Path, tokenizer: Tokenizer, model_max_length: int, vision: bool = True
) -> None:
    """All that ``AutoTokenizer`` and, with ``vision``, the processors of both libraries read."""
    write_tokenizer(directory, model_max_length, tokenizer)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    if vision:
        for name, content in random_vision.processor_files().items():
            _write_json(directory / name, content)


def write_tokenizer(directory: Path, model_max_length: int, tokenizer: Tokenizer | None = None) -> None:
    """``tokenizer``, or :func:`m3_tokenizer`, and its settings, as ``AutoTokenizer`` reads them."""
    (tokenizer or m3_tokenizer()).save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "]~!b[",
            "eos_token": _END,
            "pad_token": _PAD,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model_max_length,
        },
    )


def m3_tokenizer() -> Tokenizer:
    """Byte-level BPE as M3 has it, with pieces learned from the template's prose, and M3's markers."""
    prose = re.findall(r"'([^'{}]{20,})'", CHAT_TEMPLATE)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_WORD_PIECES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prose, trainer)
    add_markers(tokenizer)
    return tokenizer


def add_markers(tokenizer: Tokenizer) -> None:
    """M3's markers after the pieces, and as many spare tokens as make the vocabulary a multiple of 64."""
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in _MARKUP_TOKENS])
    # Quantization of the head wants a multiple of 64 rows, and mlx-vlm a name for each of them.
    spare = -tokenizer.get_vocab_size() % 64
    tokenizer.add_tokens([AddedToken(f"<reserved_{n}>", normalized=False) for n in range(spare)])


def m3_config(vocab_size: int, token_id: dict[str, int]) -> dict[str, Any]:
    """``config.json`` in the published spelling."""
    n_layers, n_dense = 6, 2
    sparse_layers = [0] * n_dense + [1] * (n_layers - n_dense)
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "torch_dtype": "float32",
        "image_token_index": token_id["]<]image[>["],
        "video_token_index": token_id["]<]video[>["],
        "text_config": {
            "architectures": ["MiniMaxM3SparseForCausalLM"],
            "dtype": "float32",
            "vocab_size": vocab_size,
            "bos_token_id": token_id["]~b]"],
            "eos_token_id": token_id[_END],
            "hidden_size": 128,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "dense_intermediate_size": 256,
            "intermediate_size": 64,
            "shared_intermediate_size": 64,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "moe_layer_freq": sparse_layers,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "routed_scaling_factor": 2.0,
            "hidden_act": "swigluoai",
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "rms_norm_eps": 1e-6,
            "use_gemma_norm": True,
            "use_qk_norm": True,
            "qk_norm_type": "per_head",
            "attention_output_gate": False,
            "rope_theta": 5000000,
            "rotary_dim": 16,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "sparse_attention_config": {
                "use_sparse_attention": True,
                "sparse_attention_freq": sparse_layers,
                "sparse_disable_index_value": sparse_layers,
                "sparse_num_index_heads": 4,
                "sparse_index_dim": 32,
                "sparse_block_size": 8,
                "sparse_topk_blocks": 4,
                "sparse_init_block": 0,
                "sparse_local_block": 1,
                "sparse_score_type": "max",
            },
        },
    }


def random_weights(config: TextConfig, random: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Published names with random values, each linear map of unit gain."""

    def linear(name: str, n_out: int, n_in: int) -> tuple[str, np.ndarray]:
        values = random.standard_normal((n_out, n_in), dtype=np.float32) * n_in**-0.5
        return f"language_model.{name}.weight", values.astype(np.float32)

    def vector(name: str, size: int, scale: float) -> tuple[str, np.ndarray]:
        return f"language_model.{name}", random.standard_normal(size, dtype=np.float32) * np.float32(scale)

    def mlp(name: str, projections: tuple[str, str, str], width: int) -> Iterator[tuple[str, np.ndarray]]:
        gate, up, down = projections
        yield linear(f"{name}.{gate}", width, config.hidden_size)
        yield linear(f"{name}.{up}", width, config.hidden_size)
        yield linear(f"{name}.{down}", config.hidden_size, width)

    hidden, head = config.hidden_size, config.head_dim
    projections = ("gate_proj", "up_proj", "down_proj")
    yield (
        "language_model.model.embed_tokens.weight",
        random.standard_normal((config.vocab_size, hidden), dtype=np.float32),
    )
    yield linear("lm_head", config.vocab_size, hidden)
    yield vector("model.norm.weight", hidden, 0.1)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        attention = f"{name}.self_attn"
        yield vector(f"{name}.input_layernorm.weight", hidden, 0.1)
        yield vector(f"{name}.post_attention_layernorm.weight", hidden, 0.1)
        yield linear(f"{attention}.q_proj", config.num_attention_heads * head, hidden)
        yield linear(f"{attention}.k_proj", config.num_key_value_heads * head, hidden)
        yield linear(f"{attention}.v_proj", config.num_key_value_heads * head, hidden)
        yield linear(f"{attention}.o_proj", hidden, config.num_attention_heads * head)
        yield vector(f"{attention}.q_norm.weight", head, 0.1)
        yield vector(f"{attention}.k_norm.weight", head, 0.1)
        if config.is_sparse_attention(layer):
            yield linear(f"{attention}.index_q_proj", config.index_n_heads * config.index_head_dim, hidden)
            yield linear(f"{attention}.index_k_proj", config.index_head_dim, hidden)
            yield vector(f"{attention}.index_q_norm.weight", config.index_head_dim, 0.1)
            yield vector(f"{attention}.index_k_norm.weight", config.index_head_dim, 0.1)
        if not config.is_moe(layer):
            yield from mlp(f"{name}.mlp", projections, config.dense_intermediate_size)
            continue
        moe = f"{name}.block_sparse_moe"
        yield linear(f"{moe}.gate", config.num_local_experts, hidden)
        yield vector(f"{moe}.e_score_correction_bias", config.num_local_experts, 0.1)
        yield from mlp(f"{moe}.shared_experts", projections, config.shared_intermediate_size)
        for expert in range(config.num_local_experts):
            yield from mlp(f"{moe}.experts.{expert}", ("w1", "w3", "w2"), config.intermediate_size)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
