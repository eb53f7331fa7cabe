"""RMSNorm with a weight stored around zero, as in Gemma."""

import mlx.core as mx
import mlx.nn as nn

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
        scale = 1.0 + self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x.astype(mx.float32), scale, self.eps).astype(x.dtype)


def make_norm(config: TextConfig, dims: int) -> nn.Module:
    norm = GemmaRMSNorm if config.use_gemma_norm else nn.RMSNorm
    return norm(dims, eps=config.rms_norm_eps)
