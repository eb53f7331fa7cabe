"""The tiny model's greedy answers with drafts, through mlx-vlm's own loops."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.drafts import checkpoint as drafts
from tests.vlm.vlm_runs import Answer, Processor, Prompt, Request, embeddings

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

    drafter.draft_block = drafter.draft_block_greedy = draft_block
    return drafter


def assert_offsets_agree(prompt_cache: Sequence[Any]) -> None:
    """Of K and V, and of index keys, in all layers."""
    offsets = {getattr(entry, "_idx", entry.offset) for entry in prompt_cache}
    offsets |= {entry.index_offset for entry in prompt_cache if hasattr(entry, "index_offset")}
    assert len(offsets) <= 1, offsets


def drafted(model: Any, prompt: Prompt, n_tokens: int, drafter: Any, **options: Any) -> list[int]:
    """Through ``stream_generate``."""
    from mlx_vlm.generate import stream_generate

    cache = model.make_cache()
    options = {"temperature": 0.0, "draft_model": drafter, "draft_kind": "dflash"} | options
    # A conversation and a prefix cache bring their own.
    if not {"prompt_cache_state", "apc_manager"} & options.keys():
        options["prompt_cache"] = cache
    ids = mx.array([prompt.tokens])
    tokens = []
    for result in stream_generate(
        model, Processor(), "", input_ids=ids, max_tokens=n_tokens, **prompt.media, **options
    ):
        assert_offsets_agree(cache)
        if result.generation_tokens > len(tokens):
            tokens.append(int(result.token))
    return tokens


def drafted_together(
    model: Any, requests: Sequence[Request], drafter: Any, **options: Any
) -> list[list[int]]:
    """Through the server's ``BatchGenerator``; each request joins at its step."""
    from mlx_vlm.generate import BatchGenerator

    options = {"greedy_sampling": True, "draft_model": drafter, "draft_kind": "dflash"} | options
    generator = BatchGenerator(model.language_model, Processor(), stop_tokens=set(), **options)
    said: list[list[int]] = [[] for _ in requests]
    waiting = sorted(range(len(requests)), key=lambda row: requests[row].joins_at)
    row_of: dict[int, int] = {}
    for step in range(1000):
        while waiting and requests[waiting[0]].joins_at <= step:
            row = waiting.pop(0)
            request = requests[row]
            (uid,) = generator.insert(
                [list(request.prompt.tokens)],
                max_tokens=[request.n_tokens],
                prompt_kwargs=[{**embeddings(model, request.prompt), **request.more}],
            )
            row_of[uid] = row
        responses = generator.next()[1]
        assert_offsets_agree(generator._generation_batch.prompt_cache)
        for response in responses:
            said[row_of[response.uid]].append(int(response.token))
        if not waiting and all(len(s) >= r.n_tokens for s, r in zip(said, requests, strict=True)):
            return said
    raise AssertionError("the generator makes no progress")


def assert_same_tokens(tokens: list[int], expected: Answer) -> None:
    """Up to a tie of the two best logits, after which nothing can be compared."""
    differing = [i for i, (a, b) in enumerate(zip(tokens, expected.tokens, strict=False)) if a != b]
    if differing:
        logits = expected.logits[differing[0]]
        gap = (mx.max(logits) - logits[tokens[differing[0]]]).item()
        assert gap < TIE, f"token {differing[0]} of {tokens} is not that of {expected.tokens}: {gap}"
    assert len(tokens) == len(expected.tokens)
