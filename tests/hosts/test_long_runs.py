"""Nothing piles up over a long generation: no unevaluated graph, no arrays, no memory."""

import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from tests.hosts.native_mlx_lm import our_model

BUDGET = 3 * 8  # tokens that a query of this model may attend to


@pytest.fixture(scope="module")
def model() -> Any:
    return our_model()


def graph_size(*arrays: mx.array) -> int:
    """Operations that evaluating ``arrays`` would still run."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    return dot.getvalue().count("->")


def test_index_keys_are_evaluated_with_every_token(model: Any) -> None:
    """From below the block budget, where nothing reads them, to far past it.

    Left alone they stay unevaluated, one more buffer per layer and token, until Metal refuses
    (``Resource limit (499000) exceeded``).
    """
    cache = make_prompt_cache(model)
    token = mx.array([[1]])
    for _ in range(4 * BUDGET):
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.eval(token)  # as mlx-lm's loops do: the token, never the cache
        pending = [array for entry in cache for c in entry.caches for array in (c.keys, c.values)]
        assert graph_size(*pending) == 0


def test_live_arrays_and_memory_are_flat(model: Any, count: Callable[[int, int], int]) -> None:
    """Decoding through upstream's loop, cache aside."""
    n_steps = count(500, 20_000)
    warm_up = n_steps // 5
    cache = make_prompt_cache(model)
    samples: list[tuple[int, int, int]] = []
    generation = generate_step(mx.array([1, 2, 3]), model, prompt_cache=cache, max_tokens=n_steps)
    for step, _ in enumerate(generation):
        if step >= warm_up and step % (n_steps // 10) == 0:
            gc.collect()
            held = sum(entry.nbytes for entry in cache)
            samples.append((live_arrays(), mx.get_active_memory() - held, resident_bytes() - held))
    arrays, active, resident = zip(*samples, strict=True)
    assert max(arrays) - min(arrays) <= 8
    assert max(active) - min(active) <= 1 << 20
    # The allocator keeps freed buffers of the growing cache; 64 MiB is far below a leak per step.
    assert resident[-1] - resident[0] <= 64 << 20


def live_arrays() -> int:
    return sum(type(o) is mx.array for o in gc.get_objects())


def resident_bytes() -> int:
    if not Path("/proc/self/statm").exists():
        return 0  # macOS: MLX's own count above has to do
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
