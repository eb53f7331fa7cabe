"""Models of transformers with their logits, loaded and run by stock mlx-lm: equal at every position."""

import inspect
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    CacheList,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from tests.model import golden_models
from tests.model.golden_models import Golden, batch_cache, load_golden

# Rows of a batch: prefixes of the prompt, whose padding is no multiple of any block size here.
ROW_LENGTHS = [109, 58, 120, 7, 97]


@pytest.fixture(scope="module", params=golden_models.NAMES)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return load_golden(request.param, tmp_path_factory.mktemp(request.param))


def test_stock_mlx_lm_makes_our_class(golden):
    assert type(golden.model).__module__ == "mlx_lm.models.minimax_m3_vl"
    assert "mlx_m3_plugin" in Path(inspect.getfile(type(golden.model))).parts


def test_at_most_one_position_in_a_thousand_is_left_out(golden):
    assert 1000 * len(golden.ties) <= len(golden.tokens)


def test_sparse_layers_have_more_blocks_than_their_budget(golden):
    config = golden.model.args.text_config
    blocks = len(golden.tokens) / config.index_block_size
    assert blocks >= 3 * config.index_topk_blocks or "minimax_m3_sparse" not in config.layer_types


def test_one_pass_without_a_cache(golden):
    golden.check(golden.run(golden.tokens), 0)


@pytest.mark.parametrize(
    "lengths",
    [(120,), (64, 56), (8,) * 15, (1, 2, 3, 50, 1, 63), (37, 1, 1, 1, 44, 36), (119, 1)],
    ids=str,
)
def test_pieces(golden, lengths):
    cache = make_prompt_cache(golden.model)
    pieces = np.split(golden.tokens, np.cumsum(lengths)[:-1])
    golden.check(np.concatenate([golden.run(piece, cache) for piece in pieces]), 0)


@pytest.mark.parametrize("prefill", [1, 43])
def test_token_by_token_after_a_prefill(golden, prefill):
    cache = make_prompt_cache(golden.model)
    golden.check(golden.run(golden.tokens[:prefill], cache), 0, stop=prefill)
    for position in range(prefill, len(golden.tokens)):
        logits = golden.run(golden.tokens[position : position + 1], cache)
        golden.check(logits, position, stop=position + 1)


@pytest.mark.parametrize("kept", [3, 45, 99])
def test_trim_and_continue(golden, kept):
    cache = make_prompt_cache(golden.model)
    golden.run(golden.tokens[:kept], cache)
    golden.run(golden.tokens[-29:], cache)
    assert trim_prompt_cache(cache, 29) == 29
    golden.check(golden.run(golden.tokens[kept : kept + 1], cache), kept, stop=kept + 1)
    golden.check(golden.run(golden.tokens[kept + 1 :], cache), kept + 1)


@pytest.mark.parametrize("kept", [3, 45, 99])
def test_prompt_cache_through_a_file(golden, kept, tmp_path):
    cache = make_prompt_cache(golden.model)
    golden.run(golden.tokens[:kept], cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    cache = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    golden.check(golden.run(golden.tokens[kept : kept + 1], cache), kept, stop=kept + 1)
    golden.check(golden.run(golden.tokens[kept + 1 :], cache), kept + 1)


def left_padded(golden: Golden) -> tuple[mx.array, list[int]]:
    width = max(ROW_LENGTHS)
    padding = [width - length for length in ROW_LENGTHS]
    rows = [
        [0] * pad + golden.tokens[:length].tolist() for pad, length in zip(padding, ROW_LENGTHS, strict=True)
    ]
    return mx.array(rows), padding


@pytest.mark.parametrize("lengths", [(120,), (64, 56), (17, 1, 1, 61, 40)], ids=str)
def test_left_padded_batch_equals_its_rows(golden, lengths):
    batch, padding = left_padded(golden)
    cache = batch_cache(golden.model, padding)
    ends = np.cumsum(lengths).tolist()
    pieces = [golden.model(batch[:, end - n : end], cache) for n, end in zip(lengths, ends, strict=True)]
    logits = np.array(mx.concatenate(pieces, axis=1))
    for row, pad, length in zip(logits, padding, ROW_LENGTHS, strict=True):
        golden.check(row[pad:], 0, stop=length)


def test_rows_merged_after_their_prefill(golden):
    n_more = 4
    caches = []
    for length in ROW_LENGTHS:
        caches.append(make_prompt_cache(golden.model))
        golden.run(golden.tokens[: length - n_more], caches[-1])
    merged = [CacheList.merge(list(layer)) for layer in zip(*caches, strict=True)]
    for step in range(n_more):
        next_tokens = golden.tokens_at(*(length - n_more + step for length in ROW_LENGTHS))
        for row, length in zip(np.array(golden.model(next_tokens, merged)), ROW_LENGTHS, strict=True):
            position = length - n_more + step
            golden.check(row, position, stop=position + 1)


def test_right_padded_prefill_of_a_batch(golden):
    """How mlx-lm's batch generation prefills: padded on the right, then rolled to the left."""
    lengths = [length - 1 for length in ROW_LENGTHS]
    padding = [max(lengths) - length for length in lengths]
    batch = mx.array(
        [golden.tokens[:n].tolist() + [0] * pad for n, pad in zip(lengths, padding, strict=True)]
    )
    cache = batch_cache(golden.model, [0] * len(lengths))
    for layer in cache:
        layer.prepare(lengths=lengths, right_padding=padding)
    logits = np.array(golden.model(batch, cache))
    for row, length in zip(logits, lengths, strict=True):
        golden.check(row[:length], 0, stop=length)
    for layer in cache:
        layer.finalize()
    logits = golden.model(golden.tokens_at(*lengths), cache)
    for row, length in zip(np.array(logits), lengths, strict=True):
        golden.check(row, length, stop=length + 1)


def test_rows_leave_and_join_a_batch(golden):
    def prefilled(*lengths: int) -> list[CacheList]:
        caches = [make_prompt_cache(golden.model) for _ in lengths]
        for length, cache in zip(lengths, caches, strict=True):
            golden.run(golden.tokens[:length], cache)
        return [CacheList.merge(list(layer)) for layer in zip(*caches, strict=True)]

    cache, joining = prefilled(11, 90, 53), prefilled(75, 38)
    for layer, other in zip(cache, joining, strict=True):
        layer.filter(mx.array([0, 2]))
        layer.extend(other)
    lengths = [11, 53, 75, 38]
    logits = golden.model(golden.tokens_at(*lengths), cache)
    for row, length in zip(np.array(logits), lengths, strict=True):
        golden.check(row, length, stop=length + 1)
    alone = [layer.extract(2) for layer in cache]
    golden.check(golden.run(golden.tokens[76:], alone), 76)


def test_stored_norm_weights_are_the_parameters(golden, tmp_path):
    """``1 + w`` is formed while computing: a saved model holds ``w``, as the checkpoint does."""
    golden.model.save_weights(str(tmp_path / "saved.safetensors"))
    saved = mx.load(str(tmp_path / "saved.safetensors"))
    weights = "as_published" if golden.name == "published_spelling" else golden.name
    stored = mx.load(str(golden_models.GOLDEN / weights / "model.safetensors"))
    norms = [name for name in saved if "norm" in name]
    assert len(norms) >= 4 * 4 + 1
    assert all(mx.array_equal(saved[name], stored[name]) for name in norms)
