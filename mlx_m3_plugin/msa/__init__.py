"""MiniMax Sparse Attention (MSA) as functions of arrays.  Imports ``mlx.core`` and nothing else.

Source of the formulas: "MiniMax Sparse Attention", arXiv 2606.13392, equations 5 to 8, and
``MiniMaxM3VLIndexer`` of transformers 5.23.

Every function here works in *content positions*: the first token of a row has position 0,
however much padding is before it in the cache, and block ``b`` of a row holds that row's
tokens ``b * block_size`` to ``(b + 1) * block_size - 1``.

``tests/msa/reference.py`` is the plain definition that both functions are tested against.
"""

from .attend import attend
from .common import KeysValues, Offset, Padding, Quantized, arange, fused
from .select import select_blocks

__all__ = [
    "KeysValues",
    "Offset",
    "Padding",
    "Quantized",
    "arange",
    "attend",
    "fused",
    "select_blocks",
]
