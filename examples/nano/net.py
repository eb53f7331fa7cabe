"""transformers' own MiniMax-M3 in small, and the losses that its indexer and router learn from."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sizes import BLOCK, TOP_K
from torch import nn
from torch.nn import functional
from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3

HIDDEN, LAYERS, DENSE = 128, 4, 1


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
    """Let every query attend to everything, as in the warm-up; or to the blocks that it chooses.

    The choice is transformers' own; only its mask is made with less copying, for whole rows from their
    beginning without padding on the left.
    """
    for module in model.modules():
        if not isinstance(module, m3.MiniMaxM3VLIndexer):
            continue
        vars(module).pop("forward", None)
        module.build_block_mask = partial(_mask_of_whole_rows, module)
        if densely:
            module.forward = lambda *_: None
            module.build_block_mask = lambda _, mask, *__: mask


def _mask_of_whole_rows(
    indexer: Any, chosen: torch.Tensor, mask: Any, length: int, dtype: torch.dtype, *_: Any
) -> torch.Tensor:
    """``[B, H, L, L]``: what ``build_block_mask`` makes of ``chosen`` ``[B, G, L, k]``."""
    batch, groups, _, _ = chosen.shape
    heads, blocks = indexer.config.num_attention_heads, -(-length // BLOCK)
    least = torch.finfo(dtype).min
    of_blocks = torch.full((batch, groups, length, blocks + 1), least, dtype=dtype)
    of_blocks.scatter_(-1, chosen.masked_fill(chosen < 0, blocks), 0.0)
    of_blocks = of_blocks[:, :, None, :, :-1, None].expand(-1, -1, heads // groups, -1, -1, BLOCK)
    of_keys = of_blocks.reshape(batch, heads, length, blocks * BLOCK)[..., :length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return of_keys.masked_fill_(future, least)


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
        """``said`` ``[B, L]``: queries that count, and a tenth of the others with them."""
        self.index_losses = []
        counted = said | (torch.rand(said.shape) < 0.1)
        # In each row as many are looked at as in the fullest.
        most = int(counted.sum(1).max())
        self._at = counted.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        self._counted = counted.gather(1, self._at)
        yield self.index_losses

    def _teach_indexer(self, attention: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not attention.training:
            return
        hidden, positions = kwargs["hidden_states"].detach(), kwargs["position_embeddings"]
        with torch.no_grad():
            wanted = _block_attention(attention, hidden, positions, self._at)
        scores = _block_scores(attention.indexer, hidden, positions, self._at)
        losses = functional.kl_div(scores.log_softmax(-1), wanted, reduction="none").sum(-1).mean(1)
        self.index_losses.append(losses[self._counted].mean())

    def _balance(self, router: Any, args: Any, output: Any) -> None:
        if not router.training:
            return
        counts = torch.bincount(output[2].flatten(), minlength=router.num_experts).float()
        router.e_score_correction_bias += self._step * torch.sign(counts.mean() - counts)


def _block_attention(attention: Any, hidden: torch.Tensor, positions: Any, at: torch.Tensor) -> torch.Tensor:
    """Of each KV group, the share of its heads' attention that each block has: ``[B, G, n, blocks]``.

    ``at`` ``[B, n]`` are the positions of the queries.
    """
    queries, keys = _rotated(attention, hidden, positions, at)
    scores = (
        queries.unflatten(1, (keys.shape[1], -1)) @ keys.unsqueeze(2).transpose(-1, -2) * attention.scaling
    )
    shares = scores.masked_fill(_future(at, hidden)[:, None], -torch.inf).softmax(-1).mean(2)
    return _blocks(shares, 0.0).sum(-1)


def _block_scores(indexer: Any, hidden: torch.Tensor, positions: Any, at: torch.Tensor) -> torch.Tensor:
    queries, keys = _rotated(indexer, hidden, positions, at)
    scores = (queries @ keys.transpose(-1, -2)).masked_fill(_future(at, hidden), -1e9)
    return _blocks(scores, -1e9).amax(-1)


def _rotated(
    of: Any, hidden: torch.Tensor, positions: Any, at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``[B, H, n, D]`` and all keys of an attention or an indexer, which name their parts alike."""
    batch, length, width = hidden.shape
    chosen = hidden.gather(1, at[..., None].expand(-1, -1, width))
    queries = of.q_norm(of.q_proj(chosen).view(batch, at.shape[1], -1, of.head_dim)).transpose(1, 2)
    keys = of.k_norm(of.k_proj(hidden).view(batch, length, -1, of.head_dim)).transpose(1, 2)
    cos, sin = (part[..., : of.head_dim].expand(batch, -1, -1) for part in positions)
    of_queries = [part.gather(1, at[..., None].expand(-1, -1, part.shape[-1])) for part in (cos, sin)]
    queries, _ = m3.apply_rotary_pos_emb(queries, queries, *of_queries)
    keys, _ = m3.apply_rotary_pos_emb(keys, keys, cos, sin)
    return queries, keys


def _blocks(keys: torch.Tensor, fill: float) -> torch.Tensor:
    padding = -keys.shape[-1] % BLOCK
    return functional.pad(keys, (0, padding), value=fill).unflatten(-1, (-1, BLOCK))


def _future(at: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """``[B, 1, n, L]``: keys after their query."""
    return (torch.arange(hidden.shape[1]) > at[..., None])[:, None]
