"""Attention with per-head query and key norms, and MSA on the layers that have an indexer."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import msa
from ..msa import engine
from . import kv_cache as kv
from .config import TextConfig
from .host import Host
from .norm import GemmaRMSNorm, make_norm, norm_heads

# Up to so many tokens, starting kernels costs a GPU more than a copy of all heads.
_TOGETHER = 64


class Attention(nn.Module):
    """Grouped-query attention; sparse where the config says so.

    On sparse layers one index query head per KV group scores the blocks of keys against a
    single shared index key, and the group's query heads attend to the chosen blocks.  The
    index projections sit beside ``q_proj`` as in the published checkpoints.
    """

    def __init__(self, config: TextConfig, layer: int, host: Host | None = None):
        super().__init__()
        self.config = config
        self.host = host = host or config.host
        # Of this process: fewer than the config's where heads are sharded.
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.scale = config.head_dim**-0.5
        self.is_sparse_attn = config.is_sparse_attention(layer)

        hidden, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, hidden, bias=False)
        if config.use_qk_norm:
            self.q_norm = make_norm(config, head)
            self.k_norm = make_norm(config, head)
        # Serves the index heads as well: the same leading channels, frequencies and positions.
        self.rope = host.initialize_rope(
            dims=config.rotary_dim,
            base=config.rope_theta,
            traditional=False,
            scaling_config=config.rope_parameters or None,
            max_position_embeddings=config.max_position_embeddings,
        )
        if self.is_sparse_attn:
            self.index_n_heads = config.index_n_heads
            self.index_q_proj = nn.Linear(hidden, config.index_n_heads * config.index_head_dim, bias=False)
            self.index_k_proj = nn.Linear(hidden, config.index_head_dim, bias=False)
            self.index_q_norm = make_norm(config, config.index_head_dim)
            self.index_k_norm = make_norm(config, config.index_head_dim)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Hidden states ``[B, L, hidden]`` -> ``[B, L, hidden]``.

        Args:
            mask: the host's, for dense attention.
            cache: this layer's entry of the prompt cache, or None.
        """
        batch, length, _ = x.shape
        kv_cache = self.host.kv_cache(cache)
        n_slots, left_padding = kv.n_slots(kv_cache), kv.left_padding(kv_cache)
        offset = n_slots if left_padding is None else [n_slots - padding for padding in left_padding]
        queries, keys, index_keys, index_queries = self._heads(x, offset, n_slots + length)
        values = _split_heads(self.v_proj(x), self.num_key_value_heads).swapaxes(1, 2)
        if index_keys is not None and cache is not None:
            # Cached even while no block can be dropped: later steps need them.
            index_keys, arrays = self.host.append_index_keys(cache, index_keys)
            # Until then nothing reads them: left alone they pile up as unevaluated graph until
            # Metal runs out of buffers.
            keys = mx.depends(keys, arrays)
        if index_queries is None:
            keys, values = kv.append(kv_cache, keys, values)
            out = self.host.attention(queries, keys, values, cache=kv_cache, scale=self.scale, mask=mask)
        else:
            heads = self.num_attention_heads, self.num_key_value_heads
            setup = setup_for(self.config, heads, queries.dtype, *kv.bits_and_group_size(kv_cache))
            out = engine.attend(
                queries,
                *kv.append_to_slots(kv_cache, keys, values),
                self._select_blocks(index_queries, index_keys, offset, left_padding, setup),
                offset,
                left_padding,
                setup=setup,
                is_training=self.training,
            )
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))

    def _heads(self, x: mx.array, offset: msa.Offset, n_keys: int) -> list[Any]:
        """Normed and rotated queries, keys, index keys and index queries, each ``[B, heads, L, D]`` or None.

        Without an indexer there are no index keys, and without a block to drop no index queries.
        """
        heads = [
            _split_heads(self.q_proj(x), self.num_attention_heads),
            _split_heads(self.k_proj(x), self.num_key_value_heads),
        ]
        norms: list[Any] = [self.q_norm, self.k_norm] if self.config.use_qk_norm else [None, None]
        if self.is_sparse_attn:
            heads.append(_split_heads(self.index_k_proj(x), 1))
            norms.append(self.index_k_norm)
            if n_keys > self.config.budget and self.config.attention != "dense":
                heads.append(_split_heads(self.index_q_proj(x), self.index_n_heads))
                norms.append(self.index_q_norm)
        # An array of positions, for rows of different lengths.
        rotated = self._norm_and_rotate(heads, norms, offset if isinstance(offset, int) else mx.array(offset))
        return rotated + [None] * (4 - len(rotated))

    def _norm_and_rotate(self, heads: list[mx.array], norms: list[Any], offset: int | mx.array) -> list[Any]:
        """``[B, L, H, D]`` -> ``[B, H, L, D]`` each; few tokens in one go, where all heads are alike."""
        batch, length, _, width = heads[0].shape
        are_alike = all(
            part.shape[-1] == width and isinstance(norm, GemmaRMSNorm)
            for part, norm in zip(heads, norms, strict=True)
        )
        if not are_alike or batch * length > _TOGETHER:
            normed = [part if norm is None else norm(part) for part, norm in zip(heads, norms, strict=True)]
            return [self.rope(part.swapaxes(1, 2), offset=offset) for part in normed]
        counts = [part.shape[2] for part in heads]
        together = norm_heads(mx.concatenate(heads, axis=2), norms, counts)
        rotated = self.rope(together.swapaxes(1, 2), offset=offset)
        return list(mx.split(rotated, [sum(counts[:i]) for i in range(1, len(counts))], axis=1))

    def _select_blocks(
        self,
        index_queries: mx.array,
        index_keys: mx.array,
        offset: msa.Offset,
        left_padding: msa.Padding,
        setup: engine.Setup,
    ) -> mx.array:
        """Block ids ``[B, G, L, k]`` from all index keys ``[B, 1, S, D]``."""
        return engine.select_blocks(index_queries, index_keys, offset, left_padding, setup=setup)

    def drop_indexer(self) -> None:
        """Become a dense layer, for a checkpoint that has no weights for the indexer."""
        self.is_sparse_attn = False
        for name in ("index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm"):
            delattr(self, name)


def setup_for(
    config: TextConfig, heads: tuple[int, int], dtype: mx.Dtype, kv_bits: int, kv_group_size: int
) -> engine.Setup:
    """What the engine proves its kernels for; ``heads``: query heads and KV heads of this process."""
    return engine.Setup(
        dtype=dtype,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        heads=heads[0],
        groups=heads[1],
        channels=config.head_dim,
        value_channels=config.head_dim,
        index_channels=config.index_head_dim,
        block_size=config.index_block_size,
        k=config.index_topk_blocks,
        local_blocks=config.index_local_blocks,
        init_blocks=config.index_init_blocks,
    )


def _split_heads(x: mx.array, n_heads: int) -> mx.array:
    """``[B, L, H * D]`` -> ``[B, L, H, D]``."""
    return mx.unflatten(x, -1, (n_heads, -1))
