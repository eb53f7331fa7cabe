"""A mask given together with a cache: honoured as padding, or refused, and never dropped.

Without a cache: ``test_vlm_speculation.py``.
"""

from dataclasses import fields
from typing import Any

import mlx.core as mx
import pytest

from tests.vlm.vlm_runs import TOLERANCE, VLM_VERSION, alone, assert_same_answer, difference, streamed, text

# Several times the block budget of 32 tokens, and another padding for each row.
LENGTHS = (90, 61, 70)
MORE = 5


def padded(lengths: tuple[int, ...] = LENGTHS) -> tuple[mx.array, mx.array]:
    """Tokens and mask ``[B, L]``, padded on the left."""
    longest = max(lengths)
    rows = [[0] * (longest - n) + text(n, seed).tokens for seed, n in enumerate(lengths)]
    return mx.array(rows), mx.array([[0] * (longest - n) + [1] * n for n in lengths])


def answers_alone(model: Any, more: mx.array) -> list[mx.array]:
    """Of each row by itself, without padding: the logits of its prompt and of ``more``."""
    alone = []
    for row, length in enumerate(LENGTHS):
        tokens = mx.array([[*text(length, row).tokens, *more[row].tolist()]])
        alone.append(model(tokens).logits[0])
    return alone


@pytest.fixture(scope="module")
def more() -> mx.array:
    return mx.array([text(MORE, 40 + row).tokens for row in range(len(LENGTHS))])


@pytest.mark.parametrize("how", ["mask", "attention_mask"])
@pytest.mark.parametrize("chunks", [[90], [35, 55], [50, 3, 37]], ids=str)
def test_padding_on_the_left_with_a_plain_cache(
    model: Any, more: mx.array, how: str, chunks: list[int]
) -> None:
    tokens, mask = padded()
    cache, found, start = model.make_cache(), [], 0
    for length in chunks:
        # Of the chunk alone, or of all so far, as transformers gives it.
        first = start if how == "mask" else 0
        given = {how: mask[:, first : start + length]}
        found.append(model.language_model(tokens[:, start : start + length], cache=cache, **given).logits)
        start += length
    for step in range(MORE):
        found.append(model.language_model(more[:, step : step + 1], cache=cache).logits)
    logits = mx.concatenate(found, axis=1)
    for row, expected in enumerate(answers_alone(model, more)):
        assert difference(logits[row, -len(expected) :], expected) <= TOLERANCE


def test_with_the_cache_of_a_batch_the_mask_may_say_the_same(model: Any, more: mx.array) -> None:
    from mlx_m3_plugin.hosts.mlx_vlm.cache import batch_caches

    tokens, mask = padded()
    paddings = [90 - length for length in LENGTHS]
    plain, told = (batch_caches(model.make_cache(), paddings) for _ in range(2))
    expected = model.language_model(tokens, cache=plain).logits
    found = model.language_model(tokens, cache=told, mask=mask).logits
    assert mx.array_equal(found, expected)
    ones = mx.ones((3, 1), mx.int32)
    expected = model.language_model(more[:, :1], cache=plain).logits
    found = model.language_model(more[:, :1], cache=told, mask=mx.concatenate([mask, ones], axis=1)).logits
    assert mx.array_equal(found, expected)
    with pytest.raises(ValueError, match="does not fit the padding"):
        model.language_model(more[:, 1:2], cache=told, mask=mx.zeros((3, 1)))


def test_ones_change_nothing(model: Any) -> None:
    tokens = mx.array([text(60).tokens])
    cache = model.make_cache()
    kinds = [type(entry) for entry in cache]
    found = model(tokens, cache=cache, mask=mx.ones((1, 60))).logits
    assert [type(entry) for entry in cache] == kinds
    assert mx.array_equal(found, model(tokens, cache=model.make_cache()).logits)


PADDED_RIGHT = mx.array([[1] * 9, [1] * 6 + [0] * 3])
WITH_A_GAP = mx.array([[1] * 9, [0, 0, 1, 1, 0, 1, 1, 1, 1]])
NO_TOKEN = mx.array([[1] * 9, [0] * 9])


@pytest.mark.parametrize(
    "mask", [PADDED_RIGHT, WITH_A_GAP, NO_TOKEN], ids=["on the right", "a gap", "no token"]
)
def test_what_would_stay_in_the_cache_is_refused(model: Any, mask: mx.array) -> None:
    with pytest.raises(ValueError, match="on the left"):
        model(mx.ones((2, 9), mx.int32), cache=model.make_cache(), mask=mask)


def test_padding_after_tokens_are_cached_is_refused(model: Any) -> None:
    tokens, mask = padded()
    cache = model.make_cache()
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="does not fit the padding"):
        model(tokens, cache=cache, mask=mask)
    whole = mx.concatenate([mask, mx.ones((3, 1), mask.dtype)], axis=1)
    with pytest.raises(ValueError, match="does not fit the padding"):
        model(tokens[:, :1], cache=cache, mask=whole)


def test_padding_with_a_quantized_cache_is_refused(model: Any) -> None:
    from tests.vlm.test_vlm_kv_quantization import quantized_caches

    tokens, mask = padded()
    with pytest.raises(ValueError, match="quantized"):
        model(tokens, cache=quantized_caches(model, 8, 32), mask=mask)


@pytest.mark.parametrize(
    "mask",
    [mx.zeros((1, 1, 9, 9)), mx.array([[0, 1, 1]]), mx.array([[-1e9] * 2 + [0.0] * 7])],
    ids=["of queries and keys", "too short", "additive"],
)
@pytest.mark.parametrize("how", ["mask", "attention_mask"])
def test_other_masks_are_refused(model: Any, mask: mx.array, how: str) -> None:
    for cache in (None, model.make_cache()):
        with pytest.raises(ValueError, match="the mask must"):
            model.language_model(mx.ones((1, 9), mx.int32), cache=cache, **{how: mask})


def test_no_features_of_other_models_are_dropped(model: Any) -> None:
    """All that mlx-vlm's features may hold is either used, or harmless, or refused."""
    from mlx_vlm.models.base import InputEmbeddingsFeatures

    names = {field.name for field in fields(InputEmbeddingsFeatures)}
    taken = {"inputs_embeds", "attention_mask"}
    # M3's positions follow from the cache, and its embeddings hold the images already.
    harmless = {"visual_pos_masks", "position_ids", "pos_hw", "rope_deltas"}
    assert names <= taken | harmless | {*REFUSED}


REFUSED = (
    "attention_mask_4d",
    "cross_attention_mask",
    "cross_attention_states",
    "decoder_inputs_embeds",
    "deepstack_visual_embeds",
    "full_text_row_masked_out_mask",
    "input_embeddings",
    "per_layer_inputs",
)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_elsewhere_is_refused(model: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        model.language_model(mx.ones((1, 9), mx.int32), **{name: mx.ones((1, 9))})


def test_pixels_beside_embeddings_are_refused(model: Any) -> None:
    embeds = model.language_model.model.embed_tokens(mx.ones((1, 9), mx.int32))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(mx.ones((1, 9), mx.int32), mx.ones((4, 1176)), inputs_embeds=embeds)


# --- how many logits ---


@pytest.mark.parametrize("kept", [1, 3])
def test_only_the_last_logits_are_computed(model: Any, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = mx.array([text(60).tokens] * 2)
    everything = model.language_model(tokens).logits
    rows = count_rows(model, monkeypatch)
    found = model.language_model(tokens, logits_to_keep=kept, return_hidden=True)
    assert rows == [kept]
    assert found.hidden_states[0].shape == (2, 60, 128)
    assert difference(found.logits, everything[:, -kept:]) <= TOLERANCE
    assert model(tokens, logits_to_keep=kept).logits.shape[1] == kept
    assert model(tokens, logits_to_keep=0).logits.shape[1] == 60


@pytest.mark.skipif(VLM_VERSION < (0, 7, 0), reason="mlx-vlm before 0.7 asks for all logits of a prompt")
@pytest.mark.parametrize("step", [2048, 20, None])
def test_a_prompt_costs_one_row_of_logits(
    model: Any, step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(model, text(80), 3)
    rows = count_rows(model, monkeypatch)
    assert_same_answer(streamed(model, text(80), 3, prefill_step_size=step), expected)
    assert set(rows) == {1}


def count_rows(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of every input that the head gets from here on."""
    rows: list[int] = []
    head = type(model.language_model).logits

    def counted(self: Any, h: mx.array) -> mx.array:
        rows.append(h.shape[1])
        return head(self, h)

    monkeypatch.setattr(type(model.language_model), "logits", counted)
    return rows
