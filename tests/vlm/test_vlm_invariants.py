"""The checks that mlx-vlm has for every model and cache, asked of ours."""

import io
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest

from tests.checkpoints.tiny_layouts import LAYOUTS
from tests.checkpoints.tiny_model import tiny
from tests.vlm.vlm_runs import BUDGET, TOLERANCE, difference, fresh_logits, has_checkpoints, text


def filled(n: int = 5, seed: int = 0) -> Any:
    """A sparse layer's entry with ``n`` tokens."""
    from mlx_m3_plugin.hosts.mlx_vlm.cache import make_layer_cache

    entry = make_layer_cache(True)
    append(entry, n, seed)
    return entry


def append(entry: Any, n: int, seed: int) -> tuple[mx.array, mx.array, mx.array]:
    draws = [
        mx.random.normal((1, heads, n, 8), key=mx.random.key(3 * seed + i))
        for i, heads in enumerate((2, 2, 1))
    ]
    held = entry.update_and_fetch(*draws[:2])
    return (*held, entry.update_index_and_fetch(draws[2]))


def assert_same_entry(a: Any, b: Any) -> None:
    """What they hold, and what they make of the next tokens."""
    assert type(a).__name__ == type(b).__name__ == "MiniMaxM3KVCache"
    assert (a.offset, a.index_offset) == (b.offset, b.index_offset)
    for x, y in zip(append(a, 3, 9), append(b, 3, 9), strict=True):
        assert mx.array_equal(x, y)


# --- cached = full ---


@pytest.mark.parametrize("splits", [(100,), (1, 2, 3), (BUDGET,), (7, 8, 100, 101, 160)], ids=str)
def test_cached_forward_matches_full(model: Any, splits: tuple[int, ...]) -> None:
    tokens = mx.array([text(203).tokens])
    cache = model.make_cache()
    bounds = [0, *splits, 203]
    pieces = [tokens[:, a:b] for a, b in pairwise(bounds)]
    logits = mx.concatenate([model(piece, cache=cache).logits for piece in pieces], axis=1)
    assert difference(logits[0], fresh_logits(model, text(203))) <= TOLERANCE


def test_cached_forward_matches_full_token_by_token(model: Any) -> None:
    tokens, cache = mx.array([text(70).tokens]), model.make_cache()
    logits = [model.language_model(tokens[:, i : i + 1], cache=cache).logits for i in range(70)]
    assert difference(mx.concatenate(logits, axis=1)[0], fresh_logits(model, text(70))) <= TOLERANCE


def test_selection_is_at_work(model: Any) -> None:
    """All of this is at lengths where attention to everything would give other logits."""
    tokens = mx.array([text(203).tokens])
    layers = [layer.self_attn for layer in model.layers if layer.self_attn.is_sparse_attn]
    expected = model(tokens).logits
    for attention in layers:
        attention.is_sparse_attn = False
    try:
        dense = model(tokens).logits
    finally:
        for attention in layers:
            attention.is_sparse_attn = True
    assert difference(dense[:, : BUDGET - 8], expected[:, : BUDGET - 8]) <= TOLERANCE
    assert difference(dense[:, -1], expected[:, -1]) > 0.1


def test_index_keys_are_evaluated_with_every_token(model: Any) -> None:
    """From below the block budget, where nothing reads them, to beyond it.

    Left alone they stay unevaluated, one more buffer per layer and token, until Metal refuses.
    """
    cache, token = model.make_cache(), mx.array([[1]])
    for _ in range(2 * BUDGET):
        token = mx.argmax(model.language_model(token, cache=cache).logits[:, -1:], axis=-1)
        mx.eval(token)  # as mlx-vlm's loops do: the token, never the cache
        assert graph_size(*(entry.index_keys for entry in cache[1:])) == 0


def graph_size(*arrays: mx.array) -> int:
    """Operations that evaluating ``arrays`` would still run."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    return dot.getvalue().count("->")


# --- sanitize twice = once ---


@pytest.mark.parametrize(
    "layout",
    [
        "published_float",
        "transformers_in_memory",
        "mxfp8_official",
        "mlx_fused_129_4bit",
        "mlx_fused_129_oq4",
    ],
)
def test_sanitize_is_idempotent(layout: str) -> None:
    from mlx_vlm.models import minimax_m3_vl

    checkpoint = LAYOUTS[layout].make(source=tiny())
    model = minimax_m3_vl.Model(minimax_m3_vl.ModelConfig.from_dict(checkpoint.config))
    once = model.sanitize(dict(checkpoint.tensors))
    twice = model.sanitize(dict(once))
    assert not once.keys() <= checkpoint.tensors.keys()
    assert twice.keys() == once.keys()
    assert [name for name, array in once.items() if not mx.array_equal(array, twice[name])] == []


# --- what the prefix cache asks of an entry ---


@has_checkpoints
def test_an_entry_is_kept_as_a_checkpoint() -> None:
    from mlx_vlm import apc_adapters as adapters

    entry = filled()
    assert adapters.resolve_capability(entry) == adapters.Capability.CHECKPOINT
    assert adapters.apc_exact_eligible(entry)
    assert not adapters.apc_block_eligible(entry)


def clone(entry: Any) -> Any:
    from mlx_vlm import apc_adapters as adapters

    targets: list[mx.array] = []
    made = adapters.clone_cache_entry(entry, min_capacity_tokens=None, eval_targets=targets)
    mx.eval(targets)
    return made


@has_checkpoints
@pytest.mark.parametrize("n", [5, 300])
def test_a_clone_continues_like_the_entry(n: int) -> None:
    entry = filled(n)
    assert_same_entry(clone(entry), entry)


@has_checkpoints
def test_a_clone_is_detached() -> None:
    entry = filled()
    copy = clone(entry)
    append(entry, 4, 7)
    entry.trim(6)
    assert_same_entry(copy, filled())


@has_checkpoints
def test_a_clone_of_an_empty_entry() -> None:
    from mlx_m3_plugin.hosts.mlx_vlm.cache import make_layer_cache

    assert_same_entry(clone(make_layer_cache(True)), make_layer_cache(True))


@has_checkpoints
def test_a_snapshot_is_restored() -> None:
    from mlx_vlm import apc_adapters as adapters

    from mlx_m3_plugin.hosts.mlx_vlm.cache import make_layer_cache

    entry, fresh, adapter = filled(), make_layer_cache(True), adapters.CheckpointAdapter()
    fragment = adapter.capture(entry, prefix_len=5)
    assert fragment is not None
    adapter.restore(fresh, fragment)
    assert_same_entry(fresh, entry)


@has_checkpoints
@pytest.mark.parametrize("lengths", [(5, 5), (3, 9, 0)], ids=str)
def test_entries_merge(lengths: tuple[int, ...]) -> None:
    from mlx_vlm import apc_adapters as adapters

    from mlx_m3_plugin.hosts.mlx_vlm.cache import make_layer_cache

    entries = [filled(n, row) if n else make_layer_cache(True) for row, n in enumerate(lengths)]
    merged = adapters.merge_cache_entries(entries, list(lengths))
    assert type(merged).__name__ == "MiniMaxM3BatchKVCache"
    for row, n in enumerate(lengths):
        if n:
            assert_same_entry(merged.extract(row), filled(n, row))


def test_quantized_entries_are_restored_from_snapshots() -> None:
    from mlx_m3_plugin.hosts.mlx_vlm.cache import QuantizedMiniMaxM3KVCache

    draw = mx.random.normal((1, 2, 9, 32), key=mx.random.key(1))
    entry = _quantized(draw)
    fresh = QuantizedMiniMaxM3KVCache()
    fresh.prefix_cache_restore(entry.prefix_cache_snapshot())
    assert (fresh.offset, fresh.index_offset) == (9, 9)
    for held in (entry, fresh):
        held.update_and_fetch(draw[:, :, :2], draw[:, :, :2])
        held.update_index_and_fetch(draw[:, :1, :2])
    for x, y in zip(entry.kv_cache.keys, fresh.kv_cache.keys, strict=True):
        assert mx.array_equal(x[:, :, :11], y[:, :, :11])
    assert mx.array_equal(entry.index_keys[:, :, :11], fresh.index_keys[:, :, :11])


def _quantized(draw: mx.array) -> Any:
    from mlx_m3_plugin.hosts.mlx_vlm.cache import make_layer_cache

    entry = make_layer_cache(True)
    entry.update_and_fetch(draw, draw)
    entry.update_index_and_fetch(draw[:, :1])
    return entry.to_quantized(group_size=32, bits=8)
