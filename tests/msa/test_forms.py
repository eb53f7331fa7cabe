"""Which form of attention serves, for M3's sizes; and what a compiled function must not do."""

import ast
from pathlib import Path

import pytest

import mlx_m3_plugin
from mlx_m3_plugin.msa.attend import CPU, GPU, Work, choose_form

GPU_TILE, CPU_TILE = 512 << 20, 16 << 20
# For rows, queries and context in 16 bits: the form on a GPU and on a CPU.
IN_16_BITS = {
    # Few queries gather what they chose; and short contexts are read whole.
    (1, 1, 131_072): ("by_query", "by_query"),
    (8, 1, 131_072): ("by_query", "by_query"),
    (1, 1, 8_192): ("by_query", "by_query"),
    (1, 64, 4_096): ("densely", "by_pairs"),
    # Many queries share blocks.
    (1, 512, 8_192): ("by_pairs", "by_pairs"),
    (1, 2_048, 32_768): ("by_pairs", "by_pairs"),
    (8, 512, 32_768): ("by_pairs", "by_pairs"),
    # Casts that do not fit beside a tile.
    (1, 2_048, 131_072): ("by_pairs", "by_query"),
    (1, 2_048, 1 << 20): ("by_query", "by_query"),
}
# In float32 nothing is cast, and quantized blocks are multiplied as they are.
WITHOUT_CASTS = {
    (1, 1, 131_072): "by_query",
    (1, 2_048, 32_768): "by_pairs",
    (1, 2_048, 1 << 20): "by_pairs",
}


def work(rows: int, queries: int, context: int, itemsize: int = 2, is_quantized: bool = False) -> Work:
    return Work(rows, 64, 4, queries, context, 2048, 256, itemsize, is_quantized)


@pytest.mark.parametrize(("sizes", "forms"), IN_16_BITS.items())
def test_forms_in_16_bits(sizes: tuple[int, int, int], forms: tuple[str, str]) -> None:
    found = (choose_form(work(*sizes), GPU_TILE, GPU), choose_form(work(*sizes), CPU_TILE, CPU))
    assert found == forms


@pytest.mark.parametrize(("sizes", "form"), WITHOUT_CASTS.items())
def test_forms_without_casts(sizes: tuple[int, int, int], form: str) -> None:
    assert choose_form(work(*sizes, itemsize=4), GPU_TILE, GPU) == form
    assert choose_form(work(*sizes, is_quantized=True), GPU_TILE, GPU) == form
    assert choose_form(work(*sizes, is_quantized=True), CPU_TILE, CPU) == form


def test_padding_is_copied_beside_the_casts() -> None:
    """45,000 slots in 16 bits fit, but not with the copy that padding takes."""
    sizes = work(1, 512, 45_056)
    assert choose_form(sizes, CPU_TILE, CPU) == "by_pairs"
    assert choose_form(sizes._replace(is_padded=True), CPU_TILE, CPU) == "by_query"


def test_compiled_functions_read_no_shapes() -> None:
    """They are traced once for all shapes, and a number read from one would serve for all others."""
    compiled = 0
    for file in Path(mlx_m3_plugin.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(decorator, ast.Name) and decorator.id == "fused"
                for decorator in node.decorator_list
            ):
                compiled += 1
                names = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
                assert not names & {"shape", "size", "ndim", "nbytes"}, f"{file.name}: {node.name}"
    assert compiled > 10
