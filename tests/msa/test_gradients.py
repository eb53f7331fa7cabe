"""Training past the block budget: the engine's gradients are those of the definition."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import pytest

from mlx_m3_plugin.msa import attend, select_blocks
from mlx_m3_plugin.msa.attend import FORMS
from mlx_m3_plugin.msa.gradient import with_gradient
from tests.msa import reference

GROUPS, HEADS, DIMS, INDEX_DIMS, N_KEYS = 2, 4, 16, 12, 90
CHOICE = {"block_size": 8, "topk_blocks": 4}
Attention = Callable[..., mx.array]


def arrays(length: int) -> list[mx.array]:
    """Queries, keys, values, index queries, index keys, and what the outputs are multiplied by."""
    keys = iter(mx.random.split(mx.random.key(length), 6))
    shapes = [
        (2, GROUPS * HEADS, length, DIMS),
        (2, GROUPS, N_KEYS, DIMS),
        (2, GROUPS, N_KEYS, DIMS),
        (2, GROUPS, length, INDEX_DIMS),
        (2, 1, N_KEYS, INDEX_DIMS),
        (2, GROUPS * HEADS, length, DIMS),
    ]
    return [mx.random.normal(shape, key=next(keys)) for shape in shapes]


def by_definition(queries, keys, values, index_queries, index_keys, *, padding) -> mx.array:
    first = mx.array([N_KEYS - queries.shape[2]] * 2) - padding
    query_at = first[:, None] + mx.arange(queries.shape[2])
    key_at = mx.arange(N_KEYS) - padding[:, None]
    ids = reference.select_blocks(index_queries, index_keys, query_at, key_at, **CHOICE)
    return reference.attend(queries, keys, values, ids, query_at, key_at, block_size=8, scale=0.25)


def by_the_engine(queries, keys, values, index_queries, index_keys, *, padding, budget, form) -> mx.array:
    first = N_KEYS - queries.shape[2]
    position = ((first - padding).tolist(), padding.tolist()) if padding.any().item() else (first, None)
    ids = select_blocks(index_queries, index_keys, *position, **CHOICE, tile_bytes=budget)
    options = {"block_size": 8, "scale": 0.25, "tile_bytes": budget}

    def forward(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return attend(queries, keys, values, ids, *position, form=form, **options)

    return with_gradient(forward, ids, *position, **options)(queries, keys, values)


def gradients(attention: Attention, inputs: list[mx.array], real: mx.array) -> list[mx.array]:
    *inputs, weights = inputs

    def loss(*inputs: mx.array) -> mx.array:
        return (mx.where(real, attention(*inputs), 0) * weights).sum()

    return mx.grad(loss, argnums=list(range(5)))(*inputs)


@pytest.mark.parametrize("budget", [30_000, 1 << 26], ids=["tiles", "at once"])
@pytest.mark.parametrize("padding", [[0, 0], [0, 7]], ids=["plain", "padded"])
@pytest.mark.parametrize("length", [7, N_KEYS])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_definition(
    form: str, length: int, padding: list[int], budget: int
) -> None:
    inputs, paddings = arrays(length), mx.array(padding)
    real = (mx.arange(N_KEYS - length, N_KEYS) >= paddings[:, None])[:, None, :, None]
    expected = gradients(partial(by_definition, padding=paddings), inputs, real)
    found = gradients(partial(by_the_engine, padding=paddings, budget=budget, form=form), inputs, real)
    for ours, theirs in zip(found, expected, strict=True):
        assert mx.abs(ours - theirs).max().item() <= 1e-5
    assert all(mx.abs(gradient).max().item() > 1e-2 for gradient in found[:3])
    # Which blocks are chosen has no derivative: nothing is learned by the indexer this way.
    assert not any(mx.abs(gradient).max().item() for gradient in found[3:])


def test_a_checkpointed_layer() -> None:
    """As ``mlx_lm.lora --grad-checkpoint`` wraps it."""
    inputs, paddings = arrays(7), mx.array([0, 7])
    ours = partial(by_the_engine, padding=paddings, budget=30_000, form=None)
    expected = gradients(ours, inputs, mx.array(True))
    found = gradients(mx.checkpoint(ours), inputs, mx.array(True))
    for one, other in zip(found, expected, strict=True):
        assert mx.abs(one - other).max().item() <= 1e-6
