"""A DSpark draft head in torch, under MiniMax's names, and its loss at many places of a text at once."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

# What a row of a block counts for, beside the one before: it is needed only if that one was right.
FOLLOWING = 0.85
CONFIDENCE_WEIGHT = 0.1


class Norm(nn.Module):
    """Gemma's: the weight is stored around zero."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), eps=self.eps) * (1 + self.weight)


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config, width, head = config, config["hidden_size"], config["head_dim"]
        queries, groups = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, groups, bias=False)
        self.v_proj = nn.Linear(width, groups, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)
        self.q_norm, self.k_norm = (Norm(head, config["rms_norm_eps"]) for _ in range(2))

    def queries(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Of tokens ``[B, L, D]`` at positions ``[B, L]``: ``[B, H, L, head]``."""
        return self._rotated(self.q_norm(self._heads(self.q_proj(x))), at)

    def keys_values(self, x: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rotated(self.k_norm(self._heads(self.k_proj(x))), at), self._heads(self.v_proj(x))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.config["head_dim"])).transpose(1, 2)

    def _rotated(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        half = self.config["rotary_dim"] // 2
        frequencies = self.config["rope_theta"] ** (-torch.arange(half) / half)
        angles = at[:, None, :, None] * frequencies
        first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class MLP(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, wide = config["hidden_size"], config["dense_intermediate_size"]
        self.alpha, self.limit = config["swiglu_alpha"], config["swiglu_limit"]
        self.gate_proj = nn.Linear(width, wide, bias=False)
        self.up_proj = nn.Linear(width, wide, bias=False)
        self.down_proj = nn.Linear(wide, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x).clamp(max=self.limit)
        up = self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(gate * torch.sigmoid(self.alpha * gate) * (up + 1))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = Norm(width, eps), Norm(width, eps)
        self.self_attn, self.mlp = Attention(config), MLP(config)


class DraftHead(nn.Module):
    """``config``: the ``text_config`` of a head."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config, width, eps = config, config["hidden_size"], config["rms_norm_eps"]
        rank, vocabulary = config["dspark_markov_rank"], config["vocab_size"]
        self.fc = nn.Linear(width * len(config["dspark_target_layer_ids"]), width, bias=False)
        self.hidden_norm, self.final_norm = Norm(width, eps), Norm(width, eps)
        layers = [nn.ModuleDict({"decoder_layer": Layer(config)}) for _ in range(config["num_hidden_layers"])]
        self.layers = nn.ModuleList(layers)
        self.markov_head = nn.ModuleDict(
            {
                "markov_w1": nn.Embedding(vocabulary, rank),
                "markov_w2": nn.Linear(rank, vocabulary, bias=False),
            }
        )
        self.confidence_head = nn.ModuleDict({"proj": nn.Linear(width + rank, 1)})
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 if "markov" in name else parameter.shape[1] ** -0.5)

    def blocks(
        self, features: torch.Tensor, ids: torch.Tensor, anchors: torch.Tensor, embedding: torch.Tensor
    ) -> torch.Tensor:
        """Normed hidden states ``[B, A, rows, D]`` of the blocks after tokens at ``anchors`` ``[B, A]``.

        ``features`` ``[B, L, layers * D]`` are the target's; a block sees those before its anchor.
        """
        (batch, n_blocks), length = anchors.shape, ids.shape[1]
        n_rows = self.config["dspark_block_size"]
        block = torch.full((batch, n_blocks, n_rows), self.config["dspark_noise_token_id"])
        block[..., 0] = ids.gather(1, anchors)
        h = embedding[block].flatten(1, 2)
        context, keys = self.hidden_norm(self.fc(features)), torch.arange(length)
        rows = (anchors[..., None] + torch.arange(n_rows)).flatten(1)
        of_block = torch.arange(n_blocks).repeat_interleave(n_rows)
        seen = keys < anchors.repeat_interleave(n_rows, 1)[..., None]
        seen &= keys > rows[..., None] - self.config["sliding_window"]
        own = (of_block[:, None] == of_block).expand(batch, -1, -1)
        mask = torch.cat((seen, own), dim=-1)[:, None]
        for each in self.layers:
            layer = each["decoder_layer"]
            attention, x = layer.self_attn, layer.input_layernorm(h)
            of_context = attention.keys_values(context, keys.expand(batch, -1))
            pairs = zip(of_context, attention.keys_values(x, rows), strict=True)
            out = functional.scaled_dot_product_attention(
                attention.queries(x, rows), *(torch.cat(pair, 2) for pair in pairs), mask, enable_gqa=True
            )
            h = h + attention.o_proj(out.transpose(1, 2).flatten(2))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        return self.final_norm(h).unflatten(1, (n_blocks, n_rows))

    def markov(self, before: torch.Tensor) -> torch.Tensor:
        """What the token before each adds to its logits."""
        return self.markov_head["markov_w2"](self.markov_head["markov_w1"](before))

    def loss(
        self,
        features: torch.Tensor,
        ids: torch.Tensor,
        said: torch.Tensor,
        anchors: torch.Tensor,
        embedding: torch.Tensor,
        lm_head: torch.Tensor,
    ) -> tuple[torch.Tensor, float]:
        """Cross entropy to what the target says; and how many tokens of a block are right in a row."""
        n_rows = self.config["dspark_block_size"]
        at = anchors[..., None] + torch.arange(n_rows + 1)
        is_text = at < ids.shape[1]
        at = at.clamp(max=ids.shape[1] - 1)
        tokens = ids.gather(1, at.flatten(1)).view(at.shape)
        counted = (said.gather(1, at.flatten(1)).view(at.shape) & is_text)[..., 1:].cumprod(-1)
        hidden = self.blocks(features, ids, anchors, embedding)
        before, answer = tokens[..., :-1], tokens[..., 1:]
        log_q = (hidden @ lm_head.T + self.markov(before)).log_softmax(-1)
        of_answer = log_q.gather(-1, answer[..., None])[..., 0]
        confidence = torch.cat((hidden, self.markov_head["markov_w1"](before)), -1)
        confidence = self.confidence_head["proj"](confidence)[..., 0]
        unsure = functional.binary_cross_entropy_with_logits(
            confidence, of_answer.detach().exp(), reduction="none"
        )
        weight = counted * FOLLOWING ** torch.arange(n_rows)
        loss = ((CONFIDENCE_WEIGHT * unsure - of_answer) * weight).sum() / weight.sum().clamp(min=1)
        right = (log_q.argmax(-1) == answer).cumprod(-1) * counted
        return loss, right.sum(-1).float().mean().item()
