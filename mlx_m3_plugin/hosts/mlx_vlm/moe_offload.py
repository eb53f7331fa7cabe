"""Experts on disk: what ``mlx_vlm.moe_offload`` takes from a checkpoint in mlx-vlm's own layout.

There gate and up are one matrix, and the shared expert is the last of the experts.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_m3_plugin.hosts.mlx_vlm.language import SwitchGLU
from mlx_m3_plugin.model.moe import SparseMoeBlock


class PackedMoeBlock(SparseMoeBlock):
    """Every token takes the last expert, the shared one, with a weight of 1."""

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        experts, weights = super().route(x)
        last = mx.full((x.shape[0], 1), self.e_score_correction_bias.size, experts.dtype)
        one = mx.ones(last.shape, weights.dtype)
        return mx.concatenate([experts, last], axis=-1), mx.concatenate([weights, one], axis=-1)


class FusedExperts(nn.Module):
    """Stands for the experts until ``patch_model`` replaces them: their number and names are read."""

    def __init__(self, n_experts: int, activation: Any):
        super().__init__()
        self.activation = activation
        self.gate_up_proj = SwitchGLU(1, 1, n_experts).gate_proj
        self.down_proj = self.gate_up_proj


def expect_stored_experts(model: Any, directory: Path) -> None:
    """Give the layers of ``model`` the form of the experts that are in ``directory``.

    Raises:
        ValueError: there are more or fewer experts than the model has.
    """
    stored = json.loads((directory / "offload_index.json").read_text())["num_experts"]
    routed = model.text_config.num_local_experts
    if stored - routed not in (0, 1):
        raise ValueError(
            f"{directory}/offload_index.json has {stored} experts a layer, and config.json has {routed}: "
            "repack the checkpoint with mlx_vlm.moe_offload"
        )
    quantization = json.loads((directory / "config.json").read_text()).get("quantization") or {}
    is_fused = any(name.endswith(".gate_up_proj") for name in quantization)
    for block in (layer.block_sparse_moe for layer in model.layers if layer.is_moe):
        if stored > routed:
            block.__class__ = PackedMoeBlock
            block.shared_experts = None
        if is_fused or stored > routed:
            block.switch_mlp = FusedExperts(stored, block.switch_mlp.activation)
