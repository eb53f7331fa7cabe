"""Ties in the choice of blocks, which no specification orders.

Two computations of the same scores differ by rounding.  Where the k-th and the next score of a
query are closer than that, both choices are right, and what follows from them cannot be compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlx_m3_plugin.msa import engine
from tests.msa import reference

# Scores of these models are of the order of 10, and their rounding of 1e-6.
TIE = 2e-6


class ClosestChoice:
    """The smallest gap between a last chosen and a first rejected block so far."""

    gap = float("inf")

    @property
    def is_tie(self) -> bool:
        return self.gap < TIE


def gap_of(scores: mx.array, k: int) -> float:
    """The smallest gap in block scores ``[..., n_blocks]`` of which ``k`` are chosen."""
    if scores.shape[-1] <= k:
        return float("inf")
    ordered = mx.sort(scores, axis=-1)
    last, next_ = ordered[..., -k], ordered[..., -k - 1]
    return mx.where(mx.isfinite(last) & mx.isfinite(next_), last - next_, mx.inf).min().item()


@contextmanager
def closest_choice() -> Iterator[ClosestChoice]:
    """Watches the choices of models that run rows without padding."""
    closest, select_blocks = ClosestChoice(), engine.select_blocks

    def watched(
        index_queries: mx.array, index_keys: mx.array, offset: int, left_padding: Any = None, *, setup: Any
    ) -> mx.array:
        assert left_padding is None
        settings = setup.selection
        k = settings.pop("topk_blocks")
        query_at = mx.arange(offset, offset + index_queries.shape[2])[None]
        scores = reference.block_scores(index_queries, index_keys, query_at, None, **settings)
        closest.gap = min(closest.gap, gap_of(scores, k))
        return select_blocks(index_queries, index_keys, offset, left_padding, setup=setup)

    engine.select_blocks = watched
    try:
        yield closest
    finally:
        engine.select_blocks = select_blocks
