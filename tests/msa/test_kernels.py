"""The Metal kernels against the definition, on a CPU: see ``metal_on_cpu``."""

import random
from collections.abc import Callable

import mlx.core as mx
import pytest

from tests.msa import kernel_cases, metal_on_cpu
from tests.msa.kernel_cases import MODELS, Model


@pytest.fixture(autouse=True)
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_on_cpu.metal_kernel)


@pytest.mark.some(6)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_equal_to_the_definition(model: Model, fresh_seed: int, count: Callable[[int, int], int]) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(count(25, 170)):
        case = kernel_cases.draw(model, rng.randrange(2**31))
        try:
            kernel_cases.check(case)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
