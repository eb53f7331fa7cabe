"""The Metal kernels of this package on a CPU: :func:`metal_kernel` stands in for ``mx.fast.metal_kernel``.

It compiles the very same source with g++, or with the clang of the ``ziglang`` wheel, against ``metal.hpp``,
and runs it.  It proves indices, masks, barriers, address spaces and sums.  It proves nothing of speed, of
registers, or that Apple's compiler takes the text.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HEADER = Path(__file__).with_name("metal.hpp")
# Smaller inputs are in Metal's constant address space, as in mlx/backend/common/metal_kernel.cpp.
CONSTANT_BELOW = 8
MAX_THREADS = 1024
STACK_BYTES = 64 << 10  # of a thread

TYPES = {
    mx.float32: "float",
    mx.bfloat16: "bfloat16_t",
    mx.float16: "float16_t",
    mx.int32: "int",
    mx.uint32: "uint32_t",
}
# What MLX adds to the signature where the source has the name.
ATTRIBUTES = {
    "simdgroup_index_in_threadgroup": ("uint", "number / 32"),
    "thread_index_in_simdgroup": ("uint", "number % 32"),
    "thread_index_in_threadgroup": ("uint", "number"),
    "threadgroup_position_in_grid": ("uint3", "position"),
}
OTHER_ATTRIBUTES = """
    dispatch_quadgroups_per_threadgroup dispatch_simdgroups_per_threadgroup dispatch_threads_per_threadgroup
    grid_origin grid_size quadgroup_index_in_threadgroup quadgroups_per_threadgroup simdgroups_per_threadgroup
    thread_execution_width thread_index_in_quadgroup thread_position_in_grid thread_position_in_threadgroup
    threadgroups_per_grid threads_per_grid threads_per_simdgroup threads_per_threadgroup
""".split()

# By kernel: the outputs, and each element in device memory once for each threadgroup that reads it.
bytes_moved: Counter[str] = Counter()


class KernelError(Exception):
    """A kernel did what Metal leaves undefined or forbids."""


class CompileError(Exception):
    """The text is wrong; also where a pointer to one address space meets one to another."""


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
) -> Callable[..., list[mx.array]]:
    """As ``mx.fast.metal_kernel``.  The result evaluates its inputs and computes at once.

    Inputs whose strides the source asks for get an arbitrary layout with NaN in the gaps, if
    ``ensure_row_contiguous`` is False.
    """
    assert not atomic_outputs

    def run(
        *,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, Any]] = (),
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        if len(inputs) != len(input_names) or len(output_shapes) != len(output_names):
            raise KernelError(f"{name}: inputs or outputs are missing")
        if threadgroup[1:] != (1, 1) or not 0 < threadgroup[0] <= MAX_THREADS or grid[0] % threadgroup[0]:
            raise KernelError(f"{name}: threadgroup {threadgroup} in grid {grid}")
        rng = np.random.default_rng(len(source) + sum(a.size for a in inputs))
        views = []
        for input_name, x in zip(input_names, inputs, strict=True):
            strided = not ensure_row_contiguous and f"{input_name}_strides" in source
            views.append(_with_any_layout(_numpy(x), rng) if strided else np.ascontiguousarray(_numpy(x)))
        outputs = []
        for shape, dtype in zip(output_shapes, output_dtypes, strict=True):
            if init_value is None:
                words = np.dtype(f"u{dtype.size}")
                outputs.append(np.full(shape, np.iinfo(words).max, words))  # NaN, and -1
            else:
                outputs.append(_numpy(mx.full(shape, init_value, dtype)))

        text = _program(name, input_names, inputs, output_names, output_dtypes, source, header, template)
        pointers: list[Any] = []
        for view in views:
            base = view.base if view.base is not None else view
            shape = np.array(view.shape or (1,), dtype=np.int32)
            strides = np.array(view.strides or (1,), dtype=np.int64) // view.itemsize
            pointers += [view, base, base.size, np.zeros(base.size, np.int32), shape, strides]
        for output in outputs:
            pointers += [output, np.zeros(output.size, np.int32), output.size]
        arguments = (ctypes.c_void_p * len(pointers))(
            *(p.ctypes.data if isinstance(p, np.ndarray) else p for p in pointers)
        )
        groups = (ctypes.c_int * 3)(grid[0] // threadgroup[0], grid[1], grid[2])
        library = _library(text)
        backwards = int(rng.integers(2))
        stacks = ctypes.c_void_p(_stacks().ctypes.data)
        error = library.run(arguments, groups, threadgroup[0], backwards, stacks, STACK_BYTES)
        if error:
            raise KernelError(f"{name}: {error.decode()}")
        bytes_moved[name] += library.bytes_read() + sum(output.nbytes for output in outputs)
        return [_mlx(output, dtype) for output, dtype in zip(outputs, output_dtypes, strict=True)]

    return run


def _numpy(x: mx.array) -> np.ndarray:
    """A copy; of bfloat16 its bits."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def _mlx(x: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(x).view(dtype)


def _with_any_layout(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A view of a larger array with the values of ``x``; NaN in its gaps."""
    axes = rng.permutation(x.ndim)
    size = [x.shape[a] + int(rng.integers(3)) for a in axes]
    larger = np.empty(size, x.dtype)
    larger.view(np.uint8)[...] = 0xFF
    starts = [int(rng.integers(n - x.shape[a] + 1)) for n, a in zip(size, axes, strict=True)]
    view = larger[tuple(slice(s, s + x.shape[a]) for s, a in zip(starts, axes, strict=True))]
    view = view.transpose(np.argsort(axes))
    view[...] = x
    return view


def _program(
    name: str,
    input_names: Sequence[str],
    inputs: Sequence[mx.array],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    source: str,
    header: str,
    template: Sequence[tuple[str, Any]],
) -> str:
    """The kernel as MLX would write it, and a function ``run`` that starts it."""
    parameters, arguments = [], []
    for i, (input_name, x) in enumerate(zip(input_names, inputs, strict=True)):
        dtype = TYPES[x.dtype]
        view, base, size, readers, shape, strides = (f"arguments[{6 * i + j}]" for j in range(6))
        if x.ndim == 0:
            parameters.append(f"const {dtype} {input_name}")
            arguments.append(f"*(const {dtype}*){view}")
            continue
        space = "constant_space" if x.size < CONSTANT_BELOW else "device_space"
        pointer = f"emulator::pointer<emulator::{space}, const {dtype}>"
        parameters.append(f"{pointer} {input_name}")
        data = f"(const {dtype}*)"
        end = f"{data}{base} + (int64_t){size}"
        arguments.append(f"{pointer}{{{data}{view}, {data}{base}, {end}, (int*){readers}}}")
        for what, field, c_type in (("shape", shape, "int"), ("strides", strides, "int64_t")):
            if f"{input_name}_{what}" in source:
                parameters.append(f"const {c_type}* {input_name}_{what}")
                arguments.append(f"(const {c_type}*){field}")
    for i, (output_name, output_dtype) in enumerate(zip(output_names, output_dtypes, strict=True)):
        dtype = TYPES[output_dtype]
        values, writers, size = (f"arguments[{6 * len(inputs) + 3 * i + j}]" for j in range(3))
        pointer = f"emulator::output_pointer<{dtype}>"
        parameters.append(f"{pointer} {output_name}")
        arguments.append(f"{pointer}{{({dtype}*){values}, (int*){writers}, 0, (int64_t){size}}}")
    for attribute, (c_type, value) in ATTRIBUTES.items():
        if attribute in source:
            parameters.append(f"{c_type} {attribute}")
            arguments.append(value)
    if missing := [attribute for attribute in OTHER_ATTRIBUTES if re.search(rf"\b{attribute}\b", source)]:
        raise KernelError(f"{name}: the stand-in has no {missing[0]}")
    kinds = [f"{'typename' if isinstance(v, mx.Dtype) else type(v).__name__} {n}" for n, v in template]
    values = [TYPES[v] if isinstance(v, mx.Dtype) else str(v).lower() for _, v in template]
    return f"""#include "{HEADER}"
namespace {{
{_with_address_spaces(header)}
template <{", ".join(kinds)}>
void kernel({", ".join(parameters)}) {{
{_with_address_spaces(source)}
}}
static void** arguments;
static uint3 position;
static void one_thread(int number) {{
  kernel<{", ".join(values)}>({", ".join(arguments)});
}}
}}  // namespace
extern "C" const char* run(
    void** a, const int* groups, int threads, int backwards, char* stacks, int64_t stack_bytes) {{
  arguments = a;
  emulator::body = one_thread;
  emulator::set_up(threads, backwards, stacks, stack_bytes);
  for (uint z = 0; z < (uint)groups[2]; z++)
    for (uint y = 0; y < (uint)groups[1]; y++)
      for (uint x = 0; x < (uint)groups[0]; x++) {{
        position = uint3{{x, y, z}};
        if (!emulator::run_threadgroup()) return emulator::message;
      }}
  return nullptr;
}}
extern "C" int64_t bytes_read() {{ return emulator::bytes_read; }}
"""


def _with_address_spaces(text: str) -> str:
    """Arrays and pointers with an address space, which C++ does not have, as types of ``metal.hpp``."""
    types = "float|half|int|uint|bfloat16_t|float16_t|u?int(?:16|32|64)_t|[MPSTVW]|KV"
    for pointer in re.finditer(rf"(?:(\w+) )?\b(?:{types})\s*[*&]\s*\w+\s*[,)=;]", text):
        if pointer[1] not in ("thread", "device", "threadgroup", "constant"):
            raise KernelError(f"a pointer without an address space: {pointer[0]}")
    text = re.sub(
        r"\bthreadgroup (\w+) (\w+)\[([^\]]+)\];",
        r"static emulator::threadgroup_array<\1, (\3)> \2; \2.declare();",
        text,
    )
    text = re.sub(r"\bthreadgroup (\w+)\s*\*", r"emulator::threadgroup_pointer<\1>", text)
    text = re.sub(
        r"\b(const )?(device|constant) (\w+)\s*\*",
        lambda m: f"emulator::pointer<emulator::{m[2]}_space, {m[1] or ''}{m[3]}>",
        text,
    )
    if left := re.search(r"\b(device|threadgroup)\s[^;]*", text):
        raise KernelError(f"the stand-in does not understand: {left[0]}")
    return text


@cache
def compiler() -> tuple[str, ...]:
    """g++ where it is, else the clang of the ``ziglang`` wheel; ``M3_CXX`` names another."""
    if path := os.environ.get("M3_CXX") or shutil.which("g++"):
        return (path,)
    return (sys.executable, "-m", "ziglang", "c++", "-nostdlib++")


@cache
def _stacks() -> np.ndarray:
    return np.empty((MAX_THREADS, STACK_BYTES), np.uint8)


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="metal-on-cpu-")


@cache
def _library(text: str) -> ctypes.CDLL:
    path = Path(_directory().name, hashlib.sha256(text.encode()).hexdigest()[:20])
    path.with_suffix(".cpp").write_text(text)
    command = [*compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", "-fno-exceptions", "-w"]
    made = subprocess.run(
        [*command, path.with_suffix(".cpp"), "-o", path.with_suffix(".so")], capture_output=True, text=True
    )
    if made.returncode:
        raise CompileError(made.stderr[:2000])
    library = ctypes.CDLL(str(path.with_suffix(".so")))
    library.run.restype = ctypes.c_char_p
    library.run.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int] * 2, ctypes.c_void_p, ctypes.c_int64]
    library.bytes_read.restype = ctypes.c_int64
    return library
