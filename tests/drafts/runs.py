"""The tiny model's greedy answers with drafts, through mlx-vlm's own loops."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.drafts import checkpoint as drafts
from tests.vlm.vlm_runs import Answer, Processor, Prompt, alone

# Logits of one pass and of several differ by rounding; where the two best are closer, both are right.
TIE = 1e-4


def load(directory: Path) -> Any:
    from mlx_vlm.speculative.drafters import load_drafter

    drafter, kind = load_drafter(str(directory))
    assert kind == "dflash"
    return drafter


def random_drafter(directory: Path, seed: int, **text: Any) -> Any:
    config = drafts.config(**text)
    drafts.write(directory, config, drafts.values(config["text_config"], seed))
    return load(directory)


def make_knowing(drafter: Any, answers: Sequence[Answer], seed: int, rate: float) -> Any:
    """Have ``drafter`` propose what the target is going to say, each token with probability ``rate``.

    Its own forward pass runs as before.  A block finds its answer by the first token of the reply.
    """
    random = np.random.default_rng(seed)
    own_block, stands_at = type(drafter).draft_block.__get__(drafter), {}
    by_first = {answer.tokens[0]: answer for answer in answers}
    assert len(by_first) == len(answers), "two answers begin alike: take other prompts"

    def draft_block(last_bonus, hidden, cache, block_size, sampler, token_dtype=mx.int32):  # type: ignore[no-untyped-def]
        own = own_block(last_bonus, hidden, cache, block_size, sampler, token_dtype)
        if id(cache) not in stands_at:
            # The object is kept, so that no other one gets its id.
            stands_at[id(cache)] = [by_first[int(last_bonus)], 0, cache]
        else:
            stands_at[id(cache)][1] += hidden.shape[1]
        answer, at, _ = stands_at[id(cache)]
        known = answer.tokens[at + 1 : at + block_size]
        right = random.random(len(known)) < rate
        known = [token if fits else (token + 1) % 600 for token, fits in zip(known, right, strict=True)]
        tokens = known + own[0].tolist()[len(known) :]
        return mx.array([tokens], dtype=token_dtype)

    drafter.draft_block = draft_block
    return drafter


def drafted(model: Any, prompt: Prompt, n_tokens: int, drafter: Any, **options: Any) -> list[int]:
    """Through ``stream_generate``."""
    from mlx_vlm.generate import stream_generate

    options = {"temperature": 0.0, "draft_model": drafter, "draft_kind": "dflash"} | options
    ids = mx.array([prompt.tokens])
    tokens = []
    for result in stream_generate(
        model, Processor(), "", input_ids=ids, max_tokens=n_tokens, **prompt.media, **options
    ):
        if result.generation_tokens > len(tokens):
            tokens.append(int(result.token))
    return tokens


def assert_same_tokens(tokens: list[int], expected: Answer) -> None:
    """Up to a tie of the two best logits, after which nothing can be compared."""
    differing = [i for i, (a, b) in enumerate(zip(tokens, expected.tokens, strict=False)) if a != b]
    if differing:
        logits = expected.logits[differing[0]]
        gap = (mx.max(logits) - logits[tokens[differing[0]]]).item()
        assert gap < TIE, f"token {differing[0]} of {tokens} is not that of {expected.tokens}: {gap}"
    assert len(tokens) == len(expected.tokens)


__all__ = ["Answer", "alone", "assert_same_tokens", "drafted", "load", "make_knowing", "random_drafter"]
