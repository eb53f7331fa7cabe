"""Tensor parallelism: every process holds a share of the heads and of each MLP's width."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear

from .attention import Attention
from .decoder import DecoderLayer
from .moe import DenseMLP, SparseMoeBlock


def shard_layers(layers: Sequence[DecoderLayer], group: mx.distributed.Group) -> None:
    """Shard decoder layers in place.

    Raises:
        ValueError: a head count does not divide by the number of processes, or the layers
            are sharded already.  Nothing has been changed then.
    """
    size = group.size()
    for layer in layers:
        attention = layer.self_attn
        heads = {
            "num_attention_heads": attention.num_attention_heads,
            "num_key_value_heads": attention.num_key_value_heads,
        }
        uneven = {name: n for name, n in heads.items() if n % size}
        if uneven:
            raise ValueError(f"{uneven} do not divide by {size} processes; is the model sharded already?")
    for layer in layers:
        _shard_attention(layer.self_attn, group)
        if layer.is_moe:
            _shard_experts(layer.block_sparse_moe, group)
        else:
            _shard_mlp(layer.mlp, group)


def _shard_attention(attention: Attention, group: mx.distributed.Group) -> None:
    size = group.size()
    attention.q_proj = shard_linear(attention.q_proj, "all-to-sharded", group=group)
    attention.k_proj = shard_linear(attention.k_proj, "all-to-sharded", group=group)
    attention.v_proj = shard_linear(attention.v_proj, "all-to-sharded", group=group)
    attention.o_proj = shard_linear(attention.o_proj, "sharded-to-all", group=group)
    attention.num_attention_heads //= size
    attention.num_key_value_heads //= size
    if attention.is_sparse_attn:
        # An index head serves one KV group and goes where that goes; the index key is shared.
        attention.index_q_proj = shard_linear(attention.index_q_proj, "all-to-sharded", group=group)
        attention.index_n_heads //= size


def _shard_mlp(mlp: DenseMLP, group: mx.distributed.Group) -> None:
    mlp.gate_proj = shard_linear(mlp.gate_proj, "all-to-sharded", group=group)
    mlp.up_proj = shard_linear(mlp.up_proj, "all-to-sharded", group=group)
    mlp.down_proj = shard_linear(mlp.down_proj, "sharded-to-all", group=group)


def _shard_experts(moe: SparseMoeBlock, group: mx.distributed.Group) -> None:
    # In place, so that one sum in the block serves the routed and the shared experts.
    mlp: nn.Module
    for mlp in (moe.switch_mlp, moe.shared_experts):
        shard_inplace(mlp.gate_proj, "all-to-sharded", group=group)
        shard_inplace(mlp.up_proj, "all-to-sharded", group=group)
        shard_inplace(mlp.down_proj, "sharded-to-all", group=group)
    moe.sharding_group = group
