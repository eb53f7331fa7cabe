"""The stand-in for Metal finds what Metal leaves undefined, and computes what Metal computes."""

import mlx.core as mx
import numpy as np
import pytest

from tests.msa.metal_on_cpu import CompileError, KernelError, metal_kernel

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def run(source: str, *inputs: mx.array, size: int = 64, threads: int = 64, dtype: mx.Dtype = mx.float32):
    names = [f"in{i}" for i in range(len(inputs))]
    kernel = metal_kernel("test", names, ["out"], source, ensure_row_contiguous=False)
    outputs = kernel(
        inputs=inputs,
        template=[("T", dtype), ("N", 3), ("YES", True)],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[dtype],
    )
    return outputs[0]


def test_what_threads_of_a_simdgroup_exchange() -> None:
    out = run(
        """
        const int i = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
        const float x = in0[i];
        out[i] = simd_sum(x) + 1000.0f * simd_max(x) + 1000000.0f * simd_min(i)
            + simd_shuffle_xor(x, ushort(5)) / 64.0f + (YES ? N : 0) * simd_shuffle(x, ushort(7));
        """,
        mx.arange(64).astype(mx.float32),
    )
    i = np.arange(64)
    first = i // 32 * 32
    total = np.where(i < 32, 496, 1520)
    expected = total + 1000.0 * (first + 31) + 1e6 * first + (i ^ 5) / 64 + 3 * (first + 7)
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-6)


@pytest.mark.parametrize("transposed", ["false", "true"])
def test_a_product_of_8x8_matrices(transposed: str) -> None:
    a, b = mx.random.normal((2, 8, 8), key=mx.random.key(0)).astype(mx.float16)
    out = run(
        f"""
        const uint lane = thread_index_in_simdgroup;
        // Rows and columns as in mlx/backend/metal/kernels/steel/gemm/mma.h.
        const int row = (lane / 4 & 4) + lane / 2 % 4;
        const int column = (lane / 4 & 2) * 2 + lane % 2 * 2;
        simdgroup_matrix<float16_t, 8, 8> a, b;
        simdgroup_matrix<float, 8, 8> c;
        simdgroup_load(a, in0 + 0, 8);
        simdgroup_load(b, in1 + 0, 8, ulong2(0, 0), {transposed});
        c.thread_elements()[0] = c.thread_elements()[1] = 1.0f;
        simdgroup_multiply_accumulate(c, a, b, c);
        out[row * 8 + column] = c.thread_elements()[0];
        out[row * 8 + column + 1] = c.thread_elements()[1];
        """,
        a,
        b,
        threads=32,
    )
    a, b = (np.array(x.astype(mx.float32)) for x in (a, b))
    expected = a @ (b.T if transposed == "true" else b) + 1
    np.testing.assert_allclose(np.array(out).reshape(8, 8), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sixteen_bits_round_as_in_mlx(dtype: mx.Dtype) -> None:
    x = mx.random.normal((1000,), key=mx.random.key(1)) * 1e-3
    x = mx.concatenate([x, mx.array([0.0, mx.inf, 1 + 2.0**-8, 1 + 2.0**-11, 3e38, 65519.0])])
    source = "for (int i = 0; i < in0_shape[0]; i++) out[i] = T(in0[i * in0_strides[0]]);"
    out = run(source, x, size=x.size, threads=1, dtype=dtype)
    assert mx.array_equal(out, x.astype(dtype)).item()


def test_any_layout_of_an_input_whose_strides_are_asked_for() -> None:
    x = mx.arange(24).reshape(2, 3, 4).astype(mx.float32)
    source = """
        const int i = thread_index_in_threadgroup;
        const int a = i / 12, b = i / 4 % 3, c = i % 4;
        if (i < 24) out[i] = in0[a * in0_strides[0] + b * in0_strides[1] + c * in0_strides[2]];
    """
    assert np.array(run(source, x)[:24]).tolist() == list(range(24))
    contiguous = (
        "const int i = thread_index_in_threadgroup; if (i < 24) out[i] = in0[i] + 0 * in0_strides[0];"
    )
    assert np.array(run(contiguous, x)[:24]).tolist() != list(range(24))


WRITE_SHARED = "threadgroup float shared[64]; const int i = thread_index_in_threadgroup; shared[i] = i;"


@pytest.mark.parametrize(
    ("message", "source"),
    [
        ("without a barrier", f"{WRITE_SHARED} out[i] = shared[i ^ 32];"),
        ("without a barrier", f"{WRITE_SHARED} out[i] = shared[i ^ 1];"),
        ("without a barrier", f"{WRITE_SHARED} {BARRIER} out[i] = shared[i ^ 32]; shared[i] = 0;"),
        ("index 64 of", f"{WRITE_SHARED} {BARRIER} out[i] = shared[i + 1];"),
        ("index 64 of", "out[thread_index_in_threadgroup + 1] = 0;"),
        ("index -1 of", "out[thread_index_in_threadgroup] = in0[int(thread_index_in_threadgroup) - 1];"),
        ("two threads write", "out[thread_index_in_threadgroup / 2] = 0;"),
        ("not all threads reach a barrier", f"if (thread_index_in_threadgroup < 32) {BARRIER}"),
        ("threads of a simdgroup part", f"if (thread_index_in_threadgroup < 16) {BARRIER}"),
        ("threads of a simdgroup part", "if (thread_index_in_simdgroup < 3) out[0] = simd_sum(1.0f);"),
        (
            "bytes of threadgroup memory",
            "threadgroup float a[8000];\n threadgroup int b[200];\n out[0] = a[0] + b[0];",
        ),
        ("has no threads_per_grid", "out[0] = threads_per_grid.x;"),
        ("without an address space", "float x = 0; const float* y = &x; out[0] = *y;"),
        ("does not understand", "device float (*x)[2] = 0;"),
    ],
)
def test_what_metal_leaves_undefined(message: str, source: str) -> None:
    with pytest.raises(KernelError, match=message):
        run(source, mx.zeros((64,)))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        # Fewer than eight elements are in the constant address space.
        ("auto x = in0; const device float* y = x;", "auto x = in0; const constant float* y = x;"),
        ("auto x = in1; const constant float* y = x;", "auto x = in1; const device float* y = x;"),
        (
            "threadgroup float a[8];\n device float* x = a;",
            "threadgroup float a[8];\n threadgroup float* x = a;",
        ),
        ("device float* x = in1;", "const device float* x = in1;"),
        ("float x = out[0];", "float x = in0[0];"),
        (
            "simdgroup_matrix<bfloat16_t, 8, 8> a; simdgroup_load(a, in1 + 0, 8);",
            "simdgroup_matrix<float, 8, 8> a; simdgroup_load(a, in1 + 0, 8);",
        ),
    ],
)
def test_address_spaces_and_types(wrong: str, right: str) -> None:
    run(right, mx.zeros((7,)), mx.zeros((64,)), threads=1)
    with pytest.raises(CompileError):
        run(wrong, mx.zeros((7,)), mx.zeros((64,)), threads=1)


def test_unwritten_output_and_threadgroup_memory_are_nan() -> None:
    out = run("threadgroup float shared[8];\n if (thread_index_in_threadgroup == 3) out[3] = shared[2];")
    assert np.isnan(np.array(out)).all()
