"""Quantized models with activations in bfloat16, beside the float32 truth of the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_m3_plugin.model.attention import Attention
from mlx_m3_plugin.msa import engine
from tests.msa import reference

BF16 = mx.bfloat16
UNIT_ROUNDOFF, UNIT_ROUNDOFF_32 = 2.0**-8, 2.0**-24
# Roundings of an index query or key: projection, norm; cosine or sine, product and sum of the rotation.
ROUNDINGS = 5
# Independent roundings add up like a random walk: further than so many deviations once in 10^8 (Higham and
# Mary, "A new approach to probabilistic rounding error analysis", 2019).
DEVIATIONS = 6
# To compare two ways of computing the same.
PROMPTS = 6


def quantize(model: Any, bits: int) -> None:
    """All matrices but the router, which stays in float32 as in the checkpoints."""
    nn.quantize(
        model,
        group_size=32,
        bits=bits,
        class_predicate=lambda name, module: hasattr(module, "to_quantized") and not name.endswith(".gate"),
    )


def _cast(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    is_router = name.endswith((".gate.weight", "e_score_correction_bias"))
    return array if array.dtype == mx.uint32 or is_router else array.astype(BF16).astype(dtype)


def give(model: Any, weights: list[tuple[str, mx.array]], dtype: mx.Dtype) -> Any:
    """``model`` with ``weights``, which are rounded to bfloat16 whatever the dtype of activations."""
    model.load_weights([(name, _cast(name, array, dtype)) for name, array in weights])
    return model


def randomize(model: Any, seed: int) -> None:
    """Weights that make attention peaked and every norm, bias and expert matter; logits near 1."""
    rng = np.random.default_rng(seed)

    def draw(name: str, array: mx.array) -> mx.array:
        scale = 0.3 if array.ndim == 1 else 1.0 if "embed" in name else array.shape[-1] ** -0.5
        return mx.array(rng.normal(0, scale, array.shape).astype(np.float32))

    model.load_weights([(name, draw(name, array)) for name, array in tree_flatten(model.parameters())])


class Choice(NamedTuple):
    """One layer's call of ``select_blocks``."""

    index_queries: mx.array
    index_keys: mx.array
    offset: Any
    left_padding: Any
    options: dict[str, int]
    ids: mx.array

    def expected(self, queries: mx.array, keys: mx.array) -> tuple[mx.array, mx.array]:
        """Scores of blocks by the definition, and ids by them, of these float32 arrays."""
        query_at, key_at = self.positions()
        options = {name: value for name, value in self.options.items() if name != "topk_blocks"}
        scores = reference.block_scores(queries, keys, query_at, key_at, **options)
        return scores, reference.select_blocks(queries, keys, query_at, key_at, **self.options)

    def positions(self) -> tuple[mx.array, mx.array | None]:
        length, n_keys = self.index_queries.shape[2], self.index_keys.shape[2]
        offset = mx.array(self.offset).reshape(-1, 1) + mx.arange(length)
        if self.left_padding is None:
            return offset, None
        return offset, mx.arange(n_keys) - mx.array(self.left_padding)[:, None]

    def assert_as(self, queries: mx.array, keys: mx.array, margin: mx.array | float) -> tuple[int, int]:
        """The ids are those of the definition, but where scores lie within ``margin`` ``[B, G, L]``.

        Returns how many queries were compared and how many choices differ.
        """
        scores, expected = self.expected(queries, keys)
        k = self.ids.shape[-1]
        differ = (mx.sort(self.ids, axis=-1) != mx.sort(expected, axis=-1)).any(axis=-1)
        is_token = mx.broadcast_to(self.positions()[0][:, None] >= 0, differ.shape)
        differ = differ & is_token
        if scores.shape[-1] > k:
            ordered = mx.sort(scores, axis=-1)
            gap = ordered[..., -k] - ordered[..., -k - 1]
            assert not (differ & ~(gap <= margin)).any().item()
        else:
            assert not differ.any().item()
        return int(is_token.sum()), int(differ.sum())


@contextmanager
def choices() -> Iterator[list[tuple[Choice, mx.array, Any]]]:
    """All choices of blocks, with the input of the layer and the layer."""
    made: list[tuple[Choice, mx.array, Any]] = []
    select_blocks, call = engine.select_blocks, Attention.__call__
    now: list[Any] = []

    def watched_call(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        now[:] = [x, layer]
        return call(layer, x, mask, cache)

    def watched(
        queries: mx.array, keys: mx.array, offset: Any, padding: Any = None, *, setup: Any
    ) -> mx.array:
        ids = select_blocks(queries, keys, offset, padding, setup=setup)
        made.append((Choice(queries, keys, offset, padding, setup.selection, ids), *now))
        return ids

    engine.select_blocks, Attention.__call__ = watched, watched_call
    try:
        yield made
    finally:
        engine.select_blocks, Attention.__call__ = select_blocks, call


def assert_by_definition(choice: Choice) -> int:
    """Equal to the definition on the same bfloat16 numbers, whose products are exact in float32."""
    queries, keys = (x.astype(mx.float32) for x in (choice.index_queries, choice.index_keys))
    largest = mx.linalg.norm(keys, axis=-1).max()
    # Each of two sums of D products, in any order.
    margin = 2 * 2 * queries.shape[-1] * UNIT_ROUNDOFF_32 * mx.linalg.norm(queries, axis=-1) * largest
    n, _ = choice.assert_as(queries, keys, margin)
    return n


def assert_near_float32(choice: Choice, x: mx.array, layer_32: Any) -> tuple[int, int]:
    """Of one pass without padding: as the layer in float32 chooses for the same input, within rounding."""
    # Index keys and index queries.
    _, _, keys, queries = layer_32._heads(x.astype(mx.float32), 0, x.shape[1])
    # The deviation of a score is that of its products: |q_i k_i|, summed in squares.
    squares = (mx.square(queries) @ mx.square(keys).swapaxes(-1, -2)).max(axis=-1)
    deviation = UNIT_ROUNDOFF * mx.sqrt(2 * ROUNDINGS * squares)
    # Two scores.
    return choice.assert_as(queries, keys, 2 * DEVIATIONS * deviation)


def mean_distance(a: mx.array, b: mx.array) -> float:
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).mean().item()


def assert_no_further(distances: list[float], plain: list[float]) -> None:
    """Distances to the truth of several prompts are not larger on average than those of another way.

    Two ways with the same roundings in another order are two draws from one distribution.  Their means
    differ by more than six standard errors once in a thousand times (Student's t of six prompts).  The
    deviation is taken from the other way alone, so that an error cannot hide in its own deviation.
    """
    assert len(distances) == len(plain) >= PROMPTS
    standard_error = (2 / len(plain)) ** 0.5 * np.std(plain, ddof=1)
    assert np.mean(distances) - np.mean(plain) <= 6 * standard_error
