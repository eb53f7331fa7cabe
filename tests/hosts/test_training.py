"""Training with mlx-lm past the block budget gives what its own M3 class gives."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_m3_plugin.msa import engine
from tests.hosts.native_mlx_lm import native_twin, needs_native, our_model, tokens

# A query of these models attends to 3 blocks of 8; there are 100 tokens.
BATCH, LENGTHS = tokens(100, 2), mx.array([[0, 100], [0, 60]])


def with_adapters(model: Any) -> Any:
    """LoRA on every linear layer, with adapters that are no zeros."""
    model.freeze()
    linear_to_lora_layers(model, 4, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    rng = np.random.default_rng(3)
    adapters = tree_flatten(model.trainable_parameters())
    values = [(name, mx.array(rng.normal(0, 0.1, a.shape).astype(np.float32))) for name, a in adapters]
    model.load_weights(values, strict=False)
    return model.train()


def loss_and_gradients(model: Any) -> tuple[float, dict[str, mx.array]]:
    (loss, _), gradients = nn.value_and_grad(model, default_loss)(model, BATCH, LENGTHS)
    return loss.item(), dict(tree_flatten(gradients))


def norm(gradients: dict[str, mx.array]) -> float:
    return math.sqrt(sum(mx.square(gradient).sum().item() for gradient in gradients.values()))


def test_every_adapter_gets_a_gradient() -> None:
    _, gradients = loss_and_gradients(with_adapters(our_model()))
    assert all(mx.isfinite(gradient).all().item() for gradient in gradients.values())
    learned = {name for name, gradient in gradients.items() if mx.abs(gradient).max().item() > 1e-4}
    # Choosing blocks has no derivative.
    assert gradients.keys() - learned == {name for name in gradients if ".index_" in name}
    assert len(learned) > 50


@needs_native
def test_loss_and_gradients_are_upstreams() -> None:
    model = our_model()
    native = native_twin(model)
    loss, gradients = loss_and_gradients(with_adapters(model))
    expected_loss, expected = loss_and_gradients(with_adapters(native))
    assert abs(loss - expected_loss) <= 1e-5
    assert abs(norm(gradients) - norm(expected)) <= 1e-5
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert mx.abs(gradient - expected[name]).max().item() <= 1e-5, name


def test_only_training_computes_with_its_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(engine, "with_gradient", lambda serve, *_, **__: calls.append(serve) or serve)
    model = our_model()
    model.eval()(BATCH)
    assert not calls
    model.train()(BATCH)
    # One of each sparse layer.
    assert len(calls) == 3
