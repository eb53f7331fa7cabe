"""A row of a batch answers as if it were alone, with images or without, whoever joins and leaves."""

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from tests.hosts.ties import closest_choice
from tests.vlm.vlm_runs import (
    BUDGET,
    Prompt,
    Request,
    alone,
    assert_same_answer,
    fresh_logits,
    streamed,
    text,
    together,
    with_images,
)

TWO_IMAGES = ((1, 4, 6), (1, 8, 4))


def assert_rows_equal_solo_runs(model: Any, requests: list[Request], **options: Any) -> None:
    answers = together(model, requests, **options)
    for answer, request in zip(answers, requests, strict=True):
        assert_same_answer(answer, alone(model, request.prompt, request.n_tokens))


@pytest.mark.parametrize("prompt", [text(103), with_images(90, TWO_IMAGES)], ids=["text", "images"])
def test_a_solo_run_equals_a_fresh_computation(model: Any, prompt: Prompt) -> None:
    """The oracle of this file, checked once against passes without any cache."""
    answer = alone(model, prompt, 6)
    expected = fresh_logits(model, prompt, answer.tokens[:-1])[-6:]
    assert mx.abs(mx.stack(answer.logits) - expected).max().item() <= 1e-4
    assert answer.tokens == mx.argmax(expected, axis=-1).tolist()


def test_images_matter(model: Any) -> None:
    """Otherwise the comparisons with images say nothing."""
    prompt = with_images(60)
    other = Prompt(prompt.tokens, {**prompt.media, "pixel_values": prompt.media["pixel_values"][::-1]})
    assert mx.abs(fresh_logits(model, prompt)[-1] - fresh_logits(model, other)[-1]).max().item() > 1e-2


@pytest.mark.parametrize("options", [{}, {"prefill_step_size": 50}], ids=str)
@pytest.mark.parametrize("prompt", [text(103), with_images(90, TWO_IMAGES)], ids=["text", "images"])
def test_stream_generate_equals_the_solo_run(model: Any, prompt: Prompt, options: dict[str, Any]) -> None:
    assert_same_answer(streamed(model, prompt, 8, **options), alone(model, prompt, 8))


def test_ragged_text_rows(model: Any) -> None:
    assert_rows_equal_solo_runs(model, [Request(text(n, n), 10) for n in (103, 7, 61, BUDGET, 150)])


def test_rows_with_and_without_images(model: Any) -> None:
    prompts = [with_images(80, TWO_IMAGES, 1), text(61, 2), with_images(20, seed=3), text(120, 4)]
    assert_rows_equal_solo_runs(model, [Request(prompt, 10) for prompt in prompts])


@pytest.mark.parametrize("prefill_step_size", [16, 64])
def test_prompts_taken_in_pieces(model: Any, prefill_step_size: int) -> None:
    prompts = [with_images(75, TWO_IMAGES, 5), text(103, 6), text(40, 7)]
    requests = [Request(prompt, 6) for prompt in prompts]
    assert_rows_equal_solo_runs(model, requests, prefill_step_size=prefill_step_size)


def test_rows_that_join_later_and_leave_early(model: Any) -> None:
    """The first row starts alone: its cache is no batch cache until another one joins."""
    requests = [
        Request(text(75, 8), 20),
        Request(with_images(90, seed=9), 5, joins_at=3),
        Request(text(130, 10), 12, joins_at=4),
        Request(text(12, 11), 9, joins_at=11),
    ]
    assert_rows_equal_solo_runs(model, requests)


def test_rows_wait_for_a_place(model: Any) -> None:
    requests = [Request(text(n, n), 4 + n % 3) for n in (90, 33, 140, 70, 9)]
    assert_rows_equal_solo_runs(model, requests, completion_batch_size=2, prefill_batch_size=2)


def random_requests(rng: random.Random) -> list[Request]:
    requests = []
    for _ in range(rng.randint(2, 5)):
        length = rng.choice([rng.randint(4, BUDGET), rng.randint(4, 6 * BUDGET)])
        make = rng.choice([text, lambda n, seed: with_images(n, TWO_IMAGES[: rng.randint(1, 2)], seed)])
        prompt = make(length, rng.randrange(10**6))
        requests.append(Request(prompt, rng.randint(1, 12), rng.choice([0, 0, rng.randint(1, 10)])))
    return requests


def test_random_rows(
    model: Any, fresh_seed: int, count: Callable[[int, int], int], capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(fresh_seed)
    largest, n_rows, n_ties = 0.0, 0, 0
    share = count(2, 40)
    for batch in range(2 * share):
        # A tie is rare, but one among few rows would be too many: then some more are drawn.
        if batch >= share and n_rows > 10 * n_ties:
            break
        requests = random_requests(rng)
        options = {
            "prefill_step_size": rng.choice([16, 64, 2048]),
            "prefill_batch_size": rng.choice([1, 3, 8]),
        }
        for answer, request in zip(together(model, requests, **options), requests, strict=True):
            with closest_choice() as closest:
                expected = alone(model, request.prompt, request.n_tokens)
            if closest.is_tie or is_tie_of_tokens(expected.logits):
                n_ties += 1
                continue
            largest, n_rows = max(largest, assert_same_answer(answer, expected)), n_rows + 1
    with capsys.disabled():
        print(f"\n{n_rows} rows equal their solo runs; largest difference {largest:.1e}; {n_ties} with a tie")
    assert n_rows > 10 * n_ties


def is_tie_of_tokens(logits_of_steps: list[mx.array]) -> bool:
    """Two greedy candidates closer than rounding: either is right, and what follows differs."""
    best = [mx.sort(logits)[-2:] for logits in logits_of_steps]
    return any((b - a).item() < 2e-5 for a, b in best)


class TestCaches:
    """Upstream's batch cache, made from our entries and cut apart again."""

    LENGTHS = (75, 41, 57)

    def filled(self, model: Any) -> list[Any]:
        caches = []
        for n in self.LENGTHS:
            caches.append(model.make_cache())
            model.language_model(mx.array([text(n, n).tokens]), cache=caches[-1])
        return caches

    def next_logits(self, model: Any, cache: list[Any], n_rows: int = 1) -> mx.array:
        return model.language_model(mx.array([[5]] * n_rows), cache=cache).logits[:, -1]

    def expected(self, model: Any, n: int) -> mx.array:
        return fresh_logits(model, text(n, n), [5])[-1]

    def assert_next(self, model: Any, cache: list[Any], lengths: tuple[int, ...]) -> None:
        logits = self.next_logits(model, cache, len(lengths))
        expected = mx.stack([self.expected(model, n) for n in lengths])
        assert mx.abs(logits - expected).max().item() <= 1e-4

    def merged(self, rows: list[list[Any]]) -> list[Any]:
        return [type(entries[0]).merge(list(entries)) for entries in zip(*rows, strict=True)]

    def test_merge(self, model: Any) -> None:
        self.assert_next(model, self.merged(self.filled(model)), self.LENGTHS)

    @pytest.mark.parametrize("keep", [[1], [0, 2], [1, 2], [2, 0]], ids=str)
    def test_filter(self, model: Any, keep: list[int]) -> None:
        cache = self.merged(self.filled(model))
        for entry in cache:
            entry.filter(mx.array(keep))
        self.assert_next(model, cache, tuple(self.LENGTHS[row] for row in keep))

    @pytest.mark.parametrize("longer_first", [True, False])
    def test_extend(self, model: Any, longer_first: bool) -> None:
        first, second, third = self.filled(model)
        left, right = self.merged([first, third]), self.merged([second])
        lengths = (75, 57, 41)
        if not longer_first:
            left, right, lengths = right, left, (41, 75, 57)
        for entry, other in zip(left, right, strict=True):
            entry.extend(other)
        self.assert_next(model, left, lengths)

    @pytest.mark.parametrize("row", range(3))
    def test_extract(self, model: Any, row: int) -> None:
        """Also as what our model needs next: ``--kv-bits`` on a row that has left a batch."""
        cache = [entry.extract(row) for entry in self.merged(self.filled(model))]
        self.assert_next(model, cache, self.LENGTHS[row : row + 1])
        assert [hasattr(entry, "to_quantized") for entry in cache] == [True] * 3

    def test_trim(self, model: Any) -> None:
        cache = self.merged(self.filled(model))
        self.next_logits(model, cache, 3)
        self.next_logits(model, cache, 3)
        for entry in cache:
            assert entry.is_trimmable()
            assert entry.trim(2) == 2
        self.assert_next(model, cache, self.LENGTHS)

    def test_from_left_padding(self, model: Any) -> None:
        """As mlx-vlm starts a batch: entries of ``make_cache`` made into batch entries, then one prefill."""
        from mlx_vlm.generate.ar import _make_cache

        longest = max(self.LENGTHS)
        padding = [longest - n for n in self.LENGTHS]
        rows = [[0] * pad + text(n, n).tokens for pad, n in zip(padding, self.LENGTHS, strict=True)]
        cache = _make_cache(model.language_model, padding)
        assert [type(entry).__name__ for entry in cache[1:]] == ["MiniMaxM3BatchKVCache"] * 2
        model.language_model(mx.array(rows), cache=cache)
        self.assert_next(model, cache, self.LENGTHS)
