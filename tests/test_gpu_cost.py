"""What a layer costs on a GPU does not get worse, and is counted rightly."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_cost
import graph_cost
import kernel_costs
from gpu_count import KERNELS, OURS, Counted, count_library, from_json, to_json
from gpu_forecast import M3_ULTRA, MACHINES, PREFILL, checks, seconds, seconds_of
from gpu_layers import Case, attention_flops, bound
from graph_cost import Work, as_on_a_gpu, count, given

# Of one layer in bf16 with 4-bit weights: at most so many launches and MB, routed experts apart. These are
# today's figures: lower them with every change that lowers what is counted.
LIMITS = {
    Case(1, 1024): (43, 99.5),
    Case(1, 8192): (55, 122.5),
    Case(1, 131072): (55, 288),
    Case(1, 1 << 20): (62, 1_493),
    Case(1, 8192, padded=True): (55, 122.5),
    Case(1, 8192, rows=8): (56, 298),
    Case(1, 8192, rows=8, padded=True): (60, 303),
    Case(1, 8192, kv_bits=8): (67, 125.1),
    Case(1, 8192, layer="dense"): (24, 205.5),
    Case(512, 8192): (202, 4_490),
    Case(512, 8192, rows=4, padded=True): (642, 17_948),
    Case(512, 8192, kv_bits=8): (220, 4_204),
    Case(2048, 32768): (492, 19_920),
}
# A cache with a meta_state holds values beside the index keys that nothing reads.  until: mlx-lm 0.32
UNREAD = 2 if hasattr(KVCache, "meta_state") else 0
# With kernels, and MB of choosing blocks and attending to them alone.
KERNEL_LIMITS = {
    Case(1, 1024): (43, 99.5),
    Case(1, 8192): (47, 106.5),
    Case(1, 131072): (47, 139),
    Case(1, 1 << 20): (47, 382),
    Case(1, 8192, rows=8, padded=True): (47, 169),
    Case(1, 8192, kv_bits=8): (53, 104.5),
    Case(512, 8192): (74, 1_611),
    Case(2048, 32768): (74, 6_174),
}
PARTS = {
    OURS: {Case(512, 8192): 3_626, Case(2048, 32768): 16_756},
    KERNELS: {Case(512, 8192): 747, Case(2048, 32768): 3_009},
}
# Arithmetic of attention, of what the chosen blocks need.
MOST_ARITHMETIC = 1.1
BF16 = mx.bfloat16


LIMITS_OF = {OURS: LIMITS, KERNELS: KERNEL_LIMITS}


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[Case, Counted]]:
    return {library: count_library(library, list(limits)) for library, limits in LIMITS_OF.items()}


@pytest.fixture(scope="module")
def ours(counts: dict[str, dict[Case, Counted]]) -> dict[Case, Counted]:
    return counts[OURS]


@pytest.mark.parametrize(
    ("library", "case"),
    [(library, case) for library, limits in LIMITS_OF.items() for case in limits],
    ids=str,
)
def test_what_a_layer_costs(library: str, case: Case, counts: dict[str, dict[Case, Counted]]) -> None:
    counted, (launches, megabytes) = counts[library][case], LIMITS_OF[library][case]
    assert not counted.missing
    assert counted.launches <= launches + UNREAD
    assert counted.other_bytes / 1e6 <= megabytes
    moved, flops = bound(case)
    # A count below what must be done has missed something.
    assert counted.other_bytes + counted.expert_bytes >= sum(moved.values())
    assert sum(n * work.flops for work, n in counted.total.items()) >= flops
    if case.drops_blocks:
        assert 1 <= counted.attention_flops / attention_flops(case) <= MOST_ARITHMETIC


@pytest.mark.parametrize(
    ("library", "case"), [(library, case) for library, parts in PARTS.items() for case in parts], ids=str
)
def test_what_selection_and_attention_cost(
    library: str, case: Case, counts: dict[str, dict[Case, Counted]]
) -> None:
    parts = counts[library][case].parts
    assert set(parts) == {"selection", "attention"}
    megabytes = sum(n * work.bytes for part in parts.values() for work, n in part.items()) / 1e6
    # Not more than the whole layer, which has the same operations in it.
    assert megabytes <= min(PARTS[library][case], counts[library][case].other_bytes / 1e6)


def test_one_token_with_kernels_moves_little_more_than_it_must(
    counts: dict[str, dict[Case, Counted]],
) -> None:
    for context in (131072, 1 << 20):
        case = Case(1, context)
        moved, _ = bound(case)
        assert counts[KERNELS][case].other_bytes <= 1.2 * (sum(moved.values()) - moved["experts"])


# --- counting ---


def work_of(function: Any, *arrays: mx.array) -> Counter[Work]:
    with as_on_a_gpu():
        return count(function, *arrays)


def only(function: Any, *arrays: mx.array) -> Work:
    """The one operation of a graph."""
    ((work, times),) = work_of(function, *arrays).items()
    assert times == 1
    return work


def test_a_product() -> None:
    a, b = given((8, 64), BF16), given((64, 32), BF16)
    assert only(lambda a, b: a @ b, a, b) == Work(
        "Matmul", 2 * (8 * 64 + 64 * 32 + 8 * 32), 2 * 8 * 64 * 32, "16 bits"
    )
    assert only(lambda a, b: a @ b, given((8, 64), mx.float32), given((64, 32), mx.float32)).rate == "float32"


@pytest.mark.parametrize(("rows", "reads"), [(1, 4), (2, 1)])
def test_vectors_read_a_shared_matrix_for_each_head(rows: int, reads: int) -> None:
    queries, keys = given((1, 4, rows, 64), BF16), given((1, 1, 64, 512), BF16)
    moved = 4 * rows * 64 + reads * 64 * 512 + 4 * rows * 512
    assert only(lambda a, b: a @ b, queries, keys).bytes == 2 * moved


def test_a_broadcast_is_read_as_it_is_stored() -> None:
    work = only(lambda a, b: a + b, given((100, 64), mx.float32), given((64,), mx.float32))
    assert work == Work("Add", 4 * (100 * 64 + 64 + 100 * 64))


def test_views_take_nothing_and_a_reshape_that_must_copy_is_a_launch() -> None:
    x = given((4, 6, 8), mx.float32)
    assert not work_of(lambda x: x.reshape(24, 8)[2:].transpose(1, 0)[:, None].squeeze(1), x)
    assert not work_of(lambda x: x[:, :3].reshape(4, 24), given((4, 6, 8), mx.float32)[:, :, :])
    assert only(lambda x: x.transpose(1, 0, 2).reshape(24, 8), x) == Work("Copy", 2 * 4 * 4 * 6 * 8)
    assert only(lambda x: mx.repeat(x, 3, axis=1), x) == Work("Copy", (1 + 3) * 4 * 4 * 6 * 8)


def test_a_compiled_chain_is_one_launch_with_all_its_outputs() -> None:
    def chain(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        total = a + b
        return total, mx.exp(total) * 3

    a, b = given((100, 64), mx.float32), given((64,), mx.float32)
    with as_on_a_gpu():
        compiled = mx.compile(chain)
        moved = 4 * (100 * 64 + 64 + 2 * 100 * 64)
        work = Counter({Work("Compiled", moved + 4): 1})
        assert count(compiled, a, b) == work
        assert sum(count(chain, a, b).values()) == 3


def test_a_compiled_function_is_cut_where_an_operation_is_not_elementwise() -> None:
    def choose(a: mx.array) -> mx.array:
        ids = mx.argpartition(-mx.sigmoid(a), kth=2, axis=-1)[..., :3]
        return mx.take_along_axis(a, ids, axis=-1) / 3 + 1

    with as_on_a_gpu():
        work = count(mx.compile(choose), given((8, 64), mx.float32))
    names = Counter(operation.primitive for operation in work.elements())
    assert names == {"Compiled": 2, "ArgPartition": 1, "GatherAxis": 1}


def test_a_gather_moves_what_it_takes() -> None:
    table, ids = given((1000, 64), BF16), given((7,), mx.int32)
    assert only(lambda t, i: t[i], table, ids) == Work("Gather", 2 * 2 * 7 * 64 + 4 * 7)


def test_an_update_of_a_slice_moves_the_slice() -> None:
    def append(cache: mx.array, new: mx.array) -> mx.array:
        cache[:, 10:12] = new
        return cache

    work = only(append, given((4, 1000, 64), BF16), given((4, 2, 64), BF16))
    assert work == Work("SliceUpdate", 2 * 2 * 4 * 2 * 64)


def test_fused_attention_reads_keys_values_and_mask_once() -> None:
    q, k, v = given((1, 8, 16, 64), BF16), given((1, 2, 100, 64), BF16), given((1, 2, 100, 64), BF16)
    mask = given((16, 100), mx.bool_)

    def attend(mask: Any) -> Any:
        return lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)

    moved = 2 * (2 * 8 * 16 * 64 + 2 * 2 * 100 * 64)
    assert only(attend(mask), q, k, v) == Work(
        "FusedAttention", moved + 1600, 4 * 8 * 16 * 100 * 64, "16 bits"
    )
    # The last of 16 causal queries sees 100 keys, the first 85.
    assert only(attend("causal"), q, k, v) == Work(
        "FusedAttention", moved, 4 * 8 * 64 * sum(range(85, 101)), "16 bits"
    )


def test_a_quantized_product_reads_packed_weights() -> None:
    packed, scales = given((256, 16), mx.uint32), given((256, 2), BF16)

    def product(x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, packed, scales, scales + 0, group_size=64, bits=4)

    (work,) = (w for w in work_of(product, given((3, 128), BF16)) if w.primitive == "QuantizedMatmul")
    weights = 4 * 256 * 16 + 2 * 2 * 256 * 2
    assert work == Work("QuantizedMatmul", weights + 2 * 3 * (128 + 256), 2 * 3 * 128 * 256, "4 bits")


@pytest.mark.parametrize(("is_sorted", "blocks_read"), [(False, 40), (True, 10 * (1 - 0.6**10))])
def test_grouped_products_read_a_block_once_if_pairs_are_sorted(is_sorted: bool, blocks_read: float) -> None:
    blocks, ids = given((10, 64, 32), mx.float32), given((40,), mx.uint32)

    def product(x: mx.array, ids: mx.array) -> mx.array:
        return mx.gather_mm(x, blocks, lhs_indices=ids, rhs_indices=ids, sorted_indices=is_sorted)

    work = only(product, given((40, 2, 64), mx.float32), ids)
    # Four different ones at a time, ten times.
    read = 4 * (40 * 2 * 64 + blocks_read * 64 * 32 + 2 * 40)
    assert work == Work("GatherMM", round(read + 4 * 40 * 2 * 32), 2 * 40 * 2 * 64 * 32, "float32")


def test_experts_are_known_by_their_width() -> None:
    packed, scales, ids = given((8, 64, 256), mx.uint32), given((8, 64, 32), BF16), given((1, 4), mx.uint32)

    def product(x: mx.array, ids: mx.array) -> mx.array:
        return mx.gather_qmm(x, packed, scales, scales, rhs_indices=ids, group_size=64, bits=4)

    (work,) = (w for w in work_of(product, given((1, 1, 1, 2048), BF16), ids) if w.flops)
    assert work.rate == "experts"
    expert = 4 * 64 * 256 + 2 * 2 * 64 * 32
    assert 0 <= work.bytes - 4 * expert - 2 * 4 * (2048 + 64) <= 64


def test_what_one_kernel_does_on_a_gpu_is_one_launch() -> None:
    x, weight = given((4, 8, 64), BF16), given((64,), mx.float32)

    def run(x: mx.array, weight: mx.array) -> tuple[Any, ...]:
        rope = mx.fast.rope(x, 64, traditional=False, base=1e4, scale=1.0, offset=3)
        packed = mx.quantize(x, group_size=64, bits=8)
        return mx.fast.rms_norm(x, weight, 1e-6), rope, mx.softmax(x, axis=-1), mx.dequantize(*packed, bits=8)

    names = Counter(work.primitive for work in work_of(run, x, weight).elements())
    # MLX casts what the norm's weight promotes.
    assert names == dict.fromkeys(("AsType", "RMSNorm", "RoPE", "Softmax", "Quantize", "Dequantize"), 1)


def test_a_contiguous_array_is_not_copied_again() -> None:
    x = given((4, 8), mx.float32)
    assert not work_of(lambda x: mx.contiguous(x), x)
    assert only(lambda x: mx.contiguous(x.T), x) == Work("Contiguous", 2 * 4 * 32)


def call_kernel(x: mx.array) -> mx.array:
    kernel = mx.fast.metal_kernel(name="twice_of_bf16", input_names=["x"], output_names=["y"], source="...")
    threads = {"grid": (64, 1, 1), "threadgroup": (64, 1, 1)}
    return kernel(
        inputs=[x], template=[("T", BF16)], output_shapes=[(2, 64)], output_dtypes=[mx.float32], **threads
    )[0]


def test_a_kernel_costs_what_its_function_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(call: kernel_costs.Kernel) -> tuple[int, int]:
        assert call.template == {"T": BF16}
        return 3 * call.inputs[0].nbytes, 128

    monkeypatch.setitem(kernel_costs.KERNELS, "twice_", cost)
    work = Work("twice_of_bf16", 3 * 128, 128, "kernel")
    assert work_of(lambda x: call_kernel(x) + 1, given((64,), BF16)) == {
        work: 1,
        Work("Add", 4 * (128 + 1 + 128)): 1,
    }


def test_a_kernel_without_a_cost_is_an_error() -> None:
    with pytest.raises(ValueError, match="no cost is known for the Metal kernel 'twice_of_bf16'"):
        work_of(call_kernel, given((64,), BF16))


def test_a_mac_s_device_answers_while_counting_and_only_then() -> None:
    before = mx.compile, mx.default_device(), mx.fast.rms_norm
    assert mx.compile is not graph_cost.compiled
    with as_on_a_gpu():
        assert mx.default_device() == mx.gpu
        assert mx.metal.is_available()
    assert (mx.compile, mx.default_device(), mx.fast.rms_norm) == before


# --- bound, forecast, page ---


def test_the_bound_of_a_token_at_8k() -> None:
    moved, _ = bound(Case(1, 8192))
    # q, o; k, v; index; shared expert; and the float32 router.
    elements = 2 * 6144 * 8192 + 2 * 6144 * 512 + 6144 * 640 + 3 * 6144 * 3072
    assert moved["weights"] == elements * 9 / 16 + 4 * 6144 * 128
    assert moved["experts"] == pytest.approx(4 * 3 * 6144 * 3072 * 9 / 16)
    assert moved["index keys"] == 8193 * 128 * 2
    assert moved["K and V"] == 2 * 4 * 128 * 2048 * 2
    # 15 whole blocks, and one key of the query's own.
    assert attention_flops(Case(1, 8192)) == 4 * 64 * 128 * (15 * 128 + 1)


def test_an_operation_takes_the_longer_of_moving_and_multiplying() -> None:
    assert seconds_of(Work("Add", 819_000_000, launches=0), M3_ULTRA) == pytest.approx(1e-3)
    assert seconds_of(Work("Matmul", 819_000, 17_000_000_000, "16 bits", 0), M3_ULTRA) == pytest.approx(1e-3)
    assert seconds_of(Work("Add", 0), M3_ULTRA) > 0


def test_forms_are_ranked_as_published_times_rank_them(ours: dict[Case, Counted]) -> None:
    """Sorted by block, gathered, dense: 2,048 queries at 32K on an M3 Ultra."""
    case = Case(2048, 32768)
    q, k = given((1, 64, 2048, 128), BF16), given((1, 4, 34816, 128), BF16)
    mask = given((1, 64, 2048, 34816), mx.bool_)

    def dense(q: mx.array, k: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask=mask)

    published = {(queries, context): parts for queries, context, parts in PREFILL}[2048, 32768]
    works = [ours[case].parts["attention"], work_of(dense, q, k)]
    forms = [published["sparse attention"], *(1e3 * seconds(work, M3_ULTRA) for work in works)]
    assert forms == sorted(forms)


def test_the_forecast_is_near_published_times() -> None:
    for check in checks():
        # Index scores of long contexts take twice the time that their products need.
        assert 0.4 < check.off < 1.4, check


def test_the_page(ours: dict[Case, Counted]) -> None:
    cases = [case for case in gpu_cost.MAIN if case in LIMITS]
    missing = {case: Counted(case, missing="not counted") for case in cases}
    results = {OURS: ours, KERNELS: missing, "mlx-lm": missing, "mlx-vlm": missing}
    text = "\n".join(gpu_cost.page(cases, results))
    for line in text.splitlines():
        if line.startswith("| 1 at 8K |"):
            assert f"| {ours[Case(1, 8192)].launches} |" in text
    for case in cases:
        assert f"| {case} |" in text
    for machine in MACHINES:
        assert machine.name in text


def test_counts_survive_json(ours: dict[Case, Counted]) -> None:
    counted = ours[Case(1, 8192)]
    again = from_json(json.loads(json.dumps(to_json(counted))))
    assert (again.case, again.total, again.parts) == (counted.case, counted.total, counted.parts)
