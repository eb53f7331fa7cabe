"""transformers' own MiniMax-M3 in small, and the losses that its indexer and router learn from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3

HIDDEN, LAYERS, DENSE = 128, 5, 2
BLOCK, TOP_K = 16, 4


def config(vocab_size: int, token_id: dict[str, int]) -> MiniMaxM3VLConfig:
    kinds = [0] * DENSE + [1] * (LAYERS - DENSE)
    text = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "rotary_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "dense_intermediate_size": 384,
        "intermediate_size": 128,
        "shared_intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.0,
        "mlp_layer_types": ["sparse" if kind else "dense" for kind in kinds],
        "layer_types": ["minimax_m3_sparse" if kind else "full_attention" for kind in kinds],
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_block_size": BLOCK,
        "index_topk_blocks": TOP_K,
        "index_local_blocks": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": token_id["]~b]"],
        "eos_token_id": token_id["[e~["],
        "initializer_range": 0.04,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    return MiniMaxM3VLConfig(
        text_config=text,
        vision_config=vision,
        projector_hidden_size=HIDDEN,
        image_token_index=token_id["]<]image[>["],
        video_token_index=token_id["]<]video[>["],
    )


def build(vocab_size: int, token_id: dict[str, int], seed: int) -> MiniMaxM3SparseForConditionalGeneration:
    torch.manual_seed(seed)
    model = MiniMaxM3SparseForConditionalGeneration(config(vocab_size, token_id))
    model.set_attn_implementation("sdpa")
    return model


def attend_densely(model: nn.Module, densely: bool) -> None:
    """Let every query attend to everything, as in the warm-up; or to the blocks that it chooses."""
    for module in model.modules():
        if isinstance(module, m3.MiniMaxM3VLIndexer):
            module.topk_blocks = 1 << 20 if densely else TOP_K


class Lessons:
    """What a forward pass leaves for the indexers and routers to learn from, gathered by hooks.

    The indexer learns from the KL divergence of its blocks' distribution from that of the attention of its
    KV group, pooled over the keys of a block; nothing flows back into the attention (MSA paper, 3.2).
    Experts are balanced by the bias that chooses them, without a loss (DeepSeek-V3).
    """

    def __init__(self, model: nn.Module, step: float = 1e-3):
        self.index_losses: list[torch.Tensor] = []
        self._step = step
        for module in model.modules():
            if isinstance(module, m3.MiniMaxM3VLAttention) and module.indexer is not None:
                module.register_forward_hook(self._teach_indexer, with_kwargs=True)
            if isinstance(module, m3.MiniMaxM3VLTopKRouter):
                module.register_forward_hook(self._balance)

    @contextmanager
    def of_one_pass(self, said: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """``said`` ``[B, L]``: queries that count."""
        self.index_losses, self._counted = [], said
        yield self.index_losses

    def _teach_indexer(self, attention: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not attention.training:
            return
        hidden, positions = kwargs["hidden_states"].detach(), kwargs["position_embeddings"]
        with torch.no_grad():
            wanted = _block_attention(attention, hidden, positions)
        scores = _block_scores(attention.indexer, hidden, positions)
        losses = functional.kl_div(scores.log_softmax(-1), wanted, reduction="none").sum(-1).mean(1)
        self.index_losses.append(losses[self._counted].mean())

    def _balance(self, router: Any, args: Any, output: Any) -> None:
        if not router.training:
            return
        counts = torch.bincount(output[2].flatten(), minlength=router.num_experts).float()
        router.e_score_correction_bias += self._step * torch.sign(counts.mean() - counts)


def _block_attention(attention: Any, hidden: torch.Tensor, positions: Any) -> torch.Tensor:
    """Of each KV group, the share of its heads' attention that each block has: ``[B, G, L, blocks]``."""
    batch, length, _ = hidden.shape
    shape = (batch, length, -1, attention.head_dim)
    queries = attention.q_norm(attention.q_proj(hidden).view(shape)).transpose(1, 2)
    keys = attention.k_norm(attention.k_proj(hidden).view(shape)).transpose(1, 2)
    queries, keys = m3.apply_rotary_pos_emb(queries, keys, *positions)
    groups = keys.shape[1]
    scores = queries.unflatten(1, (groups, -1)) @ keys.unsqueeze(2).transpose(-1, -2) * attention.scaling
    shares = scores.masked_fill(_future(length), -torch.inf).softmax(-1).mean(2)
    return _blocks(shares, 0.0).sum(-1)


def _block_scores(indexer: Any, hidden: torch.Tensor, positions: Any) -> torch.Tensor:
    batch, length, _ = hidden.shape
    shape = (batch, length, -1, indexer.head_dim)
    queries = indexer.q_norm(indexer.q_proj(hidden).view(shape)).transpose(1, 2)
    keys = indexer.k_norm(indexer.k_proj(hidden).view(shape)).transpose(1, 2)
    cos, sin = (part[..., : indexer.head_dim] for part in positions)
    queries, keys = m3.apply_rotary_pos_emb(queries, keys, cos, sin)
    scores = (queries @ keys.transpose(-1, -2)).masked_fill(_future(length), -1e9)
    return _blocks(scores, -1e9).amax(-1)


def _blocks(keys: torch.Tensor, fill: float) -> torch.Tensor:
    padding = -keys.shape[-1] % BLOCK
    return functional.pad(keys, (0, padding), value=fill).unflatten(-1, (-1, BLOCK))


def _future(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)
