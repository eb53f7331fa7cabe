"""``--kv-bits`` takes effect on M3, and costs no more than the rounding of K and V."""

from typing import Any

import mlx.core as mx
import pytest

from tests.vlm.vlm_runs import VLM_VERSION, Request, difference, streamed, text, together

LENGTH = 150  # tokens: more than four budgets
OPTIONS = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}


def quantize(cache: list[Any], bits: float = 8, group_size: int = 32, start: int = 0) -> None:
    """Upstream's function, which its loops call after every step."""
    from mlx_vlm.generate.common import maybe_quantize_kv_cache

    maybe_quantize_kv_cache(cache, quantized_kv_start=start, kv_group_size=group_size, kv_bits=bits)


def rounded_caches(model: Any, bits: int, group_size: int) -> list[Any]:
    """Plain K and V, rounded as quantizing them rounds."""
    from mlx_vlm.models.cache import KVCache

    settings = {"group_size": group_size, "bits": bits}

    class RoundedKVCache(KVCache):
        def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
            rounded = (mx.dequantize(*mx.quantize(x, **settings), **settings) for x in (keys, values))
            return super().update_and_fetch(*rounded)

    dense, *sparse = model.make_cache()
    for entry in sparse:
        entry.kv_cache = RoundedKVCache()
    assert type(dense) is KVCache
    return [RoundedKVCache(), *sparse]


def quantized_caches(model: Any, bits: int, group_size: int) -> list[Any]:
    """From the first token on: quantizing starts with what is there."""
    from mlx_vlm.models.cache import QuantizedKVCache

    from mlx_m3_plugin.hosts.mlx_vlm.cache import QuantizedMiniMaxM3KVCache

    cache: list[Any] = [QuantizedKVCache(group_size=group_size, bits=bits)]
    for _ in range(2):
        cache.append(QuantizedMiniMaxM3KVCache())
        cache[-1].kv_cache = QuantizedKVCache(group_size=group_size, bits=bits)
    return cache


def run(model: Any, cache: list[Any], first: int) -> mx.array:
    """Prefill up to ``first``, in two pieces, then one token at a time."""
    tokens = mx.array([text(LENGTH).tokens])
    pieces = [tokens[:, : first // 2], tokens[:, first // 2 : first]]
    pieces += [tokens[:, i : i + 1] for i in range(first, LENGTH)]
    return mx.concatenate([model.language_model(piece, cache=cache).logits for piece in pieces], axis=1)


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_that_of_quantizing_k_and_v(model: Any, bits: int) -> None:
    quantized = run(model, quantized_caches(model, bits, 32), 140)
    rounded = run(model, rounded_caches(model, bits, 32), 140)
    exact = run(model, model.make_cache(), 140)
    assert difference(quantized, rounded) <= 1e-4
    assert difference(exact, rounded) > 1e-3


def test_upstreams_function_quantizes_every_layer_and_no_index_key(model: Any) -> None:
    cache = model.make_cache()
    model(mx.array([text(LENGTH).tokens]), cache=cache)
    index_keys = [entry.index_keys for entry in cache[1:]]
    quantize(cache, start=LENGTH + 1)
    assert [type(entry).__name__ for entry in cache] == ["KVCache"] + ["MiniMaxM3KVCache"] * 2
    quantize(cache, start=LENGTH)
    assert [type(entry).__name__ for entry in cache] == ["QuantizedKVCache"] + [
        "QuantizedMiniMaxM3KVCache"
    ] * 2
    assert [type(entry.kv_cache).__name__ for entry in cache[1:]] == ["QuantizedKVCache"] * 2
    assert all(entry.index_keys is keys for entry, keys in zip(cache[1:], index_keys, strict=True))
    assert [(entry.offset, entry.index_offset) for entry in cache[1:]] == [(LENGTH, LENGTH)] * 2
    again = list(cache)
    quantize(cache)
    assert all(a is b for a, b in zip(again, cache, strict=True))


def test_quantized_k_and_v_take_a_third_of_the_room(model: Any) -> None:
    cache = model.make_cache()
    model(mx.array([text(LENGTH).tokens]), cache=cache)
    before = [sum(a.nbytes for a in (e.kv_cache.keys, e.kv_cache.values)) for e in cache[1:]]
    quantize(cache)
    after = [sum(a.nbytes for side in (e.kv_cache.keys, e.kv_cache.values) for a in side) for e in cache[1:]]
    # 8 bits, and for 32 of them a scale and a bias in float32; all of it in float32 before.
    assert [a / b for a, b in zip(after, before, strict=True)] == [10 / 32] * 2


def test_generation_quantizes_from_the_first_token_on(model: Any) -> None:
    cache = model.make_cache()
    prompt = text(LENGTH)
    answer = streamed(model, prompt, 6, prompt_cache=cache, **OPTIONS)
    assert [type(e).__name__ for e in cache] == ["QuantizedKVCache"] + ["QuantizedMiniMaxM3KVCache"] * 2
    reference, tokens = model.make_cache(), prompt.tokens
    if VLM_VERSION >= (0, 7, 0):  # it takes the last token of a prompt by itself
        model(mx.array([tokens[:-1]]), cache=reference)
        quantize(reference)
        tokens = tokens[-1:]
    for step in range(6):
        logits = model.language_model(mx.array([tokens]), cache=reference).logits[0, -1]
        quantize(reference)
        assert difference(answer.logits[step], logits) <= 1e-4
        tokens = [int(mx.argmax(logits))]
        assert answer.tokens[step] == tokens[0]


def test_trimming_and_rolling_back(model: Any) -> None:
    tokens = mx.array([text(LENGTH).tokens])
    expected = run(model, quantized_caches(model, 8, 32), 100)[:, 100:]
    cache = quantized_caches(model, 8, 32)
    model(tokens[:, :100], cache=cache)
    model(tokens[:, :9], cache=cache)
    assert [entry.trim(7) for entry in cache] == [7] * 3
    assert model.rollback_speculative_cache(cache, None, 0, 3) == 0
    assert [entry.offset for entry in cache] == [100] * 3
    logits = [model.language_model(tokens[:, i : i + 1], cache=cache).logits for i in range(100, LENGTH)]
    assert difference(mx.concatenate(logits, axis=1), expected) <= 1e-4


def test_a_group_size_that_does_not_fit_is_refused(model: Any) -> None:
    """By upstream's cache of the first layer, a dense one, and by ours of the sparse ones."""
    with pytest.raises(ValueError, match="group size"):
        streamed(model, text(40), 2, kv_bits=8, kv_group_size=64, quantized_kv_start=0)
    cache = model.make_cache()
    model(mx.array([text(40).tokens]), cache=cache)
    with pytest.raises(ValueError, match="does not divide this model's head size of 32"):
        cache[1].to_quantized(group_size=64, bits=8)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64)])
def test_other_bits_than_those_of_a_cache_are_refused(model: Any, bits: int, group_size: int) -> None:
    def go_on(**options: Any) -> Any:
        cache = quantized_caches(model, 8, 32)
        model(mx.array([text(LENGTH).tokens]), cache=cache)
        return streamed(model, text(20, 1), 3, prompt_cache=cache, quantized_kv_start=0, **options)

    with pytest.raises(
        ValueError, match=f"8 bits with a group size of 32, not in {bits} bits with {group_size}"
    ):
        go_on(kv_bits=bits, kv_group_size=group_size)
    assert go_on().tokens == go_on(kv_bits=8, kv_group_size=32).tokens


@pytest.mark.parametrize("bits", [8, 3.5])
@pytest.mark.parametrize("n_rows", [1, 2])
def test_batches_with_quantized_caches_are_refused(model: Any, bits: float, n_rows: int) -> None:
    """There is no quantized batch cache for M3.

    0.6.4 would quantize the dense layers alone, and add the mask of row n to the scores of KV head n.
    """
    requests = [Request(text(60 + 30 * row, row), 3) for row in range(n_rows)]
    with pytest.raises(NotImplementedError, match=r"KV quantization|kv-bits"):
        together(model, requests, **{**OPTIONS, "kv_bits": bits})
