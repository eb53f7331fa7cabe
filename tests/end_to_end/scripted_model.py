"""A tiny M3 checkpoint whose greedy reply is known: reasoning, text, two tool calls.

Its first layer looks one token back and at the topic of the prompt; the head is a table from
(token, token before it, topic) to the next one.  All other layers add nothing.  The markers of
M3's formats are the tokens that they are in M3's vocabulary.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_m3_plugin.chat.markers import NAMESPACE as NS
from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE
from mlx_m3_plugin.model.config import text_config_of
from tests.checkpoints.random_model import m3_config, m3_tokenizer, random_weights

TOPICS = [f"topic-{n:02}" for n in range(16)]
THINK, END_OF_THINK, CALLS, END_OF_CALLS, EOS = (
    "<mm:think>",
    "</mm:think>",
    "<tool_call>",
    "</tool_call>",
    "[e~[",
)
MARKERS = (THINK, END_OF_THINK, NS, CALLS, END_OF_CALLS)
REASONING = "They want it looked up, <b>twice</b>."
HEAD = 32
# Channels: a one-hot of the token, one that is always on, one that marks topics, two codes.
_CODES = 2 * HEAD


def content(topic: int) -> str:
    """It ends with the character that the marker of tool calls begins with."""
    return f"Looking up [{TOPICS[topic]}]"


def arguments(topic: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the two calls."""
    return {"query": f" {TOPICS[topic]}\n", "tags": [{"name": "a", "weight": 1.5}, {"name": "b"}]}, {
        "id": topic
    }


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "tags": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}, "weight": {"type": "number"}},
                        },
                    },
                },
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "fetch",
            "parameters": {"type": "object", "properties": {"id": {"type": "integer"}}},
        },
    },
]


def _calls(topic: int) -> tuple[str, str]:
    query = arguments(topic)[0]["query"]
    item_a = f"{NS}<item>{NS}<name>a{NS}</name>{NS}<weight>1.5{NS}</weight>{NS}</item>"
    item_b = f"{NS}<item>{NS}<name>b{NS}</name>{NS}</item>"
    tags = f"{NS}<tags>{item_a}{item_b}{NS}</tags>"
    search = f'{NS}<invoke name="search">{NS}<query>{query}{NS}</query>{tags}{NS}</invoke>\n'
    return search, f'{NS}<invoke name="fetch">{NS}<id>{topic}{NS}</id>{NS}</invoke>\n'


def block(topic: int) -> str:
    """As the model writes it."""
    search, fetch = _calls(topic)
    return f"{NS}{CALLS}\n{search}{fetch}{NS}{END_OF_CALLS}"


def _fixed_texts() -> list[str]:
    """What every prompt holds between markers, as tokens of their own: a prompt costs a tenth then."""
    texts: set[str] = set()
    for mode in ("enabled", "disabled", "adaptive"):
        messages = [{"role": "user", "content": "-"}]
        (prompt,), _ = render_jinja_template(
            [messages], chat_template=CHAT_TEMPLATE, tools=TOOLS, thinking_mode=mode
        )
        texts.update(re.split("|".join(map(re.escape, [*MARKERS, "\n", "]~b]", EOS])), prompt))
    return sorted(text for text in texts if len(text) > 12)


class _Script:
    """The table of what follows what."""

    def __init__(self) -> None:
        self.tokenizer = m3_tokenizer()
        # The prompt's last token, and the one at the beginning of a block.
        self.line_break = self.tokenizer.encode("]~b]ai\n").tokens[-1]
        self.after: dict[str, list[str]] = {}
        # Token -> the topic, or the token before its predecessor, that it is chosen by.
        self.chosen_by_topic: dict[str, int] = {}
        # What stands before a block, and last in it, is alike for every topic.
        self.chosen_by_previous = {CALLS: content(0), END_OF_CALLS: _calls(0)[1]}
        # Those that come at the beginning of a block alone.
        self.first_in_block: list[str] = []

    def add(self, chunks: list[str]) -> None:
        self.tokenizer.add_tokens([AddedToken(c, special=False, normalized=False) for c in chunks])

    def write(self) -> None:
        self.add([*TOPICS, REASONING, *_fixed_texts()])
        self.after = {
            self.line_break: [THINK],
            THINK: [REASONING],
            REASONING: [END_OF_THINK],
            END_OF_THINK: [],
            NS: [CALLS, END_OF_CALLS],
            CALLS: [self.line_break],
            END_OF_CALLS: [EOS],
        }
        for topic in range(len(TOPICS)):
            chunks = [content(topic), *_calls(topic)]
            self.add(chunks)
            said, search, fetch = chunks
            self.after[END_OF_THINK].append(said)
            self.after[self.line_break].append(search)
            self.after |= {said: [NS], search: [fetch], fetch: [NS]}
            self.first_in_block.append(search)
            for chunk in (said, search):
                self.chosen_by_topic[chunk] = topic


def write_scripted_model(directory: Path, special_markers: bool = False) -> Path:
    """Write the checkpoint into ``directory``, as M3 is published.

    ``special_markers``: as tokens that decoders may leave out.  Whether M3's are is not known.
    """
    script = _Script()
    script.tokenizer.add_special_tokens(list(MARKERS) if special_markers else [])
    script.write()
    vocabulary = script.tokenizer.get_vocab()
    config = _config(vocabulary)
    weights = _weights(script, vocabulary, config)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": vocabulary[EOS]}))
    script.tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "]~!b[",
        "eos_token": EOS,
        "pad_token": EOS,
    }
    # As an older mlx-lm has written it into its conversions.
    settings["tool_parser_type"] = "json_tools"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return directory


def _config(vocabulary: dict[str, int]) -> dict[str, Any]:
    config = m3_config(len(vocabulary), vocabulary)
    text = config["text_config"]
    rows = text["vocab_size"]
    sparse = [0, 1]
    text.update(
        hidden_size=rows + 2 + _CODES + (-(rows + 2 + _CODES)) % 64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        rotary_dim=HEAD // 2,
        partial_rotary_factor=0.5,
        rope_theta=10,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_layer_freq=sparse,
    )
    text["sparse_attention_config"].update(
        sparse_attention_freq=sparse, sparse_disable_index_value=sparse, sparse_num_index_heads=2
    )
    return config


def _weights(script: _Script, vocabulary: dict[str, int], config: dict[str, Any]) -> dict[str, np.ndarray]:
    text = text_config_of(config)
    rows, hidden = text.vocab_size, text.hidden_size
    always, topic, previous, subject = rows, rows + 1, rows + 2, rows + 2 + HEAD
    weights = {n: np.zeros_like(w) for n, w in random_weights(text, np.random.default_rng(0))}
    codes = np.random.default_rng(1).choice([-1.0, 1.0], (rows, HEAD)).astype(np.float32)

    # Of the code of what opens a block, one channel is its own.
    codes[:, 0] = -1
    codes[vocabulary[CALLS], 0] = 1
    for n in range(len(TOPICS)):
        codes[vocabulary[content(n)]] = codes[vocabulary[content(0)]]
        codes[vocabulary[_calls(n)[1]]] = codes[vocabulary[_calls(0)[1]]]

    embedding = weights["language_model.model.embed_tokens.weight"]
    embedding[np.arange(rows), np.arange(rows)] = 1
    embedding[:, always] = 1
    topics = [vocabulary[name] for name in TOPICS]
    embedding[topics, topic] = 1

    attention = "language_model.model.layers.0.self_attn"
    q, k, v, o = (weights[f"{attention}.{name}_proj.weight"] for name in "qkvo")
    pairs = HEAD // 4
    angles = 10.0 ** (-np.arange(pairs) / pairs)
    # Head 0 of K and V, head 0 of the queries: highest for the key one position back.
    q[:pairs, always], q[pairs : 2 * pairs, always] = np.cos(angles), -np.sin(angles)
    k[:pairs, always] = 1
    # Head 1 of K and V, head 2 of the queries, in channels that are not rotated: topics.
    q[2 * HEAD + HEAD // 2, always] = 1
    k[HEAD + HEAD // 2, topic] = 1
    k[HEAD + HEAD // 2 + 1, always] = 0.01
    weights[f"{attention}.q_norm.weight"][:] = 9
    weights[f"{attention}.k_norm.weight"][:] = 9
    scale = np.sqrt(hidden / 2)
    v[:HEAD, :rows] = codes.T / scale
    v[HEAD:, :rows] = codes.T / scale
    o[previous : previous + HEAD, :HEAD] = np.eye(HEAD)
    o[subject : subject + HEAD, 2 * HEAD : 3 * HEAD] = np.eye(HEAD)

    head = weights["language_model.lm_head.weight"]
    for token, followers in script.after.items():
        for follower in followers:
            head[vocabulary[follower], vocabulary[token]] = 10
    for chunk, token in script.chosen_by_previous.items():
        head[vocabulary[chunk], previous : previous + HEAD] = codes[vocabulary[token]] / HEAD
    for chunk in script.first_in_block:
        head[vocabulary[chunk], previous] = 12
    for chunk, topic_number in script.chosen_by_topic.items():
        head[vocabulary[chunk], subject : subject + HEAD] = codes[topics[topic_number]] / HEAD
    return weights
