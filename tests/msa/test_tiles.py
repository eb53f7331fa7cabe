"""The engine against the plain definition: any shape, padding and tile size, 1e-5."""

import io
import itertools
import math
from collections.abc import Callable

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_m3_plugin.msa import Quantized, attend, select_blocks
from mlx_m3_plugin.msa.attend import FORMS
from mlx_m3_plugin.msa.common import in_sequence
from tests.msa import reference

TOLERANCE = 1e-5
# From a single key and query per tile up to everything at once.
BUDGETS = st.sampled_from([1, 3_000, 40_000, 1 << 26])


@st.composite
def cases(draw: st.DrawFn) -> dict:
    block_size, topk = draw(st.sampled_from([1, 2, 5, 8])), draw(st.integers(1, 5))
    local = draw(st.integers(0, min(2, topk)))
    n_keys = draw(st.integers(1, (topk + 5) * block_size))
    return {
        "batch": draw(st.integers(1, 4)),
        "groups": draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 3)),
        "n_keys": n_keys,
        "length": draw(st.one_of(st.integers(1, n_keys), st.just(n_keys), st.just(1))),
        "spare": draw(st.integers(0, 9)),
        "padding": draw(st.lists(st.integers(0, n_keys), min_size=4, max_size=4)),
        "padded": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
        "budget": draw(BUDGETS),
        "form": draw(st.sampled_from([None, *FORMS])),
        "options": {
            "block_size": block_size,
            "topk_blocks": topk,
            "local_blocks": local,
            "init_blocks": draw(st.integers(0, min(2, topk - local))),
        },
    }


def arrays(case: dict, dims: int = 12) -> tuple[mx.array, ...]:
    """Unit-scale queries, keys, values (with spare slots), index queries and index keys."""
    b, g, length, n_keys = (case[k] for k in ("batch", "groups", "length", "n_keys"))
    keys = iter(mx.random.split(mx.random.key(case["seed"]), 5))

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(keys))

    slots = n_keys + case["spare"]
    return (
        normal(b, g * case["heads"], length, 32),
        normal(b, g, slots, 32),
        normal(b, g, slots, 32),
        normal(b, g, length, dims),
        normal(b, 1, n_keys, dims),
    )


def positions(case: dict) -> tuple:
    """The engine's ``(offset, left_padding)`` and the reference's ``(query, key)`` positions."""
    first = case["n_keys"] - case["length"]
    if not case["padded"]:
        return (first, None), (mx.arange(first, first + case["length"])[None], None)
    padding = mx.array(case["padding"][: case["batch"]])
    offset = first - padding
    query = offset[:, None] + mx.arange(case["length"])
    return (offset.tolist(), padding.tolist()), (query, mx.arange(case["n_keys"]) - padding[:, None])


def assert_same_choice(ids: mx.array, expected: mx.array, real: mx.array, scores: mx.array) -> None:
    """The same blocks for every real query, but where the last and the next score are a tie."""
    k = ids.shape[-1]
    same = (mx.sort(ids, axis=-1) == mx.sort(expected, axis=-1)).all(axis=-1, keepdims=True)
    if scores.shape[-1] > k:
        ordered = mx.sort(scores, axis=-1)
        same = same | (ordered[..., -k, None] - ordered[..., -k - 1, None] < 1e-5)
    assert mx.where(real, same, True).all().item()


@pytest.fixture(scope="module")
def sweep(count: Callable[[int, int], int]) -> settings:
    return settings(max_examples=count(60, 1500), deadline=None, suppress_health_check=list(HealthCheck))


def test_equal_to_the_reference(sweep: settings) -> None:
    @sweep
    @given(cases())
    def check(case: dict) -> None:
        q, k, v, iq, ik = arrays(case)
        (offset, padding), (query_at, key_at) = positions(case)
        options, block_size = case["options"], case["options"]["block_size"]
        real = (query_at >= 0)[:, None, :, None]

        expected_ids = reference.select_blocks(iq, ik, query_at, key_at, **options)
        ids = select_blocks(iq, ik, offset, padding, tile_bytes=case["budget"], **options)
        assert ids.dtype == mx.int32
        settings = {name: value for name, value in options.items() if name != "topk_blocks"}
        scores = reference.block_scores(iq, ik, query_at, key_at, **settings)
        assert_same_choice(ids, expected_ids, real, scores)

        n = case["n_keys"]
        expected = reference.attend(
            q, k[:, :, :n], v[:, :, :n], ids, query_at, key_at, block_size=block_size, scale=0.2
        )
        limits = {"tile_bytes": case["budget"], "form": case["form"]}
        out = attend(q, k, v, ids, offset, padding, block_size=block_size, scale=0.2, **limits)
        assert mx.isfinite(out).all().item()
        difference = mx.where(real, mx.abs(out - expected), 0).max().item()
        assert difference <= TOLERANCE

    check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("length", "padded"), itertools.product([1, 7, 300], [False, True]))
def test_every_form_at_any_length(length: int, padded: bool, form: str) -> None:
    case = {
        "batch": 2, "groups": 2, "heads": 2, "n_keys": 333, "length": length, "spare": 5,
        "padding": [13, 200], "padded": padded, "seed": length, "budget": 100_000,
        "options": {"block_size": 8, "topk_blocks": 4, "local_blocks": 1, "init_blocks": 0},
    }  # fmt: skip
    q, k, v, iq, ik = arrays(case)
    (offset, padding), (query_at, key_at) = positions(case)
    ids = select_blocks(iq, ik, offset, padding, tile_bytes=case["budget"], **case["options"])
    limits = {"tile_bytes": case["budget"], "form": form}
    out = attend(q, k, v, ids, offset, padding, block_size=8, scale=0.2, **limits)
    k, v = k[:, :, :333], v[:, :, :333]
    expected = reference.attend(q, k, v, ids, query_at, key_at, block_size=8, scale=0.2)
    real = (query_at >= 0)[:, None, :, None]
    assert mx.where(real, mx.abs(out - expected), 0).max().item() <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize(("dtype", "half_step"), [(mx.float16, 2**-11), (mx.bfloat16, 2**-8)])
def test_sixteen_bits_in_and_out_with_a_float32_softmax(
    dtype: mx.Dtype, half_step: float, length: int, form: str
) -> None:
    case = {"batch": 1, "groups": 2, "heads": 2, "n_keys": 90, "length": length, "spare": 0, "seed": 3}
    q, k, v, iq, ik = (x.astype(dtype) for x in arrays(case))
    first = 90 - length
    options = {"block_size": 8, "topk_blocks": 4}
    ids = select_blocks(iq, ik, first, **options)
    wide = [x.astype(mx.float32) for x in (q, k, v)]
    out = attend(q, k, v, ids, first, block_size=8, scale=0.2, form=form)
    expected = attend(*wide, ids, first, block_size=8, scale=0.2)
    assert out.dtype == dtype
    # The only rounding to 16 bits is that of the result itself.
    error = mx.abs(out.astype(mx.float32) - expected)
    assert (error <= half_step * mx.abs(expected) + 1e-6).all().item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("bits", "group_size"), itertools.product([4, 8], [32]))
@pytest.mark.parametrize(("length", "padded"), itertools.product([1, 40], [False, True]))
def test_quantized_equals_attention_over_what_was_quantized(
    bits: int, group_size: int, length: int, padded: bool, form: str
) -> None:
    case = {
        "batch": 2, "groups": 2, "heads": 2, "n_keys": 90, "length": length, "spare": 6, "padding": [3, 41],
        "padded": padded, "seed": bits,
    }  # fmt: skip
    q, k, v, iq, ik = arrays(case)
    (offset, padding), (query_at, key_at) = positions(case)
    ids = select_blocks(iq, ik, offset, padding, block_size=8, topk_blocks=4)
    quantized = [
        Quantized(*mx.quantize(x, group_size=group_size, bits=bits), group_size, bits) for x in (k, v)
    ]
    out = attend(q, *quantized, ids, offset, padding, block_size=8, scale=0.2, form=form)
    rounded = [x.dequantize()[:, :, :90] for x in quantized]
    expected = reference.attend(q, *rounded, ids, query_at, key_at, block_size=8, scale=0.2)
    real = (query_at >= 0)[:, None, :, None]
    assert mx.where(real, mx.abs(out - expected), 0).max().item() <= TOLERANCE


def test_a_tile_waits_for_the_one_before() -> None:
    """Or MLX may make several at a time, each with its memory."""
    tiles = [(i, mx.ones(3) * i) for i in range(4)]
    results = in_sequence(lambda start, tile: mx.exp(tile), tiles)
    graph = io.StringIO()
    mx.export_to_dot(graph, results[-1])
    assert graph.getvalue().count("Exp") == len(tiles)
    assert [r[0].item() for r in results] == pytest.approx([math.exp(i) for i in range(4)])


def test_memory_does_not_grow_with_the_context() -> None:
    """256 queries, 4 and 16 thousand keys: the tiles stay within a budget of 8 MiB and its slack."""
    peaks = []
    for n_keys in (4096, 16384):
        q = mx.random.normal((1, 8, 256, 32))
        k, v = mx.random.normal((2, 1, 2, n_keys, 32))
        iq, ik = mx.random.normal((1, 2, 256, 32)), mx.random.normal((1, 1, n_keys, 32))
        mx.eval(q, k, v, iq, ik)
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        first = n_keys - 256
        ids = select_blocks(iq, ik, first, block_size=32, topk_blocks=8, tile_bytes=8 << 20)
        mx.eval(attend(q, k, v, ids, first, block_size=32, scale=0.2, tile_bytes=8 << 20))
        peaks.append(mx.get_peak_memory() - before)
    assert max(peaks) <= 2 * (8 << 20)
    assert peaks[1] <= 1.5 * peaks[0]
