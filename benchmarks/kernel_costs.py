"""What calls of custom Metal kernels cost, by what their source reads and writes.

Nothing is assumed of caches: what each threadgroup reads counts, also where others read it, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx


class Kernel(NamedTuple):
    """A call: arrays in, ``(shape, dtype)`` of arrays out, and the template's arguments."""

    inputs: list[mx.array]
    outputs: list[tuple[Any, mx.Dtype]]
    template: dict[str, Any]


Cost = Callable[[Kernel], tuple[int, int]]


def cost_of_kernel(name: str) -> Cost:
    """The function that gives ``(bytes, operations)`` of a call.

    Raises:
        ValueError: no function is known for a kernel of this name.
    """
    # Imported here: it imports our package, and the stand-ins for MLX's functions have to come before that.
    import kernel_bytes

    for start, cost in (KERNELS | kernel_bytes.COSTS).items():
        if name.startswith(start):
            return cost
    raise ValueError(
        f"no cost is known for the Metal kernel {name!r}: add it to KERNELS in benchmarks/kernel_costs.py"
    )


def sparse_prefill_of_mlx_vlm(call: Kernel) -> tuple[int, int]:
    """One threadgroup for each query and head, which reads the keys and values of the query's blocks."""
    queries, keys = call.inputs[:2]
    threadgroups = queries.size // queries.shape[-1]
    length, dims = call.template["SELECTED_LENGTH"], call.template["D_SIZE"]
    read = threadgroups * (2 * length + 1) * dims * keys.dtype.size
    return read + queries.nbytes, 4 * threadgroups * length * dims


# The beginning of a kernel's name -> its cost.
KERNELS: dict[str, Cost] = {"minimax_m3_sparse_prefill_1p_": sparse_prefill_of_mlx_vlm}
