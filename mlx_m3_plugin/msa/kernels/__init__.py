"""MSA in Metal kernels, for bfloat16, float16, float32 and quantized K and V on Apple GPUs.

:func:`block_scores`, :func:`choose_blocks` and :func:`attend_blocks` do what the plain forms in
:mod:`..select` and :mod:`..attend` do.  Each stands beside the source of its kernel, and has a function that
says what it can't take.  They build lazy graphs, and nothing is compiled again while a context grows.
A kernel has no gradient.

What all kernels share: a *row* of a score matrix is one head of one query; a *fragment* is an 8x8 matrix
that the 32 threads of a simdgroup hold together.  Positions are content positions, as everywhere in ``msa``.
"""

from .attend import attend_blocks, supports_attention
from .choose import choose_blocks, supports_choice
from .scores import block_scores, supports_scores

__all__ = [
    "attend_blocks",
    "block_scores",
    "choose_blocks",
    "supports_attention",
    "supports_choice",
    "supports_scores",
]
