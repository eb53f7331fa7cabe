"""Quantized weights and bfloat16 activations in mlx-vlm: exact choices, and logits as near as can be."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from tests.hosts import sixteen_bits as bf16
from tests.vlm.test_vlm_cache_sequences import clone
from tests.vlm.test_vlm_kv_quantization import quantized_caches, rounded_caches
from tests.vlm.vlm_runs import BUDGET, text

PROMPT, DECODED = BUDGET + 16, 3
# Row ``r`` of a ragged batch lacks its first ``4 r`` tokens.
PADDING = [4 * row for row in range(bf16.PROMPTS)]


@pytest.fixture(scope="module")
def twins(checkpoint: Path) -> tuple[Any, Any]:
    """In bfloat16 and in float32, with the same 8-bit weights."""
    from mlx_vlm.utils import load_model

    made = []
    for dtype in (bf16.BF16, mx.float32):
        model = load_model(checkpoint)
        bf16.quantize(model.language_model, 8)
        bf16.give(model.language_model, tree_flatten(model.language_model.parameters()), dtype)
        made.append(model)
    return made[0], made[1]


def prompts() -> mx.array:
    return mx.array([text(PROMPT, row).tokens for row in range(bf16.PROMPTS)])


def run(model: Any, tokens: mx.array, cache: Any = None) -> mx.array:
    return model.language_model(tokens, cache=cache).logits


def prefilled(model: Any, prompt: mx.array, cache: Any, pieces: int = 1) -> mx.array:
    n = prompt.shape[1] - DECODED
    cuts = [n * piece // pieces for piece in range(pieces + 1)]
    return mx.concatenate([run(model, prompt[:, a:b], cache) for a, b in pairwise(cuts)], axis=1)


def decoded(model: Any, prompt: mx.array, cache: Any) -> mx.array:
    n = prompt.shape[1]
    return mx.concatenate([run(model, prompt[:, i : i + 1], cache) for i in range(n - DECODED, n)], axis=1)


def one_pass(model: Any) -> list[mx.array]:
    return [run(model, row[None, n:])[0] for row, n in zip(prompts(), PADDING, strict=True)]


def split(model: Any) -> list[mx.array]:
    logits = []
    for row, n in zip(prompts(), PADDING, strict=True):
        cache = model.make_cache()
        parts = [prefilled(model, row[None, n:], cache, 3), decoded(model, row[None, n:], cache)]
        logits.append(mx.concatenate(parts, axis=1)[0])
    return logits


def merged(model: Any) -> list[mx.array]:
    """Each prompt alone, then decoded in one batch."""
    caches = [model.make_cache() for _ in PADDING]
    parts = zip(prompts(), PADDING, caches, strict=True)
    first = [prefilled(model, row[None, n:], cache)[0] for row, n, cache in parts]
    batch = [type(entries[0]).merge(list(entries)) for entries in zip(*caches, strict=True)]
    last = decoded(model, prompts(), batch)
    return [mx.concatenate(both) for both in zip(first, last, strict=True)]


def left_padded(model: Any) -> list[mx.array]:
    """One batch, padded by a mask, in one pass."""
    mask = mx.arange(PROMPT) >= mx.array(PADDING)[:, None]
    logits = model(prompts(), mask=mask.astype(mx.int32)).logits
    return [row[n:] for row, n in zip(logits, PADDING, strict=True)]


def distances(logits: Any, truth: Any) -> list[float]:
    return [bf16.mean_distance(a, b) for a, b in zip(logits, truth, strict=True)]


def test_choices_of_blocks(twins: tuple[Any, Any]) -> None:
    ours, truth = twins
    with bf16.choices() as made:
        logits = run(ours, prompts()[:1])
        mx.eval(logits)
    assert logits.dtype == bf16.BF16
    layers = zip(ours.language_model.layers, truth.language_model.layers, strict=True)
    in_float32 = {id(a.self_attn): b.self_attn for a, b in layers}
    assert len(made) == 2
    for choice, x, layer in made:
        assert bf16.assert_by_definition(choice) > PROMPT
        n, differing = bf16.assert_near_float32(choice, x, in_float32[id(layer)])
        assert differing < n / 4


@pytest.fixture(scope="module")
def truth(twins: tuple[Any, Any]) -> list[mx.array]:
    return one_pass(twins[1])


@pytest.fixture(scope="module")
def distances_of_one_pass(twins: tuple[Any, Any], truth: list[mx.array]) -> list[float]:
    return distances(one_pass(twins[0]), truth)


@pytest.mark.parametrize("way", [split, merged, left_padded], ids=lambda way: way.__name__)
def test_every_way_of_caching_is_as_near_as_one_pass(
    twins: tuple[Any, Any],
    way: Callable[..., Any],
    truth: list[mx.array],
    distances_of_one_pass: list[float],
) -> None:
    ours = twins[0]
    with bf16.choices() as made:
        logits = way(ours)
        mx.eval(logits)
    assert {row.dtype for row in logits} == {bf16.BF16}
    assert sum(bf16.assert_by_definition(choice) for choice, *_ in made) > PROMPT
    bf16.assert_no_further(distances(logits, truth), distances_of_one_pass)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_keys_and_values(twins: tuple[Any, Any], bits: int) -> None:
    """As near to float32 as with K and V that are rounded in the same way."""

    def logits(model: Any, cache: Any) -> mx.array:
        parts = [prefilled(model, prompts(), cache, 2), decoded(model, prompts(), cache)]
        return mx.concatenate(parts, axis=1)

    ours, in_float32 = twins
    truth = logits(in_float32, quantized_caches(in_float32, bits, 32))
    found = logits(ours, quantized_caches(ours, bits, 32))
    assert found.dtype == bf16.BF16
    rounded = logits(ours, rounded_caches(ours, bits, 32))
    bf16.assert_no_further(distances(found, truth), distances(rounded, truth))


def test_a_cache_that_was_kept_goes_on_bit_for_bit(twins: tuple[Any, Any]) -> None:
    prompt, model = prompts()[:1], twins[0]
    cache = model.make_cache()
    prefilled(model, prompt, cache)
    kept = clone(cache)
    assert mx.array_equal(decoded(model, prompt, cache), decoded(model, prompt, kept)).item()
