"""``--kv-bits`` takes effect on M3, and costs no more than the rounding of K and V."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step, maybe_quantize_kv_cache
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

from mlx_m3_plugin.hosts.mlx_lm.cache import CacheList
from tests.hosts.native_mlx_lm import TEXT, native_twin, needs_native, our_model

LENGTH = 150  # tokens: six budgets of 3 blocks of 8


@pytest.fixture(scope="module")
def model() -> Any:
    return our_model(head_dim=64, index_head_dim=32)


@pytest.fixture(scope="module")
def tokens() -> mx.array:
    return mx.random.randint(0, TEXT["vocab_size"], (1, LENGTH), key=mx.random.key(1))


class RoundedKVCache(KVCache):
    """Plain K and V, rounded as quantizing them rounds."""

    def __init__(self, group_size: int, bits: int):
        super().__init__()
        self._settings = {"group_size": group_size, "bits": bits}

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        return super().update_and_fetch(*(self._round(x) for x in (keys, values)))

    def _round(self, x: mx.array) -> mx.array:
        return mx.dequantize(*mx.quantize(x, **self._settings), **self._settings)


def cache_of(model: Any, keys_values: Callable[[], KVCache]) -> list[CacheList]:
    return [CacheList(keys_values(), *entry.caches[1:]) for entry in make_prompt_cache(model)]


def run(model: Any, tokens: mx.array, cache: Any, first: int) -> mx.array:
    """Prefill up to ``first``, in two pieces, then one token at a time."""
    pieces = [tokens[:, : first // 2], tokens[:, first // 2 : first]]
    pieces += [tokens[:, i : i + 1] for i in range(first, tokens.shape[1])]
    return mx.concatenate([model(piece, cache=cache) for piece in pieces], axis=1)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_that_of_quantizing_k_and_v(
    model: Any, tokens: mx.array, bits: int, group_size: int
) -> None:
    quantized = run(model, tokens, cache_of(model, lambda: QuantizedKVCache(group_size, bits)), 140)
    rounded = run(model, tokens, cache_of(model, lambda: RoundedKVCache(group_size, bits)), 140)
    exact = run(model, tokens, make_prompt_cache(model), 140)
    assert mx.abs(quantized - rounded).max().item() <= 1e-4
    assert mx.abs(exact - rounded).max().item() > 1e-3


def test_upstreams_function_quantizes_every_layer_and_no_index_key(model: Any, tokens: mx.array) -> None:
    cache = make_prompt_cache(model)
    model(tokens, cache=cache)
    maybe_quantize_kv_cache(cache, LENGTH + 1, 32, 8)
    assert all(type(entry[0]) is KVCache for entry in cache)  # not yet as long as --quantized-kv-start
    maybe_quantize_kv_cache(cache, LENGTH, 32, 8)
    assert [type(entry[0]) for entry in cache] == [QuantizedKVCache] * 4
    assert [type(c) for entry in cache for c in entry.caches[1:]] == [KVCache] * 3
    again = list(cache)
    maybe_quantize_kv_cache(cache, 0, 32, 8)
    assert all(a is b for a, b in zip(again, cache, strict=True))


def test_generation_with_kv_bits_equals_rounded_keys_and_values(model: Any, tokens: mx.array) -> None:
    """Through upstream's loop; 8 bits from the first token on."""
    cache = make_prompt_cache(model)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0, "max_tokens": 10}
    generated = list(generate_step(tokens[0], model, prompt_cache=cache, **options))
    assert all(type(entry[0]) is QuantizedKVCache for entry in cache)
    assert len(generated) == 10
    # The loop takes the prompt but for its last token at once, which attends to K and V as they are.
    prompt, exact = make_prompt_cache(model), make_prompt_cache(model)
    for each in (prompt, exact):
        model(tokens[:, :-1], cache=each)
    rounded = []
    for entry in prompt:
        rounded.append(CacheList(RoundedKVCache(32, 8), *entry.caches[1:]))
        rounded[-1][0].update_and_fetch(*(x[..., : LENGTH - 1, :] for x in (entry[0].keys, entry[0].values)))
    differences, token = [], tokens[:, -1:]
    for chosen, log_probabilities in generated:
        expected, plain = (nn.log_softmax(model(token, cache=c)[0, -1]) for c in (rounded, exact))
        assert mx.abs(log_probabilities - expected).max().item() <= 1e-4
        assert int(chosen) == int(mx.argmax(expected))
        differences.append(mx.abs(plain - expected).max().item())
        token = mx.array([[int(chosen)]])
    assert max(differences) > 1e-3


def test_a_warm_cache_from_a_file_is_quantized_too(model: Any, tokens: mx.array, tmp_path: Path) -> None:
    cache = make_prompt_cache(model)
    model(tokens[:, :100], cache=cache)
    save_prompt_cache(str(tmp_path / "c.safetensors"), cache)
    cache = load_prompt_cache(str(tmp_path / "c.safetensors"))
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0, "max_tokens": 3}
    list(generate_step(tokens[0, 100:], model, prompt_cache=cache, **options))
    assert all(type(entry[0]) is QuantizedKVCache for entry in cache)


def test_a_quantized_cache_survives_saving_and_trimming(model: Any, tokens: mx.array, tmp_path: Path) -> None:
    def quantized() -> list[CacheList]:
        return cache_of(model, lambda: QuantizedKVCache(32, 8))

    expected = run(model, tokens, quantized(), 120)[:, 120:]
    cache = quantized()
    model(tokens[:, :120], cache=cache)
    model(tokens[:, :7], cache=cache)
    for entry in cache:
        entry.trim(7)
    save_prompt_cache(str(tmp_path / "c.safetensors"), cache)
    cache = load_prompt_cache(str(tmp_path / "c.safetensors"))
    assert [type(entry[0]) for entry in cache] == [QuantizedKVCache] * 4
    logits = mx.concatenate([model(tokens[:, i : i + 1], cache=cache) for i in range(120, LENGTH)], axis=1)
    assert mx.abs(logits - expected).max().item() <= 1e-4


def test_a_group_size_that_does_not_fit_is_refused(tokens: mx.array) -> None:
    model = our_model("minimax_m3_vl")
    cache = make_prompt_cache(model)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="does not divide this model's head size of 16"):
        maybe_quantize_kv_cache(cache, 0, 64, 8)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64)])
@pytest.mark.parametrize("start", [0, 5000])
def test_other_bits_than_those_of_a_saved_cache_are_refused(
    model: Any, tokens: mx.array, tmp_path: Path, start: int, bits: int, group_size: int
) -> None:
    cache = cache_of(model, lambda: QuantizedKVCache(32, 8))
    model(tokens[:, :100], cache=cache)
    save_prompt_cache(str(tmp_path / "c.safetensors"), cache)

    def generate(**options: Any) -> list[Any]:
        cache = load_prompt_cache(str(tmp_path / "c.safetensors"))
        options |= {"quantized_kv_start": start, "max_tokens": 3}
        return list(generate_step(tokens[0, 100:], model, prompt_cache=cache, **options))

    with pytest.raises(
        ValueError, match=f"8 bits with a group size of 32, not in {bits} bits with {group_size}"
    ):
        generate(kv_bits=bits, kv_group_size=group_size)
    assert len(generate()) == len(generate(kv_bits=8, kv_group_size=32)) == 3


def test_memory_at_real_head_sizes() -> None:
    """M3's cache, 3 dense layers and 57 sparse ones: K and V take 8.5 bits instead of 16.

    With the index keys, which stay in bfloat16, 8 bits make 0.581 of the whole: at 131,072
    tokens 9.75 GiB instead of 16.78.
    """
    n_tokens = 1024  # a whole number of the cache's steps, so that the ratio is that of any length
    keys, index_keys = (mx.zeros((1, heads, n_tokens, 128), mx.bfloat16) for heads in (4, 1))
    dense, index = KVCache(), KVCache()
    dense.update_and_fetch(keys, keys)
    index.update_and_fetch(index_keys, index_keys[..., :0])
    sparse = CacheList(dense, index)
    plain, quantized = (
        3 * CacheList(kv).nbytes + 57 * CacheList(kv, index).nbytes
        for kv in (dense, sparse.to_quantized(group_size=64, bits=8)[0])
    )
    assert plain / n_tokens == 137_472
    assert sparse.to_quantized(group_size=64, bits=8)[0].nbytes / dense.nbytes == 8.5 / 16
    assert quantized / plain == pytest.approx(0.581, abs=5e-4)


@needs_native
def test_upstream_ignores_it(tokens: mx.array) -> None:
    """A line of the README's table."""
    native = native_twin(our_model())
    cache = native.make_cache()
    native(tokens, cache)
    maybe_quantize_kv_cache(cache, 0, 32, 8)
    assert [type(c) for entry in cache for c in entry.caches] == [KVCache] * 7
