"""Tensor parallelism: every process holds some of the heads and a part of each MLP's width."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear

from .attention import Attention
from .decoder import DecoderLayer
from .moe import DenseMLP, SparseMoeBlock
from .tensor_scales import hold_scale

WIDENING, NARROWING = "all-to-sharded", "sharded-to-all"


class _Part(NamedTuple):
    """A linear layer to shard.

    ``summed``: whether a narrowing layer sums the outputs of the processes itself.
    """

    owner: nn.Module
    name: str
    sharding: str
    summed: bool


def shard_layers(layers: Sequence[DecoderLayer], group: mx.distributed.Group) -> None:
    """Shard decoder layers in place.

    Raises:
        ValueError: heads, widths or quantization groups do not divide by the number of processes,
            or the layers are sharded already.  The layers are then unchanged.
    """
    size = group.size()
    for layer in layers:
        _check_heads(layer.self_attn, size)
        for part in _parts(layer):
            _check_divides(part, size)
    for layer in layers:
        for part in _parts(layer):
            _shard(part, group)
        attention = layer.self_attn
        attention.num_attention_heads //= size
        attention.num_key_value_heads //= size
        if attention.is_sparse_attn:
            attention.index_n_heads //= size
        if layer.is_moe:
            layer.block_sparse_moe.sharding_group = group


def _parts(layer: DecoderLayer) -> Iterator[_Part]:
    attention = layer.self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        yield _Part(attention, name, WIDENING, summed=True)
    if attention.is_sparse_attn:
        # An index head serves one KV group and goes where that goes; the index key is shared.
        yield _Part(attention, "index_q_proj", WIDENING, summed=True)
    yield _Part(attention, "o_proj", NARROWING, summed=True)
    if not layer.is_moe:
        yield from _mlp(layer.mlp, summed=True)
        return
    moe: SparseMoeBlock = layer.block_sparse_moe
    # One sum in the block serves the routed and the shared experts.
    yield from _mlp(moe.switch_mlp, summed=False)
    if moe.shared_experts is not None:
        yield from _mlp(moe.shared_experts, summed=False)


def _mlp(mlp: DenseMLP | Any, *, summed: bool) -> Iterator[_Part]:
    yield _Part(mlp, "gate_proj", WIDENING, summed)
    yield _Part(mlp, "up_proj", WIDENING, summed)
    yield _Part(mlp, "down_proj", NARROWING, summed)


# --- checking ---


def _check_heads(attention: Attention, size: int) -> None:
    heads = {
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_key_value_heads,
    }
    uneven = {name: n for name, n in heads.items() if n % size}
    if uneven:
        raise ValueError(f"{uneven} do not divide by {size} processes; is the model sharded already?")


def _check_divides(part: _Part, size: int) -> None:
    linear = part.owner[part.name]
    if part.sharding == WIDENING:
        count, unit = linear.weight.shape[-2], "rows"
    elif "scales" in linear:
        count, unit = linear.scales.shape[-1], f"quantization groups of {linear.group_size}"
    else:
        count, unit = linear.weight.shape[-1], "columns"
    if count % size:
        raise ValueError(f"{part.name}: {count} {unit} do not divide by {size} processes")


# --- sharding ---


def _shard(part: _Part, group: mx.distributed.Group) -> None:
    linear = part.owner[part.name]
    # Every shard of the matrix has the same one.
    scale = linear.pop("global_scale", None)
    if part.summed:
        sharded = shard_linear(linear, part.sharding, group=group)
        setattr(part.owner, part.name, sharded if scale is None else hold_scale(sharded, scale))
        return
    shard_inplace(linear, part.sharding, group=group)
    if scale is not None:
        linear.global_scale = scale
