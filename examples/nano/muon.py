"""Muon: momentum whose matrices are made orthogonal (Jordan et al., 2024; with Moonshot's scale, 2025).

torch has one, in bfloat16 and for single matrices; on CPUs without bfloat16 it takes a sixth of a step here.
This is float32, and takes the stacked matrices of experts.
"""

from collections.abc import Iterable
from typing import Any

import torch

MOMENTUM = 0.95
# Of the quintic polynomial that drives all singular values towards 1; its author's numbers.
A, B, C, ITERATIONS = 3.4445, -4.7750, 2.0315, 5


class Muon(torch.optim.Optimizer):
    """For parameters ``[..., m, n]``; the size of updates is that of AdamW's, so that both share a rate.

    Kernels of convolutions, which have more than three axes, are matrices of outputs by all that they read.
    """

    def __init__(self, parameters: Iterable[Any], lr: float, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.flatten(1) if parameter.ndim > 3 else parameter.grad
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(gradient))
                momentum.lerp_(gradient, 1 - MOMENTUM)
                update = orthogonal(gradient.lerp(momentum, MOMENTUM))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(update.shape[-2:]) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * size)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """``[..., m, n]``: the nearest orthogonal matrices, roughly, by Newton-Schulz iterations."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        squared = x @ x.mT
        x = A * x + (B * squared + C * squared @ squared) @ x
    return x.mT if tall else x
