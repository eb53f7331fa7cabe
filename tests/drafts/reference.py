"""M3.1's DSpark head in numpy float32, written from its published description and nothing of ours.

It computes one row, with all of its context at once, key by key as the description says it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray
PREFIX = "language_model.model.dspark."


def gemma_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * (1 + weight)


def rotate(x: Array, positions: Array, theta: float, rotary_dim: int) -> Array:
    """``[L, heads, D]``: pairs ``d`` and ``d + rotary_dim / 2`` of the first ``rotary_dim`` channels."""
    half = rotary_dim // 2
    angle = positions[:, None, None] / theta ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:rotary_dim]
    turned = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return np.concatenate([*turned, x[..., rotary_dim:]], axis=-1).astype(np.float32)


def swiglu_oai(gate: Array, up: Array, alpha: float, limit: float) -> Array:
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate / (1 + np.exp(-alpha * gate)) * (up + 1)


class Reference:
    """
    Args:
        values: float32 tensors by their published names.
        text: the config's keys.
        embedding, head: the target's, ``[V, H]``.
    """

    def __init__(self, values: Mapping[str, Array], text: Mapping[str, Any], embedding: Array, head: Array):
        self.values, self.text, self.embedding, self.head = values, text, embedding, head

    def get(self, name: str) -> Array:
        return self.values[f"{PREFIX}{name}"]

    def norm(self, x: Array, name: str) -> Array:
        return gemma_norm(x, self.get(f"{name}.weight"), self.text["rms_norm_eps"])

    def heads(self, x: Array, layer: str, projection: str) -> Array:
        out = x @ self.get(f"{layer}.self_attn.{projection}.weight").T
        return out.reshape(len(x), -1, self.text["head_dim"])

    def turned(self, x: Array, layer: str, which: str, positions: Array) -> Array:
        normed = self.norm(self.heads(x, layer, f"{which}_proj"), f"{layer}.self_attn.{which}_norm")
        return rotate(normed, positions, self.text["rope_theta"], self.text["rotary_dim"])

    def attention(self, h: Array, context: Array, layer: str) -> Array:
        n_context, n_rows = len(context), len(h)
        before, own = np.arange(n_context), n_context + np.arange(n_rows)
        queries = self.turned(h, layer, "q", own)
        keys = np.concatenate([self.turned(context, layer, "k", before), self.turned(h, layer, "k", own)])
        values = np.concatenate([self.heads(x, layer, "v_proj") for x in (context, h)])
        causal, window = self.text.get("dspark_causal", False), self.text["sliding_window"]
        out = np.zeros_like(queries)
        per_group = queries.shape[1] // keys.shape[1]
        for row in range(n_rows):
            at = n_context + row
            seen = [k for k in range(n_context) if k >= at - (window - 1)]
            seen += [n_context + other for other in range(row + 1 if causal else n_rows)]
            for head in range(queries.shape[1]):
                group = head // per_group
                scores = keys[seen, group] @ queries[row, head] / np.sqrt(self.text["head_dim"])
                weights = np.exp(scores - scores.max())
                out[row, head] = weights / weights.sum() @ values[seen, group]
        return out.reshape(n_rows, -1) @ self.get(f"{layer}.self_attn.o_proj.weight").T

    def hidden(self, features: Array, anchor: int) -> Array:
        """Normed hidden states ``[block, H]`` after ``features`` ``[L, layers * H]``."""
        text = self.text
        context = self.norm(features @ self.get("fc.weight").T, "hidden_norm")
        noise = [text["dspark_noise_token_id"]] * (text["dspark_block_size"] - 1)
        h = self.embedding[[anchor, *noise]]
        for number in range(text["num_hidden_layers"]):
            layer = f"layers.{number}.decoder_layer"
            h = h + self.attention(self.norm(h, f"{layer}.input_layernorm"), context, layer)
            x = self.norm(h, f"{layer}.post_attention_layernorm")
            gate, up = (x @ self.get(f"{layer}.mlp.{p}_proj.weight").T for p in ("gate", "up"))
            active = swiglu_oai(gate, up, text["swiglu_alpha"], text["swiglu_limit"])
            h = h + active @ self.get(f"{layer}.mlp.down_proj.weight").T
        return self.norm(h, "final_norm")

    def draft(self, features: Array, anchor: int, n_drafts: int) -> tuple[list[int], Array, Array]:
        """Greedy drafts, the logits ``[n, V]`` that each was taken from, and confidences ``[n]``."""
        tokens, logits, sure = [anchor], [], []
        for normed in self.hidden(features, anchor)[:n_drafts]:
            markov = self.get("markov_head.markov_w1.weight")[tokens[-1]]
            corrected = self.head @ normed + self.get("markov_head.markov_w2.weight") @ markov
            inner = self.get("confidence_head.proj.weight")[0] @ np.concatenate([normed, markov])
            sure.append(1 / (1 + np.exp(-(inner + self.get("confidence_head.proj.bias")[0]))))
            logits.append(corrected)
            tokens.append(int(corrected.argmax()))
        return tokens[1:], np.array(logits), np.array(sure)
