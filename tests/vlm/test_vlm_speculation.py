"""What speculative decoding and trainers ask of the language model: hidden states, rollback, masks."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from tests.vlm.vlm_runs import TOLERANCE, Prompt, difference, fresh_logits, text, with_images

N_DRAFTS = 4
GIVEN_AS = {"int": int, "array": lambda n: mx.array([n]), "list": lambda n: [n]}


@pytest.fixture(scope="module")
def tokens() -> mx.array:
    return mx.array([text(140).tokens])


# --- hidden states ---


def test_hidden_states_after_the_named_layers(model: Any, tokens: mx.array) -> None:
    lm = model.language_model
    output = lm(tokens, capture_layer_ids=[0, 2], return_hidden=True)
    assert [h.shape for h in output.hidden_states] == [(1, 140, 128)] * 2
    h = lm.model.embed_tokens(tokens)
    mask = lm.model.host.attention_mask(h, None)
    for number, layer in enumerate(lm.model.layers):
        h = layer(h, mask, None)
        if number != 1:
            assert mx.array_equal(output.hidden_states[number // 2], h)
    assert mx.array_equal(output.logits, lm(tokens).logits)


def test_the_last_hidden_state(model: Any, tokens: mx.array) -> None:
    lm, sink = model.language_model, []
    (last,) = lm(tokens, return_hidden=True).hidden_states
    assert mx.array_equal(last, lm(tokens, capture_layer_ids=[2]).hidden_states[0])
    output = lm(tokens, hidden_sink=sink)
    assert output.hidden_states is sink
    assert mx.array_equal(sink[0], last)


def test_the_text_model_called_directly(model: Any, tokens: mx.array) -> None:
    lm, sink = model.language_model, []
    cache = lm.make_cache()
    final = lm.model(tokens, cache=cache, capture_layer_ids=[0, 1], hidden_sink=sink)
    assert len(sink) == 2
    assert mx.array_equal(lm.logits(final), lm(tokens).logits)
    assert [entry.offset for entry in cache] == [140] * 3


def test_logits_from_hidden_states(model: Any, tokens: mx.array) -> None:
    lm = model.language_model
    output = lm(tokens, return_hidden=True)
    (hidden,) = output.hidden_states
    for owner in (model, lm):
        assert mx.array_equal(owner.speculative_logits_from_hidden(hidden), output.logits)
    assert mx.array_equal(lm.speculative_argmax_from_hidden(hidden), mx.argmax(output.logits, axis=-1))


def test_what_drafters_read(model: Any) -> None:
    lm = model.language_model
    assert lm.requires_uniform_batch_acceptance is True
    for config in (lm.args, lm.config.text_config):
        assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (128, 3, 704)


# --- rollback ---


@pytest.mark.parametrize("accepted", range(N_DRAFTS))
@pytest.mark.parametrize("given_as", GIVEN_AS.values(), ids=GIVEN_AS.keys())
def test_rolled_back_drafts_were_never_there(
    model: Any, tokens: mx.array, accepted: int, given_as: Callable[[int], Any]
) -> None:
    """Between 96 and 104 a block of 8 ends."""
    lm, start = model.language_model, 98
    cache = lm.make_cache()
    lm(tokens[:, :start], cache=cache)
    kept = tokens[:, start : start + accepted + 1]
    wrong = (tokens[:, start + accepted + 1 : start + N_DRAFTS + 1] + 1) % 600
    lm(mx.concatenate([kept, wrong], axis=1)[:, : N_DRAFTS + 1], cache=cache, capture_layer_ids=[0])
    result = lm.rollback_speculative_cache(cache, None, given_as(accepted), N_DRAFTS + 1)
    assert result == accepted
    logits = lm(tokens[:, start + accepted + 1 :], cache=cache).logits
    expected = fresh_logits(model, text(140))[start + accepted + 1 :]
    assert difference(logits[0], expected) <= TOLERANCE


def test_rollback_through_the_outer_model(model: Any, tokens: mx.array) -> None:
    cache = model.make_cache()
    model(tokens, cache=cache)
    assert model.rollback_speculative_cache(cache, None, 1, 10) == 1
    assert [entry.offset for entry in cache] == [132] * 3


def batch_of(model: Any, prompts: list[Prompt]) -> list[Any]:
    rows = []
    for prompt in prompts:
        rows.append(model.make_cache())
        model(mx.array([prompt.tokens]), cache=rows[-1])
    return [type(entries[0]).merge(list(entries)) for entries in zip(*rows, strict=True)]


def test_rollback_of_ragged_rows_that_accept_alike(model: Any) -> None:
    prompts = [text(77, 1), text(130, 2)]
    cache = batch_of(model, prompts)
    drafts = [text(5, 3).tokens, text(5, 4).tokens]
    model.language_model(mx.array(drafts), cache=cache)
    assert model.rollback_speculative_cache(cache, None, mx.array([2, 2]), 5) == 2
    logits = model.language_model(mx.array([[9], [9]]), cache=cache).logits[:, -1]
    for row, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
        assert difference(logits[row], fresh_logits(model, prompt, [*draft[:3], 9])[-1]) <= TOLERANCE


def test_rows_that_accept_differently_are_refused(model: Any) -> None:
    """The row that accepts less would go on attending to what it has rejected."""
    cache = batch_of(model, [text(77, 1), text(130, 2)])
    model.language_model(mx.array([text(5, 3).tokens, text(5, 4).tokens]), cache=cache)
    with pytest.raises(RuntimeError, match="uniform"):
        model.rollback_speculative_cache(cache, None, mx.array([0, 3]), 5)


# --- masks, as trainers give them ---

LENGTHS = (90, 41, 67)


def padded(side: str) -> tuple[mx.array, mx.array]:
    longest, rows, masks = max(LENGTHS), [], []
    for n in LENGTHS:
        pad = [0] * (longest - n)
        tokens, ones = text(n, n).tokens, [1] * n
        rows.append(pad + tokens if side == "left" else tokens + pad)
        masks.append(pad + ones if side == "left" else ones + pad)
    return mx.array(rows), mx.array(masks)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["third argument", "mask", "attention_mask"])
def test_padding_changes_no_token(model: Any, side: str, how: str) -> None:
    tokens, mask = padded(side)
    if how == "third argument":
        logits = model(tokens, None, mask).logits
    else:
        logits = model.language_model(tokens, **{how: mask}).logits
    assert not mx.isnan(logits).any().item()
    for row, n in enumerate(LENGTHS):
        own = logits[row, -n:] if side == "left" else logits[row, :n]
        assert difference(own, fresh_logits(model, text(n, n))) <= TOLERANCE


def test_a_mask_with_images(model: Any) -> None:
    prompt = with_images(60)
    n = len(prompt.tokens)
    tokens = mx.array([[0] * 9 + prompt.tokens])
    mask = mx.array([[0] * 9 + [1] * n])
    logits = model(tokens, prompt.media["pixel_values"], mask, image_grid_thw=prompt.media["image_grid_thw"])
    assert difference(logits.logits[0, 9:], fresh_logits(model, prompt)) <= TOLERANCE


def test_a_mask_of_ones_is_none(model: Any, tokens: mx.array) -> None:
    assert mx.array_equal(model(tokens, None, mx.ones(tokens.shape)).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "mask", [[1, 1, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0]], ids=["gap", "gap and left", "gap and right"]
)
def test_a_mask_with_a_gap_is_refused(model: Any, mask: list[int]) -> None:
    with pytest.raises(ValueError, match="one run of tokens"):
        model(mx.array([[5, 6, 7, 8]]), None, mx.array([mask]))


def test_a_mask_of_another_shape_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"\[B, L\]"):
        model(mx.array([[5, 6]]), None, mx.ones((1, 1, 2, 2)))
