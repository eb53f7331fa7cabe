"""Training with mlx-vlm past the block budget, where a mask says what is padding."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from tests.vlm.vlm_runs import TOLERANCE, difference, text

PROJECTIONS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o"))
# More than the block budget of 32, and than the 16 queries from which pairs are sorted.
LENGTHS = (60, 45)


@pytest.fixture
def trained(model: Any) -> Any:
    """Attention alone is trained."""
    model.freeze()
    layers: list[Any] = model.language_model.model.layers
    for layer in layers:
        layer.self_attn.unfreeze(keys=["weight"])
    yield model
    model.unfreeze()


def gradients(model: Any, tokens: mx.array, mask: mx.array | None) -> dict[str, mx.array]:
    def loss(model: Any) -> mx.array:
        losses = nn.losses.cross_entropy(model(tokens, None, mask).logits[:, :-1], tokens[:, 1:])
        seen = mx.ones_like(losses) if mask is None else mask[:, 1:] * mask[:, :-1]
        return mx.where(seen > 0, losses, 0).sum()

    return dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_padded_batch_are_those_of_its_rows(trained: Any, side: str) -> None:
    rows = [text(length, seed).tokens for seed, length in enumerate(LENGTHS)]
    padding = [[0] * (LENGTHS[0] - length) for length in LENGTHS]
    seen = [[1] * length for length in LENGTHS]
    if side == "left":
        batch, mask = ([p + r for p, r in zip(padding, x, strict=True)] for x in (rows, seen))
    else:
        batch, mask = ([r + p for p, r in zip(padding, x, strict=True)] for x in (rows, seen))
    found = gradients(trained, mx.array(batch), mx.array(mask))
    alone = [gradients(trained, mx.array([row]), None) for row in rows]
    names = [name for name in found if name.endswith(PROJECTIONS) and ".index_" not in name]
    assert len(names) == 3 * len(PROJECTIONS)
    for name in names:
        expected = sum(one[name] for one in alone)
        assert mx.abs(expected).max().item() > 1e-3
        assert difference(found[name], expected) <= TOLERANCE, name
