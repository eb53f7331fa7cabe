"""Training with stock mlx-lm and the plugin, past the block budget: what torch's autograd gives."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import needles
import numpy as np
import pytest
import torch
from answers import prompt_of
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from sizes import BUDGET
from transformers import MiniMaxM3SparseForConditionalGeneration

from mlx_m3_plugin.toolbox.demo import NANO
from tests.checkpoints.layouts import LAYOUTS
from tests.checkpoints.layouts.reading import source_of
from tests.live import oracle

TOLERANCE = 1e-4
SHAPES = ("as_published", "two_local_blocks", "no_local_block", "single_group")

STEPS, RATE = 30, 1e-3
LORA: dict[str, Any] = {"rank": 4, "scale": 2.0, "dropout": 0.0}
# Of the attention, in both libraries' names.
LORA["keys"] = [f"self_attn.{name}_proj" for name in "qkvo"]


def torch_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def without_indexer(parameters: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name: array for name, array in parameters.items() if ".index_" not in name}


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: str, seed: int, tmp_path: Path) -> None:
    reference = oracle.make_oracle(oracle.SHAPES[shape], seed)
    assert not reference.ties
    reference.save(tmp_path / "model")
    model = load_model(tmp_path / "model")[0].train()
    tokens = mx.array(reference.tokens[None])
    lengths = mx.array([[0, tokens.shape[1]]])
    (loss, _), found = nn.value_and_grad(model, default_loss)(model, tokens, lengths)

    expected_loss = torch_loss(reference.model, torch.tensor(reference.tokens)[None])
    expected_loss.backward()
    assert abs(loss.item() - expected_loss.item()) <= 1e-5
    # As a checkpoint whose weights are the gradients: so they get our names and our arrangement.
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    reference.save(tmp_path / "gradients")
    expected = dict(tree_flatten(load_model(tmp_path / "gradients")[0].parameters()))
    found = dict(tree_flatten(found))
    trained = without_indexer(found)
    for name, gradient in trained.items():
        if name.endswith("e_score_correction_bias"):
            # A choice has no derivative; in transformers it is no parameter.
            assert not mx.abs(gradient).max().item()
            continue
        largest = mx.abs(expected[name]).max().item()
        assert largest > 0, name
        assert mx.abs(gradient - expected[name]).max().item() <= TOLERANCE * largest, name
    assert len(trained) > 20
    indexers = found.keys() - trained.keys()
    assert indexers
    assert not any(mx.abs(array[name]).max().item() for name in indexers for array in (found, expected))


class TorchLoRA(torch.nn.Module):
    """mlx-lm's ``LoRALinear`` with the same first matrix."""

    def __init__(self, linear: torch.nn.Linear, a: mx.array, b: mx.array):
        super().__init__()
        self.linear = linear
        self.a = torch.nn.Parameter(torch.tensor(np.array(a)))
        self.b = torch.nn.Parameter(torch.tensor(np.array(b)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + LORA["scale"] * (x @ self.a @ self.b)


def batches(tokenizer: Any, seed: int) -> list[np.ndarray]:
    """The ends of three prompts, again and again."""
    rng, length = random.Random(seed), 2 * BUDGET
    cases = [needles.draw(rng, 4 * BUDGET, lambda text: len(text.split()))[0] for _ in range(3)]
    ids = [tokenizer.encode(prompt_of(tokenizer, case), add_special_tokens=False) for case in cases]
    return [np.array([row[-length:]]) for row in ids] * (STEPS // 3)


def test_thirty_steps_lower_the_loss_as_far(fresh_seed: int, tmp_path: Path) -> None:
    LAYOUTS["published_float"].write(tmp_path / "nano", source_of(NANO))
    model, tokenizer = load(str(tmp_path / "nano"))[:2]
    data = batches(tokenizer, fresh_seed)
    mx.random.seed(fresh_seed)
    model.freeze()
    linear_to_lora_layers(model, -1, LORA)

    reference = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        tmp_path / "nano", dtype=torch.float32
    )
    reference.requires_grad_(False).train()
    for number, layer in enumerate(model.layers):
        theirs = reference.model.language_model.layers[number].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            of_ours = getattr(layer.self_attn, name)
            setattr(theirs, name, TorchLoRA(getattr(theirs, name), of_ours.lora_a, of_ours.lora_b))

    expected = []
    adam = torch.optim.Adam([p for p in reference.parameters() if p.requires_grad], lr=RATE)
    for batch in data:
        adam.zero_grad()
        loss = torch_loss(reference, torch.tensor(batch))
        loss.backward()
        adam.step()
        expected.append(loss.item())

    found: list[float] = []

    class Report:
        on_val_loss_report = staticmethod(lambda _: None)
        on_train_loss_report = staticmethod(lambda report: found.append(report["train_loss"]))

    def given(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for batch in data:
            yield mx.array(batch), mx.array([[0, batch.shape[1]]] * len(batch))

    arguments = TrainingArgs(
        batch_size=1, iters=STEPS, steps_per_report=1, adapter_file=str(tmp_path / "adapters.safetensors")
    )
    optimizer = optimizers.Adam(learning_rate=RATE, bias_correction=True)
    # On a CPU, compiling a step takes longer than all of them.
    mx.disable_compile()
    try:
        train(model, optimizer, None, args=arguments, iterate_batches=given, training_callback=Report())
    finally:
        mx.enable_compile()
    assert len(found) == len(expected) == STEPS
    drops = [np.mean(losses[:3]) - np.mean(losses[-3:]) for losses in (found, expected)]
    assert drops[1] > 0.1
    assert math.isclose(*drops, rel_tol=0.05)
