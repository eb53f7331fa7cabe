"""The cost of drafting against what enumeration counts."""

import random
from itertools import combinations, product
from math import comb, prod

import pytest

from mlx_m3_plugin.model.draft_cost import (
    DraftCost,
    best_length,
    counted_experts,
    distinct_experts,
    tokens_per_pass,
)


@pytest.mark.parametrize(("experts", "per_token", "tokens"), [(4, 2, 3), (5, 1, 4), (6, 4, 2), (3, 3, 2)])
def test_distinct_experts_are_the_mean_over_all_choices(experts: int, per_token: int, tokens: int) -> None:
    each = list(combinations(range(experts), per_token))
    total = sum(len(set().union(*chosen)) for chosen in product(each, repeat=tokens))
    assert distinct_experts(experts, per_token, tokens) == pytest.approx(total / len(each) ** tokens)


def test_eight_tokens_of_m3_choose_29_experts() -> None:
    assert [round(distinct_experts(128, 4, tokens), 1) for tokens in (1, 3, 8)] == [4.0, 11.6, 28.7]


def test_counted_experts_are_those_of_successive_tokens(fresh_seed: int) -> None:
    assert counted_experts([[0, 1], [1, 2], [1, 2], [5, 6]], 2) == (3 + 2 + 4) / 3
    assert counted_experts([[0, 1], [1, 2], [1, 2], [5, 6]], 4) == 5
    rng = random.Random(fresh_seed)
    even = [rng.sample(range(8), 2) for _ in range(20_000)]
    for tokens in (1, 4, 8):
        # Five standard deviations of a mean over 20,000 / tokens windows of their own, each of less than 2.
        tolerance = 5 * 2 / (20_000 / tokens) ** 0.5
        assert counted_experts(even, tokens) == pytest.approx(distinct_experts(8, 2, tokens), abs=tolerance)


def test_tokens_per_pass_are_the_mean_over_all_outcomes(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    acceptance = [rng.random() for _ in range(5)]
    expected = 0.0
    for outcome in product((True, False), repeat=5):
        accepted = next((n for n, is_right in enumerate(outcome) if not is_right), 5)
        chance = prod(p if is_right else 1 - p for p, is_right in zip(acceptance, outcome, strict=True))
        expected += chance * (accepted + 1)
    assert tokens_per_pass(acceptance) == pytest.approx(expected)
    assert tokens_per_pass([]) == 1


def test_a_pass_reads_the_experts_of_all_its_tokens() -> None:
    """All routings of two tokens, one by one."""
    cost = DraftCost(
        shared=100.0, per_token=3.0, routed=40.0, experts=4, experts_per_token=2, draft=7.0, per_drafted=1.0
    )
    each = list(combinations(range(4), 2))
    reads = [100 + 2 * 3 + 10 * len({*a, *b}) for a, b in product(each, repeat=2)]
    assert cost.verification(2) == pytest.approx(sum(reads) / comb(4, 2) ** 2)
    assert cost.round(0) == cost.verification(1) == 100 + 3 + 20
    assert cost.round(1) == cost.verification(2) + 8
    assert cost.speedup([0.5]) == pytest.approx(1.5 * 123 / cost.round(1))
    assert cost.round(1, rows=3) == cost.verification(6) + 3 * 8
    assert cost.speedup([0.5], rows=3) == pytest.approx(1.5 * cost.verification(3) / cost.round(1, rows=3))


def test_a_dense_model_has_no_experts() -> None:
    assert DraftCost(100.0, 0.0, 0.0, 0, 0, 1.0, 0.0).verification(5) == 100


def test_the_best_length_is_the_fastest(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    found = set()
    for _ in range(300):
        cost = DraftCost(rng.random(), 0.01 * rng.random(), 10 * rng.random(), 128, 4, rng.random(), 0.01)
        acceptance = [rng.random() ** 0.3] * 7
        rates = [cost.speedup(acceptance[:length]) for length in range(8)]
        assert rates[0] == 1
        best = best_length(cost, acceptance)
        assert rates[best] == max(rates)
        found.add(best)
    assert {0, 7} < found
