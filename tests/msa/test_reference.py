"""The definition of MSA against loops over single keys, written from the paper's equations."""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.msa.reference import attend, select_blocks

DIMS, VALUE_DIMS, HEADS_PER_GROUP = 8, 6, 2
SCALE = DIMS**-0.5


@dataclass
class Case:
    """Random inputs: the last ``length`` of ``n_keys`` cache slots are the queries."""

    padding: list[int]
    groups: int
    n_keys: int
    length: int
    block: int
    topk: int
    local: int
    init: int
    seed: int

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)

        def draw(*shape):
            # Multiples of 1/16, so that scores are exact and ties are true ties.
            return (np.round(rng.normal(size=shape) * 16) / 16).astype(np.float32)

        batch = len(self.padding)
        self.index_queries = draw(batch, self.groups, self.length, DIMS)
        self.index_keys = draw(batch, 1, self.n_keys, DIMS)
        self.queries = draw(batch, self.groups * HEADS_PER_GROUP, self.length, DIMS)
        self.keys = draw(batch, self.groups, self.n_keys, DIMS)
        self.values = draw(batch, self.groups, self.n_keys, VALUE_DIMS)
        slots = np.arange(self.n_keys)
        self.key_positions = np.stack([slots - p for p in self.padding]).astype(np.int32)
        self.query_positions = self.key_positions[:, self.n_keys - self.length :]

    def positions(self):
        """As the model passes them: no key positions where nothing is padded."""
        if any(self.padding):
            return mx.array(self.query_positions), mx.array(self.key_positions)
        return mx.array(self.query_positions[:1]), None

    def select(self):
        ids = select_blocks(
            mx.array(self.index_queries),
            mx.array(self.index_keys),
            *self.positions(),
            block_size=self.block,
            topk_blocks=self.topk,
            local_blocks=self.local,
            init_blocks=self.init,
        )
        return np.array(ids)

    def attend(self, ids, dtype=mx.float32):
        arrays = (mx.array(a).astype(dtype) for a in (self.queries, self.keys, self.values))
        return attend(*arrays, mx.array(ids), *self.positions(), block_size=self.block, scale=SCALE)

    def each_query(self):
        """``(row, group, index, position)`` of every query that is a token."""
        for row, group, index in np.ndindex(self.index_queries.shape[:3]):
            position = int(self.query_positions[row, index])
            if position >= 0:
                yield row, group, index, position

    def block_scores(self, row, group, index):
        """``{block: largest dot product with a visible key of it}`` for one query of one group."""
        scores = {}
        for slot in range(self.n_keys):
            at = int(self.key_positions[row, slot])
            if 0 <= at <= self.query_positions[row, index]:
                score = float(self.index_queries[row, group, index] @ self.index_keys[row, 0, slot])
                scores[at // self.block] = max(score, scores.get(at // self.block, -math.inf))
        return scores

    def attention(self, row, head, index, blocks):
        """The output of one query head over the visible keys of ``blocks``, in float64."""
        group = head // HEADS_PER_GROUP
        weights, weighted = 0.0, np.zeros(VALUE_DIMS)
        for slot in range(self.n_keys):
            at = int(self.key_positions[row, slot])
            if 0 <= at <= self.query_positions[row, index] and at // self.block in blocks:
                query = self.queries[row, head, index].astype(np.float64)
                weight = math.exp(SCALE * float(query @ self.keys[row, group, slot]))
                weights += weight
                weighted += weight * self.values[row, group, slot]
        return weighted / weights


@st.composite
def cases(draw):
    n_keys = draw(st.integers(1, 24))
    local, init = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return Case(
        padding=draw(st.one_of(st.just([0]), st.lists(st.integers(0, n_keys - 1), min_size=1, max_size=3))),
        groups=draw(st.integers(1, 3)),
        n_keys=n_keys,
        length=draw(st.integers(1, n_keys)),
        block=draw(st.integers(1, 6)),
        topk=draw(st.integers(max(1, local + init), 6)),
        local=local,
        init=init,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def examples(function):
    """Shapes that shall be tried whatever the search finds."""
    full = {"groups": 3, "n_keys": 24, "length": 24, "block": 4, "topk": 3, "seed": 0}
    for case in (
        Case(padding=[0], local=1, init=0, **full),
        Case(padding=[0, 3, 17], local=1, init=0, **full),
        Case(padding=[5, 0], local=0, init=0, **full),
        Case(padding=[1, 4], local=2, init=1, **full),
        Case(padding=[9], local=1, init=2, **full),
    ):
        function = example(case)(function)
    return settings(max_examples=60, deadline=None, derandomize=True)(given(cases())(function))


@examples
def test_chosen_blocks(case):
    """The forced blocks, then the best visible ones up to the budget; ties may go either way."""
    ids = case.select()
    n_blocks = math.ceil(case.n_keys / case.block)
    assert ids.dtype == np.int32
    assert ids.shape == (*case.index_queries.shape[:3], min(case.topk, n_blocks))
    for row, group, index, position in case.each_query():
        chosen = [i for i in ids[row, group, index].tolist() if i != -1]
        scores = case.block_scores(row, group, index)
        own = position // case.block
        forced = {b for b in scores if own - case.local < b <= own or b < case.init}
        assert len(chosen) == len(set(chosen)) == min(case.topk, len(scores))
        assert forced <= set(chosen) <= scores.keys()
        rest = sorted((scores[b] for b in scores.keys() - forced), reverse=True)
        best = rest[: len(chosen) - len(forced)]
        assert sorted((scores[b] for b in set(chosen) - forced), reverse=True) == best


@examples
def test_ids_are_blocks_or_unused_even_where_a_query_is_padding(case):
    ids = case.select()
    assert ids.min() >= -1
    assert ids.max() < math.ceil(case.n_keys / case.block)


@examples
def test_attention_over_the_chosen_blocks(case):
    ids = case.select()
    out = np.array(case.attend(ids))
    assert np.isfinite(out).all()
    for row, group, index, _ in case.each_query():
        blocks = set(ids[row, group, index].tolist()) - {-1}
        for head in range(group * HEADS_PER_GROUP, (group + 1) * HEADS_PER_GROUP):
            expected = case.attention(row, head, index, blocks)
            np.testing.assert_allclose(out[row, head, index], expected, atol=2e-6)


@examples
def test_the_order_of_block_ids_does_not_matter(case):
    ids = case.select()
    shuffled = np.random.default_rng(0).permuted(ids, axis=-1)
    assert mx.allclose(case.attend(ids), case.attend(shuffled), atol=1e-6)


@examples
def test_dense_causal_attention_when_every_block_fits(case):
    case.topk = math.ceil(case.n_keys / case.block)
    out = np.array(case.attend(case.select()))
    everything = set(range(case.topk))
    for row, group, index, _ in case.each_query():
        head = group * HEADS_PER_GROUP
        expected = case.attention(row, head, index, everything)
        np.testing.assert_allclose(out[row, head, index], expected, atol=2e-6)


@examples
def test_padding_does_not_change_a_row(case):
    """The same tokens without padding choose the same blocks and give the same output."""
    ids, out = case.select(), case.attend(case.select())
    for row, pad in enumerate(case.padding):
        queries = min(case.length, case.n_keys - pad)
        alone = Case(
            [0], case.groups, case.n_keys - pad, queries, case.block, case.topk, case.local, case.init, 0
        )
        for name in ("index_queries", "queries"):
            setattr(alone, name, getattr(case, name)[row : row + 1, :, case.length - queries :])
        for name in ("index_keys", "keys", "values"):
            setattr(alone, name, getattr(case, name)[row : row + 1, :, pad:])
        expected = alone.select()
        for group, index in np.ndindex(expected.shape[1:3]):
            scores = alone.block_scores(0, group, index)
            padded = ids[row, group, case.length - queries + index]
            # As scores, for ties between blocks may be broken differently.
            assert sorted(scores[i] for i in padded.tolist() if i >= 0) == sorted(
                scores[i] for i in expected[0, group, index].tolist() if i >= 0
            )
        out_alone = alone.attend(ids[row : row + 1, :, case.length - queries :])
        assert mx.allclose(out[row, :, case.length - queries :], out_alone[0], atol=2e-6)


def test_groups_choose_for_themselves():
    """Block 0 suits group 0 and block 1 group 1; over both groups, block 0 has the larger score."""
    index_queries = mx.array([[[[2.0, 0.0]], [[0.0, 1.0]]]])
    index_keys = mx.array([[[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]]])
    ids = select_blocks(index_queries, index_keys, mx.array([[2]]), None, block_size=1, topk_blocks=2)
    assert sorted(ids[0, 0, 0].tolist()) == [0, 2]
    assert sorted(ids[0, 1, 0].tolist()) == [1, 2]


def test_a_future_key_does_not_win_a_block():
    """The best key of block 1 lies behind the query, so that block 0 is the better one."""
    index_keys = mx.array([[[[1.0], [1.0], [0.5], [9.0], [0.0], [0.0]]]])
    positions = mx.array([[2, 5]])
    ids = select_blocks(
        mx.ones((1, 1, 2, 1)), index_keys, positions, None, block_size=2, topk_blocks=1, local_blocks=0
    )
    assert ids.flatten().tolist() == [0, 1]


def test_the_own_block_counts_among_the_budget():
    index_keys = mx.array([[[[5.0], [4.0], [3.0], [-9.0]]]])
    ids = select_blocks(mx.ones((1, 1, 1, 1)), index_keys, mx.array([[3]]), None, block_size=1, topk_blocks=2)
    assert sorted(ids.flatten().tolist()) == [0, 3]


def test_blocks_are_cut_at_content_positions():
    """One padding slot before four tokens: blocks of two hold slots 1-2 and 3-4."""
    index_keys = mx.array([[[[9.0], [0.0], [7.0], [1.0], [1.0]]]])
    ids = select_blocks(
        mx.ones((1, 1, 1, 1)),
        index_keys,
        mx.array([[3]]),
        mx.array([[-1, 0, 1, 2, 3]]),
        block_size=2,
        topk_blocks=1,
        local_blocks=0,
    )
    assert ids.flatten().tolist() == [0]


def test_scores_are_float32_for_narrow_inputs():
    """Products that differ by less than half precision still order the blocks."""
    index_queries = mx.ones((1, 1, 1, 2), dtype=mx.bfloat16)
    index_keys = mx.array([[[[256.0, 0.0], [256.0, 0.5], [0.0, 0.0]]]], dtype=mx.bfloat16)
    ids = select_blocks(index_queries, index_keys, mx.array([[2]]), None, block_size=1, topk_blocks=2)
    assert sorted(ids.flatten().tolist()) == [1, 2]


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 5e-3), (mx.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("padding", [[0], [0, 3, 17]], ids=str)
def test_the_output_has_the_dtype_of_the_queries(dtype, tolerance, padding):
    case = Case(padding, groups=2, n_keys=24, length=24, block=4, topk=3, local=1, init=0, seed=0)
    ids = case.select()
    out = case.attend(ids, dtype)
    assert out.dtype == dtype
    assert mx.isfinite(out).all()
    for row, pad in enumerate(padding):
        assert mx.allclose(out[row, :, pad:], case.attend(ids)[row, :, pad:], atol=tolerance)


def test_gradients_reach_queries_keys_and_values():
    case = Case([0], groups=2, n_keys=16, length=16, block=2, topk=3, local=1, init=0, seed=0)
    ids = mx.array(case.select())

    def loss(queries, keys, values):
        out = attend(queries, keys, values, ids, *case.positions(), block_size=case.block, scale=SCALE)
        return (out**2).sum()

    arrays = [mx.array(a) for a in (case.queries, case.keys, case.values)]
    for gradient in mx.grad(loss, argnums=(0, 1, 2))(*arrays):
        assert mx.isfinite(gradient).all()
        assert mx.abs(gradient).max() > 0
