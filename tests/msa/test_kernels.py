"""The Metal kernels against the definition, on a CPU: see ``metal_on_cpu``."""

import dataclasses
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from mlx_m3_plugin.msa.kernels import attend, choose, scores
from tests.msa import kernel_cases, metal_on_cpu
from tests.msa.kernel_cases import MODELS, Case, Model

# M3's own sizes.
M3 = Model(mx.bfloat16, 128, 128, 128, block_size=128, heads=16, topk=16)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.fixture(autouse=True)
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_on_cpu.metal_kernel)


@pytest.mark.some(6)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_equal_to_the_definition(model: Model, fresh_seed: int, count: Callable[[int, int], int]) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(count(8, 170)):
        case = kernel_cases.draw(model, rng.randrange(2**31))
        try:
            kernel_cases.check(case)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


def small_cases(model: Model) -> list[Case]:
    """A few that meet everything: paddings, offsets inside a block, unused slots, several tiles."""
    n_keys = 7 * model.block_size + model.block_size // 2 + 1
    tiles = {name: values[0] for name, values in kernel_cases.TILES.items()}
    common = {"model": model, "batch": 2, "groups": 3, "n_keys": n_keys, "spare": 4, "tiles": tiles}
    return [
        Case(seed=1, length=12, padding=[3, n_keys // 2], init_blocks=1, unused=1000.0, **common),
        Case(seed=2, length=1, padding=[0, n_keys - 2], **common),
        Case(seed=3, length=12, local_blocks=2, coarse=True, **common),
    ]


# (kernel, text of its source, the same made wrong).
MUTATIONS = [
    (scores, "FEW", BARRIER, ""),
    (scores, "FEW", "key <= at[i]", "key < at[i]"),
    (scores, "FEW", "latest + 1", "latest"),
    (scores, "FEW", "(padding + key)", "key"),
    (scores, "FEW", "four += SIMDGROUPS * 4", "four += SIMDGROUPS * 8"),
    (scores, "FEW", "step < 8", "step < 4"),
    (scores, "FEW", "row < n_rows", "true"),
    (scores, "MANY", BARRIER + "\n        for", "for"),
    (scores, "MANY", BARRIER + "\n\n        for", "for"),
    (scores, "MANY", "all_see_all || key <= first", "all_see_all || key < first"),
    (scores, "MANY", "all_see_all || key <= first", "true || key <= first"),
    (scores, "MANY", "start + BLOCK - 1 <= first", "start <= first"),
    (scores, "MANY", "latest + 1", "latest"),
    (scores, "MANY", "(padding + key)", "key"),
    (scores, "MANY", "key0 + i / D", "start + i / D"),
    (scores, "MANY", "g = row % G, l = row / G", "g = row / L, l = row % L"),
    (scores, "MANY", "ushort(16)", "ushort(8)"),
    (scores, "MANY", "block0 + blocks_per_group,", "block0 + blocks_per_group - 1,"),
    (choose, "CHOOSE", BARRIER, ""),
    (choose, "CHOOSE", "n > own - local_blocks", "n >= own - local_blocks"),
    (choose, "CHOOSE", "n < init_blocks", "n <= init_blocks"),
    (choose, "CHOOSE", "n <= own", "n < own"),
    (choose, "CHOOSE", "offset_strides[0]] + row % L", "offset_strides[0]]"),
    (choose, "CHOOSE", "found_scores[simdgroup * K + i] = score", "found_scores[simdgroup * K + i] = i"),
    (attend, "ATTEND", BARRIER + "\n\n      // Scores", "// Scores"),
    (attend, "ATTEND", BARRIER + "\n\n      // A softmax", "// A softmax"),
    (attend, "ATTEND", BARRIER + "\n\n      // Our channels", "// Our channels"),
    (attend, "ATTEND", "start + key <= at", "start + key < at"),
    (attend, "ATTEND", "key < BLOCK && ", ""),
    (attend, "ATTEND", "if (held != (b * G + g) * sizes[2] + block)", "if (held < 0)"),
    (attend, "ATTEND", "(padding + start + key, d", "(start + key, d"),
    (attend, "ATTEND", "(padding + start + key, channel", "(start + key, channel"),
    (attend, "ATTEND", "if (key < stop && channel < DV)", "if (channel < DV)"),
    (attend, "ATTEND", "largest + log(max(sum, 1.0f))", "largest"),
    (attend, "ATTEND", "of_row[key] - largest", "of_row[key]"),
    (attend, "ATTEND", " * scale", ""),
    (attend, "ATTEND", "(g * HEADS + e / D)", "(g + e / D)"),
    (attend, "ATTEND", "if (block < 0)", "if (block < -1)"),
    (attend, "ATTEND", "row0 + r, channel", "row0 + c, channel"),
    (attend, "ATTEND_QUANTIZED", "start + key <= at", "start + key < at"),
    (attend, "MERGE", "exp(logsum - largest)", "1.0f"),
    (attend, "MERGE", " / max(total, 1.0f)", ""),
    (attend, "MERGE", "if (weight == 0.0f) continue;", ""),
    (attend, "MERGE", "size_t(group) * L + l", "size_t(group) * L"),
]


@pytest.mark.some(10)
@pytest.mark.parametrize(("module", "name", "text", "wrong"), MUTATIONS)
def test_a_wrong_kernel_is_found(
    module: ModuleType, name: str, text: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = getattr(module, name)
    assert text in kernel.source
    monkeypatch.setattr(
        module, name, dataclasses.replace(kernel, source=kernel.source.replace(text, wrong, 1))
    )
    model = {"FEW": MODELS[11], "MANY": MODELS[11], "ATTEND_QUANTIZED": MODELS[2]}.get(name, MODELS[0])
    cases = small_cases(model)
    with pytest.raises((AssertionError, metal_on_cpu.KernelError)):
        any(kernel_cases.check(case) for case in cases)


def arrays(dtype: mx.Dtype = mx.bfloat16, heads: int = 16, dims: int = 128) -> dict[str, mx.array]:
    keys = mx.zeros((1, 1, 256, dims), dtype)
    return {"queries": mx.zeros((1, heads, 1, dims), dtype), "keys": keys, "values": keys}


@pytest.mark.parametrize(
    ("reason", "changed", "options"),
    [
        (None, {}, {}),
        ("head size 20 of K", arrays(dims=20), {}),
        ("head size 136 of K", arrays(dims=136), {}),
        ("head size 12 of V", {"values": mx.zeros((1, 1, 256, 12), mx.bfloat16)}, {}),
        ("queries in mlx.core.float16, K in", {"queries": mx.zeros((1, 16, 1, 128), mx.float16)}, {}),
        ("only one of K and V", {"keys": kernel_cases.quantize(mx.zeros((1, 1, 256, 128)), 8, 32)}, {}),
        ("33 blocks", {}, {"k": 33}),
        ("blocks of 1024 keys", {}, {"block_size": 1024}),
        (None, arrays(heads=40), {}),
        ("41 heads", arrays(heads=41), {}),
        ("32 heads", arrays(mx.float32, heads=32), {}),
    ],
)
def test_what_attention_does_not_take(reason: str | None, changed: dict, options: dict) -> None:
    found = attend.supports_attention(**arrays() | changed, **{"block_size": 128, "k": 16} | options)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_the_most_heads_that_fit_into_threadgroup_memory() -> None:
    model = Model(mx.bfloat16, 128, 128, 8, block_size=128, heads=40, topk=2)
    kernel_cases.check(Case(model, seed=1, groups=1, n_keys=300))
    with pytest.raises(metal_on_cpu.KernelError, match="threadgroup memory"):
        kernel_cases.check(Case(dataclasses.replace(model, heads=41), seed=1, groups=1, n_keys=300))


def test_what_selection_does_not_take() -> None:
    queries, keys = mx.zeros((1, 4, 1, 128), mx.bfloat16), mx.zeros((1, 1, 9, 128), mx.bfloat16)
    assert scores.supports_scores(queries, keys) is None
    assert "float32" in (scores.supports_scores(queries.astype(mx.float32), keys) or "")
    assert "100" in (scores.supports_scores(queries[..., :100], keys[..., :100]) or "")
    assert choose.supports_choice(32) is None
    assert "33 blocks" in (choose.supports_choice(33) or "")


@pytest.mark.parametrize(("length", "kernels"), [(1, 4), (64, 4)])
def test_lazy_and_compiled_once_for_all_tokens(
    length: int, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, templates and dtypes of a call decide what is compiled; ``mx.compile`` forbids eval."""
    calls: list[tuple[Any, ...]] = []

    def metal_kernel(name: str, **_: Any) -> Callable[..., list[mx.array]]:
        def run(**call: Any) -> list[mx.array]:
            dtypes = [(x.dtype, x.size < metal_on_cpu.CONSTANT_BELOW) for x in call["inputs"]]
            calls.append((name, *call["template"], call["threadgroup"], *dtypes))
            return [mx.zeros(*of) for of in zip(call["output_shapes"], call["output_dtypes"], strict=True)]

        return run

    def layer(case: Case) -> mx.array:
        x = {name: case.given(name) for name in case.clean}
        of_block, positions = {"block_size": 128}, (case.offset, case.left_padding)
        found = scores.block_scores(
            x["index_queries"],
            x["index_keys"],
            case.offset,
            case.left_padding,
            n_keys=case.n_keys,
            **of_block,
        )
        ids = choose.choose_blocks(found, case.offset, k=16, local_blocks=1, init_blocks=0, **of_block)
        return attend.attend_blocks(
            x["queries"], x["keys"], x["values"], ids, *positions, scale=0.1, **of_block
        )

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    first: list[tuple[Any, ...]] = []
    for n_keys in (3000, 3001, 3200):
        case = Case(M3, seed=0, groups=4, length=length, n_keys=n_keys, batch=2, padding=[0, 9])
        calls.clear()
        mx.compile(lambda case=case: layer(case))()
        first = first or list(calls)
        assert len(calls) == kernels
        assert calls == first


M3_8_BITS = dataclasses.replace(M3, quantization=(8, 64))
REAL_SIZES = [
    Case(M3, seed=1, groups=4, length=1, n_keys=8190, spare=66),
    Case(M3, seed=2, groups=4, length=1, n_keys=3000, batch=2, padding=[0, 700]),
    Case(M3, seed=3, groups=4, length=4, n_keys=4100),
    Case(M3, seed=4, groups=4, length=150, n_keys=4001, spare=95),
    Case(M3_8_BITS, seed=5, groups=4, length=9, n_keys=2600),
]


def test_sizes_of_m3(count: Callable[[int, int], int]) -> None:
    for case in REAL_SIZES[: count(1, len(REAL_SIZES))]:
        kernel_cases.check(case)
