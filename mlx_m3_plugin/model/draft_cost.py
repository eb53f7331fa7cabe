"""What drafting costs and gains, counted in bytes of memory that are read.

A forward pass of one sequence is limited by the bytes that it reads.  Several tokens read the dense weights
once, but each chooses experts of its own, so verifying a draft costs more than decoding a token.  The best
length follows from the cost of each, and from how many drafted tokens are accepted; where it is 0, drafting
makes the model slower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

# Of each drafted token, where nothing is known: a block of 7 then gives 3.1 tokens per pass, and MiniMax
# published 2.3 to 3.8.
EXPECTED_ACCEPTANCE = 0.7


def distinct_experts(experts: int, per_token: int, tokens: int) -> float:
    """How many of ``experts`` are chosen by ``tokens`` tokens together, each of which chooses ``per_token``.

    The expected number, if all choices are equally likely: each expert is left out by one token with
    probability ``1 - per_token / experts``.  Real routers have favourites, and choose fewer.
    """
    return experts * (1 - (1 - per_token / experts) ** tokens)


def counted_experts(choices: Sequence[Sequence[int]], tokens: int) -> float:
    """The same, counted: the mean over every ``tokens`` successive tokens of one layer.

    Args:
        choices: the experts of each token, at least ``tokens`` of them.
    """
    windows = [choices[start : start + tokens] for start in range(len(choices) - tokens + 1)]
    return sum(len(set().union(*window)) for window in windows) / len(windows)


def tokens_per_pass(acceptance: Sequence[float]) -> float:
    """Tokens that a forward pass of the target gives: the accepted ones of a draft, and its own.

    Args:
        acceptance: of each drafted token, the probability that it is accepted if all before it were.
    """
    return 1 + sum(accumulate(acceptance, mul))


@dataclass(frozen=True)
class DraftCost:
    """Bytes that are read, for a target and its draft head.

    Attributes:
        shared: what a forward pass of the target reads once, whatever the number of tokens.
        per_token: what it reads for each token, such as K and V of the blocks that the token selects.
        routed: of all routed experts.
        experts: how many of them a layer has.  experts_per_token: how many a token chooses.
        draft: what a round of the draft head reads once: its layers, and the target's head.
        per_drafted: what it reads for each drafted token, such as the Markov head's matrix.
    """

    shared: float
    per_token: float
    routed: float
    experts: int
    experts_per_token: int
    draft: float
    per_drafted: float

    def verification(self, tokens: int) -> float:
        """Of a forward pass of the target."""
        chosen = distinct_experts(self.experts, self.experts_per_token, tokens) if self.experts else 0.0
        return self.shared + self.per_token * tokens + self.routed * chosen / max(1, self.experts)

    def round(self, drafted: int, rows: int = 1) -> float:
        """Of drafting ``drafted`` tokens for each of ``rows`` sequences, which mlx-vlm does one by one, and
        verifying all of them in one pass; of plain decoding for 0."""
        draft = self.draft + self.per_drafted * drafted if drafted else 0.0
        return rows * draft + self.verification(rows * (drafted + 1))

    def speedup(self, acceptance: Sequence[float], rows: int = 1) -> float:
        """How many times as fast as plain decoding it is to draft as many tokens as ``acceptance`` has."""
        return tokens_per_pass(acceptance) * self.round(0, rows) / self.round(len(acceptance), rows)


def best_length(cost: DraftCost, acceptance: Sequence[float], rows: int = 1) -> int:
    """How many tokens to draft, at most as many as ``acceptance`` has; 0 where no length pays."""
    return max(range(len(acceptance) + 1), key=lambda length: cost.speedup(acceptance[:length], rows))
