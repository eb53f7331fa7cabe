"""Whatever mlx-vlm does to a prompt cache, the next logits are those of a fresh computation."""

import copy
from collections.abc import Callable
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

from tests.hosts.ties import closest_choice
from tests.vlm.vlm_runs import TOLERANCE, VLM_VERSION, difference

LONGEST = 160  # tokens: five budgets of 4 blocks of 8

token = st.integers(0, 600)
some_tokens = st.lists(token, min_size=1, max_size=60)


def clone(cache: list[Any]) -> list[Any]:
    """As the prefix cache keeps and hands out states."""
    if VLM_VERSION < (0, 7, 0):
        return copy.deepcopy(cache)
    from mlx_vlm import apc_adapters

    targets: list[mx.array] = []
    made = [
        apc_adapters.clone_cache_entry(entry, min_capacity_tokens=None, eval_targets=targets)
        for entry in cache
    ]
    mx.eval(targets)
    return made


class CacheSequences(RuleBasedStateMachine):
    """One row: its tokens, its cache, and the logits after its last token."""

    model: Any  # set by the test

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.cache: list[Any] = self.model.make_cache()
        self.logits: mx.array | None = None

    def run(self, tokens: list[list[int]], cache: list[Any] | None = None) -> mx.array:
        return self.model(mx.array(tokens), cache=cache).logits[:, -1]

    @rule(tokens=some_tokens)
    def feed(self, tokens: list[int]) -> None:
        tokens = tokens[: LONGEST - len(self.tokens)]
        if tokens:
            self.logits = self.run([tokens], self.cache)[0]
            self.tokens += tokens

    @rule(tokens=st.lists(token, min_size=1, max_size=9))
    def decode(self, tokens: list[int]) -> None:
        for t in tokens[: LONGEST - len(self.tokens)]:
            self.feed([t])

    @precondition(lambda self: len(self.tokens) > 1)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(1, len(self.tokens) - 1))
        assert [entry.trim(n) for entry in self.cache] == [n] * 3
        del self.tokens[-n:]
        self.logits = None

    # Entries that have left a batch have these attributes from their next use on.
    @precondition(lambda self: len(self.tokens) > 1 and all(hasattr(e, "keys") for e in self.cache))
    @rule(data=st.data())
    def cut_as_before_0_7(self, data: st.DataObject) -> None:
        """Where a conversation's next prompt shares only a part of what is cached."""
        n = data.draw(st.integers(1, len(self.tokens) - 1))
        for entry in self.cache:
            entry.keys, entry.values = entry.keys[:, :, :n], entry.values[:, :, :n]
            entry.offset = n
        del self.tokens[n:]
        self.logits = None

    @rule()
    def clone(self) -> None:
        original, self.cache = self.cache, clone(self.cache)
        # What happens to the original is nothing to the copy.
        if self.tokens:
            self.run([[1, 2, 3]], original)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), drafts=st.lists(token, min_size=1, max_size=6))
    def roll_back_drafts(self, data: st.DataObject, drafts: list[int]) -> None:
        if len(self.tokens) + len(drafts) > LONGEST:
            return
        accepted = data.draw(st.integers(0, len(drafts) - 1))
        self.run([drafts], self.cache)
        assert self.model.rollback_speculative_cache(self.cache, None, accepted, len(drafts)) == accepted
        self.tokens += drafts[: accepted + 1]
        self.logits = None

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
            caches.append(self.model.make_cache())
            self.run([tokens], caches[-1])
        place = min(place, len(caches))
        caches.insert(place, self.cache)
        batch = [type(entries[0]).merge(list(entries)) for entries in zip(*caches, strict=True)]
        for step in range(steps):
            new = [[(7 * step + row) % 600] for row in range(len(caches))]
            self.logits = self.run(new, batch)[place]
            self.tokens += new[place]
        if place and len(caches) > 2:
            # The first row leaves; the others move up.
            for entry in batch:
                entry.filter(mx.arange(1, len(caches)))
            place -= 1
        self.cache = [entry.extract(place) for entry in batch]

    @invariant()
    def next_logits_are_those_of_a_fresh_computation(self) -> None:
        if not self.tokens:
            return
        with closest_choice() as closest:
            both = self.model(mx.array([[*self.tokens, 5]])).logits[0, -2:]
            mx.eval(both)
        if closest.is_tie:
            return
        if self.logits is not None:
            assert difference(self.logits, both[0]) <= TOLERANCE
        assert difference(self.run([[5]], clone(self.cache))[0], both[1]) <= TOLERANCE


def test_no_sequence_of_operations_changes_the_logits(model: Any, count: Callable[[int, int], int]) -> None:
    CacheSequences.model = model
    run_state_machine_as_test(
        CacheSequences,
        settings=settings(
            max_examples=count(10, 400),
            stateful_step_count=8,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
