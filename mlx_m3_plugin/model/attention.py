"""Attention with per-head query and key norms, and MSA on the layers that have an indexer."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import msa
from . import kv_cache as kv
from .config import TextConfig
from .host import Host
from .norm import make_norm


class Attention(nn.Module):
    """Grouped-query attention; sparse where the config says so.

    On sparse layers one index query head per KV group scores the blocks of keys against a
    single shared index key, and the group's query heads attend to the chosen blocks.  The
    index projections sit beside ``q_proj`` as in the published checkpoints.
    """

    def __init__(self, config: TextConfig, layer: int, host: Host):
        super().__init__()
        self.host = host
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.use_qk_norm = config.use_qk_norm
        self.is_sparse_attn = config.is_sparse_attention(layer)
        self.attends_densely = config.attention == "dense"

        hidden, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, hidden, bias=False)
        if self.use_qk_norm:
            self.q_norm = make_norm(config, head)
            self.k_norm = make_norm(config, head)
        # Serves the index heads as well: the same leading channels, frequencies and positions.
        self.rope = host.initialize_rope(
            dims=config.rotary_dims,
            base=config.rope_theta,
            traditional=False,
            scaling_config=config.rope_parameters or None,
            max_position_embeddings=config.max_position_embeddings,
        )
        if self.is_sparse_attn:
            self.index_n_heads = config.index_n_heads
            self.index_head_dim = config.index_head_dim
            self.index_block_size = config.index_block_size
            self.index_topk_blocks = config.index_topk_blocks
            self.index_budget = config.budget
            self.index_local_blocks = config.index_local_blocks
            self.index_init_blocks = config.index_init_blocks
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
        offset, left_padding = kv.offset(kv_cache), kv.left_padding(kv_cache)
        queries = self._queries(x, offset)
        keys, values = self._keys_values(x, offset)
        block_ids = None
        if self.is_sparse_attn:
            index_keys = self._index_keys(x, offset)
            if cache is not None:
                # Cached even while no block can be dropped: later steps need them.
                index_keys, arrays = self.host.append_index_keys(cache, index_keys)
                # Until then nothing reads them: left alone they pile up as unevaluated graph until
                # Metal runs out of buffers.
                keys = mx.depends(keys, arrays)
            block_ids = self._select_blocks(x, offset, left_padding, index_keys)
        if block_ids is None:
            keys, values = kv.append(kv_cache, keys, values)
            out = self.host.attention(queries, keys, values, cache=kv_cache, scale=self.scale, mask=mask)
        else:
            out = msa.attend(
                queries,
                *kv.append_to_slots(kv_cache, keys, values),
                block_ids,
                offset,
                left_padding,
                block_size=self.index_block_size,
                scale=self.scale,
            )
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))

    def _select_blocks(
        self, x: mx.array, offset: Any, left_padding: mx.array | None, index_keys: mx.array
    ) -> mx.array | None:
        """Block ids ``[B, G, L, k]`` from all index keys ``[B, 1, S, D]``; None if every block is read."""
        if self.attends_densely or index_keys.shape[2] <= self.index_budget:
            return None
        return msa.select_blocks(
            self._index_queries(x, offset),
            index_keys,
            offset,
            left_padding,
            block_size=self.index_block_size,
            topk_blocks=self.index_topk_blocks,
            local_blocks=self.index_local_blocks,
            init_blocks=self.index_init_blocks,
        )

    def drop_indexer(self) -> None:
        """Become a dense layer, for a checkpoint that has no weights for the indexer."""
        self.is_sparse_attn = False
        for name in ("index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm"):
            delattr(self, name)

    def _queries(self, x: mx.array, offset: Any) -> mx.array:
        queries = self._heads(self.q_proj(x), self.num_attention_heads)
        if self.use_qk_norm:
            queries = self.q_norm(queries)
        return self.rope(queries, offset=offset)

    def _keys_values(self, x: mx.array, offset: Any) -> tuple[mx.array, mx.array]:
        keys = self._heads(self.k_proj(x), self.num_key_value_heads)
        if self.use_qk_norm:
            keys = self.k_norm(keys)
        values = self._heads(self.v_proj(x), self.num_key_value_heads)
        return self.rope(keys, offset=offset), values

    def _index_queries(self, x: mx.array, offset: Any) -> mx.array:
        queries = self._heads(self.index_q_proj(x), self.index_n_heads)
        return self.rope(self.index_q_norm(queries), offset=offset)

    def _index_keys(self, x: mx.array, offset: Any) -> mx.array:
        keys = self._heads(self.index_k_proj(x), 1)
        return self.rope(self.index_k_norm(keys), offset=offset)

    @staticmethod
    def _heads(x: mx.array, n_heads: int) -> mx.array:
        """``[B, L, H * D]`` -> ``[B, H, L, D]``."""
        return x.reshape(*x.shape[:2], n_heads, -1).transpose(0, 2, 1, 3)
