"""Feed-forward layers: the dense MLP, the router, and the mixture of experts."""

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients

from ..msa import fused
from .config import TextConfig
from .host import Host


@fused
def swiglu_oai(gate: mx.array, up: mx.array, alpha: float, limit: float) -> mx.array:
    """``g * sigmoid(alpha * g) * (u + 1)`` with ``g = min(gate, limit)``, ``u = clip(up, -limit, limit)``.

    The gate is clamped from above only (``MiniMaxM3VLDenseMLP`` of transformers 5.23).
    """
    gate = mx.minimum(gate, limit)
    up = mx.clip(up, -limit, limit)
    return gate * mx.sigmoid(alpha * gate) * (up + 1)


class SwiGLUOAI(nn.Module):
    """:func:`swiglu_oai` in the argument order of the hosts' ``SwitchGLU``: up first, then gate."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self._alpha = config.swiglu_alpha
        self._limit = config.swiglu_limit

    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        return swiglu_oai(gate, up, self._alpha, self._limit)


class DenseMLP(nn.Module):
    """The MLP of a dense layer, and the shared expert of a mixture layer."""

    def __init__(self, hidden: int, inter: int, *, activation: SwiGLUOAI):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inter, bias=False)
        self.up_proj = nn.Linear(hidden, inter, bias=False)
        self.down_proj = nn.Linear(inter, hidden, bias=False)
        self.activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.activation(self.up_proj(x), self.gate_proj(x)))


class SparseMoeBlock(nn.Module):
    """``routed_scaling_factor * sum_e p_e * expert_e(x) + shared_expert(x)``."""

    def __init__(self, config: TextConfig, host: Host | None = None):
        super().__init__()
        hidden, activation = config.hidden_size, SwiGLUOAI(config)
        self.num_experts_per_tok = config.num_experts_per_tok
        self.routed_scaling_factor = config.routed_scaling_factor
        self.gate = nn.Linear(hidden, config.num_local_experts, bias=False)
        self.e_score_correction_bias = mx.zeros((config.num_local_experts,))
        self.switch_mlp = (host or config.host).SwitchGLU(
            hidden, config.intermediate_size, config.num_local_experts, activation=activation
        )
        self.shared_experts: DenseMLP | None = None
        if config.n_shared_experts:
            self.shared_experts = DenseMLP(hidden, config.shared_intermediate_size, activation=activation)
        self.sharding_group: mx.distributed.Group | None = None

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Choose experts for tokens ``[N, D]``.

        The product is in float32, the dtype in which the checkpoints store the router.  The
        correction bias takes part in the choice only, not in the weights.

        Returns:
            Expert ids ``[N, k]`` and their float32 weights ``[N, k]``, which sum to
            ``routed_scaling_factor``.
        """
        k = self.num_experts_per_tok
        scores, costs = _scores_and_costs(self.gate(x.astype(mx.float32)), self.e_score_correction_bias)
        experts = mx.stop_gradient(mx.argpartition(costs, kth=k - 1, axis=-1)[..., :k])
        weights = mx.take_along_axis(scores, experts, axis=-1)
        return experts, _shares(weights, weights.sum(axis=-1, keepdims=True), self.routed_scaling_factor)

    def __call__(self, x: mx.array) -> mx.array:
        if self.sharding_group is not None:
            x = sum_gradients(self.sharding_group)(x)
        tokens = x.reshape(-1, x.shape[-1])
        experts, weights = self.route(tokens)
        y = _weighted(self.switch_mlp(tokens, experts), weights[..., None]).sum(axis=-2)
        y = _sum_as(y, 0 if self.shared_experts is None else self.shared_experts(tokens), x)
        if self.sharding_group is not None:
            y = mx.distributed.all_sum(y, group=self.sharding_group)
        return y.reshape(x.shape)


@fused
def _scores_and_costs(logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """Scores of experts, and what to choose the smallest of."""
    scores = mx.sigmoid(logits.astype(mx.float32))
    return scores, -(scores + bias.astype(mx.float32))


@fused
def _shares(weights: mx.array, total: mx.array, scale: float) -> mx.array:
    # 1e-20 is below every real sum; it keeps a token whose scores all underflow finite.
    return weights / (total + 1e-20) * scale


@fused
def _weighted(outputs: mx.array, weights: mx.array) -> mx.array:
    return outputs.astype(mx.float32) * weights


@fused
def _sum_as(routed: mx.array, shared: mx.array | int, like: mx.array) -> mx.array:
    return (routed + shared).astype(like.dtype)
