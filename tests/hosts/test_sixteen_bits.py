"""Quantized weights and bfloat16 activations in mlx-lm: exact choices, and logits as near as can be."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.utils import load_model

from mlx_m3_plugin.hosts.mlx_lm.cache import CacheList
from mlx_m3_plugin.toolbox.demo import write_nano
from tests.hosts import sixteen_bits as bf16
from tests.hosts.native_mlx_lm import NATIVE, TEXT, config, needs_native, our_module

SIZES = {"head_dim": 32, "index_head_dim": 32}
BUDGET = TEXT["index_block_size"] * TEXT["index_topk_blocks"]
LENGTH = 120


class Twins:
    """A random model in bfloat16 and in float32, with the same quantized weights."""

    def __init__(self, bits: int, seed: int = 0):
        module = our_module()
        self.bits, self.made = bits, []
        for _ in range(2):
            self.made.append(module.Model(module.ModelArgs.from_dict(config(**SIZES))))
        self.draw(seed)

    def draw(self, seed: int) -> None:
        module = our_module()
        source = module.Model(module.ModelArgs.from_dict(config(**SIZES)))
        bf16.randomize(source, seed)
        bf16.quantize(source, self.bits)
        self.weights = tree_flatten(source.parameters())
        for model, dtype in zip(self.made, (bf16.BF16, mx.float32), strict=True):
            if not any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters())):
                bf16.quantize(model, self.bits)
            bf16.give(model, self.weights, dtype)

    @property
    def ours(self) -> Any:
        return self.made[0]

    @property
    def truth(self) -> Any:
        return self.made[1]


def tokens(n: int, seed: int = 1, rows: int = 1) -> mx.array:
    return mx.random.randint(0, TEXT["vocab_size"], (rows, n), key=mx.random.key(seed))


@pytest.fixture(scope="module")
def twins() -> Twins:
    return Twins(8)


def nano_pair(directory: Path, bits: int) -> tuple[Any, Any]:
    write_nano(directory, bits)
    pair = [load_model(directory)[0] for _ in range(2)]
    for model, dtype in zip(pair, (bf16.BF16, mx.float32), strict=True):
        bf16.give(model, tree_flatten(model.parameters()), dtype)
    return pair[0], pair[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_choices_of_blocks(bits: int) -> None:
    twins = Twins(bits)
    check_choices(twins.ours, twins.truth, tokens(LENGTH), n_layers=3)


@pytest.mark.parametrize("bits", [4, 8])
def test_choices_of_nano(bits: int, tmp_path: Path) -> None:
    ours, truth = nano_pair(tmp_path / "nano", bits)
    n_layers = sum(layer.self_attn.is_sparse_attn for layer in ours.layers)
    check_choices(ours, truth, tokens(LENGTH), n_layers)


def check_choices(ours: Any, truth: Any, prompt: mx.array, n_layers: int) -> None:
    with bf16.choices() as made:
        logits = ours(prompt)
        mx.eval(logits)
    assert logits.dtype == bf16.BF16
    assert len(made) == n_layers > 0
    in_float32 = {id(a): b for a, b in zip(ours.layers, truth.layers, strict=True)}
    of_attention = {id(a.self_attn): b.self_attn for a, b in zip(ours.layers, truth.layers, strict=True)}
    assert len(in_float32) == len(of_attention)
    for choice, x, layer in made:
        assert choice.index_queries.dtype == choice.index_keys.dtype == bf16.BF16
        assert bf16.assert_by_definition(choice) > LENGTH
        n, differing = bf16.assert_near_float32(choice, x, of_attention[id(layer)])
        # Most choices are not that close.
        assert differing < n / 4


@needs_native
def test_not_further_from_the_truth_than_upstream() -> None:
    """Below the block budget, where upstream's choice of blocks plays no part."""
    assert NATIVE is not None
    twins = Twins(8)
    stock = NATIVE.Model(NATIVE.ModelArgs.from_dict(config(**SIZES)))
    bf16.quantize(stock, 8)
    ours, theirs = 0.0, 0.0
    for seed in range(50):
        twins.draw(seed)
        bf16.give(stock, twins.weights, bf16.BF16)
        prompt = tokens(BUDGET, seed)
        truth = twins.truth(prompt)
        ours += bf16.mean_distance(twins.ours(prompt), truth) / 50
        theirs += bf16.mean_distance(stock(prompt), truth) / 50
    print(f"mean distance {ours:.4f}, of upstream {theirs:.4f}")
    assert 0 < ours <= theirs


# --- ways of caching ---

PROMPT, DECODED = 52, 3
# Row ``r`` of a ragged batch lacks its first ``4 r`` tokens.
PADDING = [4 * row for row in range(bf16.PROMPTS)]


def prompts() -> mx.array:
    return tokens(PROMPT, rows=bf16.PROMPTS)


def prefilled(model: Any, prompt: mx.array, cache: Any, pieces: int = 1) -> mx.array:
    """Logits of all but the last tokens, in so many pieces."""
    n = prompt.shape[1] - DECODED
    cuts = [n * piece // pieces for piece in range(pieces + 1)]
    return mx.concatenate([model(prompt[:, a:b], cache=cache) for a, b in pairwise(cuts)], axis=1)


def decoded(model: Any, prompt: mx.array, cache: Any) -> mx.array:
    """Logits of the last tokens, one at a time."""
    n = prompt.shape[1]
    steps = [model(prompt[:, i : i + 1], cache=cache) for i in range(n - DECODED, n)]
    return mx.concatenate(steps, axis=1)


def one_pass(model: Any) -> list[mx.array]:
    """Logits of each prompt without its missing tokens."""
    return [model(row[None, n:])[0] for row, n in zip(prompts(), PADDING, strict=True)]


def split(model: Any) -> list[mx.array]:
    logits = []
    for row, n in zip(prompts(), PADDING, strict=True):
        cache = make_prompt_cache(model)
        parts = [prefilled(model, row[None, n:], cache, 3), decoded(model, row[None, n:], cache)]
        logits.append(mx.concatenate(parts, axis=1)[0])
    return logits


def merged(model: Any) -> list[mx.array]:
    """Each prompt alone, then decoded in one batch."""
    caches = [make_prompt_cache(model) for _ in PADDING]
    parts = zip(prompts(), PADDING, caches, strict=True)
    first = [prefilled(model, row[None, n:], cache)[0] for row, n, cache in parts]
    batch = [entries[0].merge(list(entries)) for entries in zip(*caches, strict=True)]
    last = decoded(model, prompts(), batch)
    return [mx.concatenate(both) for both in zip(first, last, strict=True)]


def left_padded(model: Any) -> list[mx.array]:
    """One batch from the first token on."""
    cache = [CacheList(*(BatchKVCache(PADDING) for _ in entry.caches)) for entry in make_prompt_cache(model)]
    parts = [prefilled(model, prompts(), cache, 2), decoded(model, prompts(), cache)]
    logits = mx.concatenate(parts, axis=1)
    return [row[n:] for row, n in zip(logits, PADDING, strict=True)]


def distances(logits: Any, truth: Any) -> list[float]:
    return [bf16.mean_distance(a, b) for a, b in zip(logits, truth, strict=True)]


@pytest.fixture(scope="module")
def truth(twins: Twins) -> list[mx.array]:
    return one_pass(twins.truth)


@pytest.fixture(scope="module")
def distances_of_one_pass(twins: Twins, truth: list[mx.array]) -> list[float]:
    return distances(one_pass(twins.ours), truth)


@pytest.mark.parametrize("way", [split, merged, left_padded], ids=lambda way: way.__name__)
def test_every_way_of_caching_is_as_near_as_one_pass(
    twins: Twins, way: Callable[..., Any], truth: list[mx.array], distances_of_one_pass: list[float]
) -> None:
    with bf16.choices() as made:
        logits = way(twins.ours)
        mx.eval(logits)
    assert {row.dtype for row in logits} == {bf16.BF16}
    assert sum(bf16.assert_by_definition(choice) for choice, *_ in made) > PROMPT
    bf16.assert_no_further(distances(logits, truth), distances_of_one_pass)


class RoundedKVCache(KVCache):
    """Plain K and V, rounded as quantizing them rounds."""

    def __init__(self, bits: int):
        super().__init__()
        self.settings = {"group_size": 32, "bits": bits}

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        rounded = (mx.dequantize(*mx.quantize(x, **self.settings), **self.settings) for x in (keys, values))
        return super().update_and_fetch(*rounded)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_keys_and_values(twins: Twins, bits: int) -> None:
    """As near to float32 as with K and V that are rounded in the same way."""

    def run(model: Any, make: Callable[[], KVCache]) -> mx.array:
        cache = [CacheList(make(), *entry.caches[1:]) for entry in make_prompt_cache(model)]
        parts = [prefilled(model, prompts(), cache, 2), decoded(model, prompts(), cache)]
        return mx.concatenate(parts, axis=1)

    truth = run(twins.truth, lambda: QuantizedKVCache(32, bits))
    logits = run(twins.ours, lambda: QuantizedKVCache(32, bits))
    assert logits.dtype == bf16.BF16
    rounded = run(twins.ours, lambda: RoundedKVCache(bits))
    bf16.assert_no_further(distances(logits, truth), distances(rounded, truth))


@pytest.mark.parametrize("bits", [None, 8])
def test_a_saved_cache_goes_on_bit_for_bit(twins: Twins, tmp_path: Path, bits: int | None) -> None:
    prompt, model = tokens(PROMPT), twins.ours
    cache = make_prompt_cache(model)
    if bits:
        cache = [CacheList(QuantizedKVCache(32, bits), *entry.caches[1:]) for entry in cache]
    prefilled(model, prompt, cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    restored = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert mx.array_equal(decoded(model, prompt, cache), decoded(model, prompt, restored)).item()
