"""What the kernels share: making and starting one, positions as arrays, how a simdgroup holds a matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeAlias

import mlx.core as mx

from ..common import Offset

Template: TypeAlias = "list[tuple[str, int | bool | mx.Dtype]]"

SIMDGROUP = 32  # threads
MAX_THREADS = 1024  # of a threadgroup
MAX_THREADGROUP_BYTES = 32 << 10
# Elements after each matrix row in threadgroup memory, so that eight rows lie in different banks.
PADDING = 8

# A simdgroup holds an 8x8 matrix as two elements per thread, (row, column) and (row, column + 1); as in
# mlx/backend/metal/kernels/steel/gemm/mma.h.
# Arrays of matrices are in registers only if their indices are constants: UNROLL.
HELPERS = f"""
#define UNROLL _Pragma("clang loop unroll(full)")

METAL_FUNC int row_in_fragment(uint lane) {{ return int((lane >> 1) & 3) + int((lane >> 2) & 4); }}
METAL_FUNC int column_in_fragment(uint lane) {{ return int(lane & 1) * 2 + int((lane >> 1) & 4); }}

template <typename M, typename V>
METAL_FUNC void set_elements(thread M& matrix, V first, V second) {{
  matrix.thread_elements()[0] = first;
  matrix.thread_elements()[1] = second;
}}
constexpr constant int PADDING = {PADDING};
"""


@dataclass(frozen=True)
class Kernel:
    """A Metal kernel.  MLX makes it at the first call, so that importing needs no Metal.

    Attributes:
        name: unique, also among other packages.
        inputs: names of the arrays in ``source``; see ``mx.fast.metal_kernel`` for what goes with each.
        outputs: likewise.
        source: the body of the kernel.
        header: functions that the body calls.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str = HELPERS

    def __call__(
        self,
        arrays: Sequence[mx.array],
        template: Template,
        groups: tuple[int, int, int],
        threads: int,
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    ) -> list[mx.array]:
        """Start ``groups`` threadgroups of ``threads`` threads; ``outputs`` are shapes and dtypes."""
        kernel = _made(mx.fast.metal_kernel, self)
        return kernel(
            inputs=list(arrays),
            template=template,
            grid=(groups[0] * threads, groups[1], groups[2]),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )


@cache
def _made(metal_kernel: Any, kernel: Kernel) -> Any:
    return metal_kernel(
        name=f"mlx_m3_plugin_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.source,
        header=kernel.header,
        # The cache of several rows is a slice of a larger array.  A copy would cost more than the kernel.
        ensure_row_contiguous=False,
    )


def per_row(position: Offset | None, batch: int) -> mx.array:
    """``[B]`` int32; an int (None is 0) is the same for all rows."""
    return ints(*(position if isinstance(position, list) else [position or 0] * batch))


@lru_cache(256)
def ints(*numbers: int) -> mx.array:
    """An int32 array.  Most are the same for all layers of a step, or for all steps."""
    return mx.array(numbers, dtype=mx.int32)


@lru_cache(16)
def scalar(number: float) -> mx.array:
    return mx.array(number, dtype=mx.float32)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
