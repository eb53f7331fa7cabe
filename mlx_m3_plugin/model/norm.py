"""RMSNorm with a weight stored around zero, as in Gemma."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..msa import arange, fused
from .config import TextConfig


class GemmaRMSNorm(nn.Module):
    """``x / rms(x) * (1 + weight)`` in float32, returned in the dtype of ``x``.

    ``1 + weight`` is formed in float32: in bfloat16 the sum is rounded so far that about a
    third of all outputs move by one rounding step.  ``weight`` keeps its stored value, so
    that a saved model opens elsewhere.
    """

    def __init__(self, dims: int, eps: float = 1e-6):
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.eps = eps

    def _extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def __call__(self, x: mx.array) -> mx.array:
        return _scaled(mx.fast.rms_norm(x.astype(mx.float32), None, self.eps), self.weight, x)


def norm_heads(x: mx.array, norms: Sequence[GemmaRMSNorm], n_heads: Sequence[int]) -> mx.array:
    """``norms[i]`` of its ``n_heads[i]`` heads of ``x`` ``[B, L, H, D]``, all in one go."""
    normed = mx.fast.rms_norm(x.astype(mx.float32), None, norms[0].eps)
    starts = [sum(n_heads[:i]) for i in range(1, len(n_heads))]
    return _scaled_heads(normed, arange(x.shape[2])[:, None], starts, [norm.weight for norm in norms], x)


@fused
def _scaled(normed: mx.array, weight: mx.array, like: mx.array) -> mx.array:
    return (normed * (1.0 + weight.astype(mx.float32))).astype(like.dtype)


@fused
def _scaled_heads(
    normed: mx.array, head: mx.array, starts: list[int], weights: list[mx.array], like: mx.array
) -> mx.array:
    weight = weights[0]
    for start, following in zip(starts, weights[1:], strict=True):
        weight = mx.where(head >= start, following, weight)
    return (normed * (1.0 + weight.astype(mx.float32))).astype(like.dtype)


def make_norm(config: TextConfig, dims: int) -> nn.Module:
    norm = GemmaRMSNorm if config.use_gemma_norm else nn.RMSNorm
    return norm(dims, eps=config.rms_norm_eps)
