"""Whatever is done to a prompt cache, the next logits are those of a fresh computation."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache

from tests.hosts.native_mlx_lm import TEXT, our_model
from tests.hosts.ties import closest_choice

TOLERANCE = 1e-4
LONGEST = 160  # tokens: more than six budgets of 3 blocks of 8

token = st.integers(0, TEXT["vocab_size"] - 1)
some_tokens = st.lists(token, min_size=1, max_size=45)


class CacheSequences(RuleBasedStateMachine):
    """One row: its tokens, its cache, and the logits after its last token."""

    model = our_model()

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.cache: Any = make_prompt_cache(self.model)
        self.logits: mx.array | None = None

    @rule(tokens=some_tokens)
    def feed(self, tokens: list[int]) -> None:
        tokens = tokens[: LONGEST - len(self.tokens)]
        if tokens:
            self.logits = self.model(mx.array([tokens]), cache=self.cache)[0, -1]
            self.tokens += tokens

    @rule(tokens=st.lists(token, min_size=1, max_size=9))
    def decode(self, tokens: list[int]) -> None:
        for t in tokens[: LONGEST - len(self.tokens)]:
            self.feed([t])

    @precondition(lambda self: len(self.tokens) > 1)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(1, len(self.tokens) - 1))
        assert trim_prompt_cache(self.cache, n) == n
        del self.tokens[-n:]
        self.logits = None

    @rule()
    def copy(self) -> None:
        original = self.cache
        self.cache = copy.deepcopy(original)
        # What happens to the original is nothing to the copy.
        if self.tokens:
            self.model(mx.array([[1, 2, 3]]), cache=original)

    @precondition(lambda self: self.tokens)
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            file = str(Path(directory) / "cache.safetensors")
            save_prompt_cache(file, self.cache)
            self.cache = load_prompt_cache(file)
            mx.eval([entry.state for entry in self.cache])

    @precondition(lambda self: self.tokens)
    @rule(
        others=st.lists(some_tokens, min_size=1, max_size=2), place=st.integers(0, 2), steps=st.integers(0, 5)
    )
    def batch_with_others(self, others: list[list[int]], place: int, steps: int) -> None:
        """Merge with other rows, decode together, then take the row out again."""
        if len(self.tokens) + steps > LONGEST:
            return
        caches = []
        for tokens in others:
            caches.append(make_prompt_cache(self.model))
            self.model(mx.array([tokens]), cache=caches[-1])
        place = min(place, len(caches))
        caches.insert(place, self.cache)
        batch = [entries[0].merge(list(entries)) for entries in zip(*caches, strict=True)]
        for step in range(steps):
            new = [[(7 * step + row) % TEXT["vocab_size"]] for row in range(len(caches))]
            self.logits = self.model(mx.array(new), cache=batch)[place, -1]
            self.tokens += new[place]
        if place and len(caches) > 2:
            # The first row leaves; the others move up.
            for entry in batch:
                entry.filter(list(range(1, len(caches))))
            place -= 1
        self.cache = [entry.extract(place) for entry in batch]

    @invariant()
    def next_logits_are_those_of_a_fresh_computation(self) -> None:
        if not self.tokens:
            return
        with closest_choice() as closest:
            expected = self.model(mx.array([self.tokens]))[0, -1]
            following = self.model(mx.array([[*self.tokens, 5]]))[0, -1]
            mx.eval(expected, following)
        if closest.is_tie:
            return
        if self.logits is not None:
            assert mx.abs(self.logits - expected).max().item() <= TOLERANCE
        after = copy.deepcopy(self.cache)
        logits = self.model(mx.array([[5]]), cache=after)[0, -1]
        assert mx.abs(logits - following).max().item() <= TOLERANCE


def test_no_sequence_of_operations_changes_the_logits(count: Callable[[int, int], int]) -> None:
    run_state_machine_as_test(
        CacheSequences,
        settings=settings(
            max_examples=count(12, 500),
            stateful_step_count=8,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
