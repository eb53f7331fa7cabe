"""Greedy answers with drafts are those without, token by token, and leave the caches as these do."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm.speculative.drafters.dspark", reason="this mlx-vlm has no DSpark")

from mlx_m3_plugin.model.draft_cost import DraftCost
from tests.drafts.runs import assert_same_tokens, drafted, drafted_together, make_knowing, random_drafter
from tests.vlm.vlm_runs import BUDGET, Processor, Prompt, Request, alone, streamed, text, with_images

Count = Callable[[int, int], int]


class Random:
    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def below(self, high: int, low: int = 0) -> int:
        return int(self.rng.integers(low, high))

    def seed(self) -> int:
        return self.below(2**31)

    def prompt(self, longest: int) -> Prompt:
        make = with_images if self.below(4) == 0 else text
        return make(self.below(longest, 12), seed=self.seed())


def test_one_request(model: Any, tmp_path: Path, fresh_seed: int, count: Count) -> None:
    """Around the block budget of 32 tokens, and up to 16 times as many; K and V quantized, too."""
    random = Random(fresh_seed)
    rates = []
    for case in range(count(8, 200)):
        drafter = random_drafter(tmp_path / str(case), random.seed())
        prompt = random.prompt((BUDGET, 4 * BUDGET, 16 * BUDGET)[case % 3])
        options: dict[str, Any] = {"prefill_step_size": 48}
        if case % 4 == 3:
            options |= {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
            expected = streamed(model, prompt, 24, **options)
        else:
            expected = alone(model, prompt, 24)
        if case % 2:
            make_knowing(drafter, [expected], fresh_seed, 1.0 if case == 1 else (0.5, 0.8)[random.below(2)])
        options["draft_block_size"] = random.below(9, 2)
        assert_same_tokens(drafted(model, prompt, 24, drafter, **options), expected)
        rates.append(sum(drafter.accept_lens) / sum(drafter.draft_lens))
    assert min(rates) < 0.1
    assert max(rates) > 0.4


def test_batches_with_joins_and_leaves(model: Any, tmp_path: Path, fresh_seed: int, count: Count) -> None:
    """Rows accept different numbers of drafts, end at different steps, and wait for a batch to end."""
    random = Random(fresh_seed)
    drafter = random_drafter(tmp_path, fresh_seed)
    rates: list[float] = []
    for case in range(count(4, 60)):
        requests = [
            Request(random.prompt(8 * BUDGET), random.below(16, 6), joins_at=random.below(8) * (case % 2))
            for _ in range((2, 4)[case % 2])
        ]
        expected = [alone(model, request.prompt, request.n_tokens) for request in requests]
        if len({answer.tokens[0] for answer in expected}) < len(expected):
            # Their answers could not be told apart.
            continue
        # The first accepts all, so that some are accepted whatever the seed.
        make_knowing(drafter, expected, fresh_seed, 0.8 if rates else 1.0)
        options = {"draft_block_size": random.below(9, 3), "prefill_step_size": 64}
        said = drafted_together(model, requests, drafter, **options)
        for tokens, answer in zip(said, expected, strict=True):
            assert_same_tokens(tokens, answer)
        rates.append(sum(drafter.accept_lens) / sum(drafter.draft_lens))
    assert max(rates) > 0.2


@pytest.mark.parametrize("kept_in", ["conversation", "prefix cache"])
def test_later_requests(kept_in: str, model: Any, tmp_path: Path, fresh_seed: int, count: Count) -> None:
    """As a chat goes on: some replies are cut, and some are not drafted."""
    from mlx_vlm import apc
    from mlx_vlm.generate import PromptCacheState

    random = Random(fresh_seed)
    drafter = random_drafter(tmp_path, fresh_seed)
    for _ in range(count(2, 250)):
        manager = apc.APCManager(num_blocks=64, block_size=16)
        kept = {"prompt_cache_state": PromptCacheState()}
        if kept_in == "prefix cache":
            kept = {"apc_manager": manager}
        tokens = text(random.below(80, 5), random.seed()).tokens
        for _ in range(3):
            expected = alone(model, Prompt(tokens), random.below(12, 2))
            make_knowing(drafter, [expected], fresh_seed, random.below(11) / 10)
            options = kept | {"draft_block_size": random.below(9, 2)}
            if random.below(5) == 0:
                options["draft_model"] = None
            said = drafted(model, Prompt(tokens), len(expected.tokens), drafter, **options)
            assert_same_tokens(said, expected)
            n_kept = len(said) if random.below(3) else random.below(len(said))
            tokens = tokens + said[:n_kept] + text(random.below(30, 1), random.seed()).tokens
        manager.close()


def test_what_rounds_leave_out(model: Any, tmp_path: Path, fresh_seed: int, caplog: Any) -> None:
    """Penalties and processors, which mlx-vlm does not use in rounds; and a block without a draft."""
    from mlx_vlm.generate import BatchGenerator

    drafter = random_drafter(tmp_path, fresh_seed)
    prompt = text(60, fresh_seed)
    for options in ({"repetition_penalty": 1.3}, {"logit_bias": {5: 20.0}}, {"draft_block_size": 1}):
        said, expected = (drafted(model, prompt, 12, d, **options) for d in (drafter, None))
        assert said == expected
        assert len(said) == 12
    assert caplog.text.count("no drafts, because mlx-vlm ignores") == 2
    generator = BatchGenerator(model.language_model, Processor(), stop_tokens=set(), draft_model=drafter)
    with pytest.raises(ValueError, match="penalties, logit_bias and grammars"):
        generator.insert([[1, 2]], logits_processors=[[lambda tokens, logits: logits]])
    assert len(generator.insert([[1, 2]], logits_processors=[[]])) == 1


def test_a_long_prompt_keeps_a_window_of_hidden_states(model: Any, tmp_path: Path) -> None:
    from mlx_vlm.speculative.utils import SpeculativePrefill

    kept = SpeculativePrefill("dflash", random_drafter(tmp_path, 1))
    tokens = mx.array([text(101).tokens])
    cache = model.make_cache()
    for start in range(0, 100, 10):
        kept.append(model.language_model(tokens[:, start : start + 10], cache=cache, **kept.kwargs))
        assert len(kept.chunks) <= 4
    output = kept.finish(model.language_model(tokens[:, 100:], cache=cache, **kept.kwargs))
    expected = model.language_model(tokens, **kept.kwargs).hidden_states
    for found, all_of_them in zip(output.hidden_states, expected, strict=True):
        assert 23 <= found.shape[1] <= 34
        assert mx.abs(found - all_of_them[:, -found.shape[1] :]).max().item() < 1e-4


def test_lengths_by_cost(model: Any, tmp_path: Path, fresh_seed: int, caplog: Any) -> None:
    """Where every draft is accepted blocks grow; where none is, drafting is off from the next answer on."""
    from mlx_vlm.speculative.drafters import validate_drafter_compatibility

    drafter, prompt = random_drafter(tmp_path, fresh_seed), text(40, fresh_seed)
    validate_drafter_compatibility(model, drafter, "dflash")
    counted, expected = drafter.cost, alone(model, prompt, 40)
    assert counted.experts == 4
    # A pass reads 10, and half as much again for each expert that further tokens choose; a draft reads 2.
    drafter.validate_target_compatibility = lambda target: None
    drafter.cost = DraftCost(5, 0, 10, 8, 4, 2, 0.1)
    assert_same_tokens(drafted(model, prompt, 40, drafter), expected)
    assert set(drafter.draft_lens[10:-1]) == {1}
    assert drafter.best_length() == 0
    for _ in range(2):
        assert_same_tokens(drafted(model, prompt, 40, drafter), expected)
        (tokens,) = drafted_together(model, [Request(prompt, 40)], drafter)
        assert_same_tokens(tokens, expected)
    assert caplog.text.count("drafting is off") == 1
    # A length that is asked for is drafted nevertheless.
    make_knowing(drafter, [expected], 1, 1.0)
    assert_same_tokens(drafted(model, prompt, 40, drafter, draft_block_size=5), expected)
    assert set(drafter.draft_lens[:-1]) == {4}
    assert_same_tokens(drafted(model, prompt, 40, drafter), expected)
    assert drafter.draft_lens[-2] > 4
    # In a batch each row pays for its drafts.
    best, counted_rows = type(drafter).best_length, []

    def best_length(rows: int = 1) -> int:
        counted_rows.append(rows)
        return best(drafter, rows)

    drafter.best_length = best_length
    drafted_together(model, [Request(prompt, 8), Request(prompt, 8)], drafter)
    assert counted_rows[0] == 1
    assert set(counted_rows[1:]) == {2}


def test_sampled_answers_have_the_same_distribution(
    model: Any, tmp_path: Path, fresh_seed: int, count: Count
) -> None:
    """Of three tokens with two choices each, the last two of which are drafted; with seeds and without."""
    prompt, lm = text(9, 9), model.language_model
    drafter = random_drafter(tmp_path, 1)
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for said, share in expected.items():
            logits = lm(mx.array([[*prompt.tokens, *said]])).logits[0, -1]
            best = mx.argsort(-logits)[:2]
            chances = mx.softmax(logits[best] / 0.3).tolist()
            longer |= {(*said, t): share * p for t, p in zip(best.tolist(), chances, strict=True)}
        expected = longer
    likely = max(expected, key=lambda said: expected[said])

    def draft_block(last_bonus, hidden, cache, block_size, sampler, token_dtype=mx.int32):  # type: ignore[no-untyped-def]
        # A draft that depends on what the sampler drew, as the head's own do, and one that does not.
        own = type(drafter).draft_block(drafter, last_bonus, hidden, cache, block_size, sampler, token_dtype)
        return mx.concatenate([mx.array([[likely[1]]], dtype=own.dtype), own[:, 1:]], axis=1)

    drafter.draft_block = draft_block
    n = count(120, 20_000)
    seen: Counter[tuple[int, ...]] = Counter()
    options: dict[str, Any] = {"temperature": 0.3, "top_k": 2, "top_p": 1.0, "draft_block_size": 3}
    mx.random.seed(fresh_seed)
    for draw in range(n):
        own_seed = {"seed": fresh_seed % 10_000 + draw} if draw % 2 else {}
        seen[tuple(drafted(model, prompt, 3, drafter, **options, **own_seed))] += 1
    assert seen.keys() <= expected.keys()
    # Rare answers count as one.
    common = [said for said, p in expected.items() if n * p >= 5]
    found = [*(seen[said] for said in common), n - sum(seen[said] for said in common)]
    wanted = [*(n * expected[said] for said in common), n * (1 - sum(expected[said] for said in common))]
    chi_square = sum((a - b) ** 2 / b for a, b in zip(found, wanted, strict=True) if b > 1)
    # Of 7 degrees of freedom, exceeded in one of 100,000 runs.
    assert chi_square < 34.7, (seen, expected)
    assert drafter.speculative_total_accepted > 0
