"""Drafters of others for M3, in mlx-vlm's own classes with random weights: greedy answers stay the same."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm.speculative.drafters.dspark", reason="this mlx-vlm has no DSpark")

from tests.drafts.runs import assert_same_tokens, drafted, drafted_together, make_knowing
from tests.vlm.vlm_runs import BUDGET, Answer, Request, alone, text

_LAYERS = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 704,
    "max_position_embeddings": 4096,
}
_BLOCK = {"block_size": 7, "mask_token_id": 650, "target_layer_ids": [0, 2]}
_SELECTOR = {"conv_kernel_size": 3, "conv_group_size": 32, "selector_rank": 16, "selector_top_k": 8}
_EAGLE3 = {
    "model_type": "eagle3",
    "transformer_layer_config": _LAYERS | {"num_hidden_layers": 1},
    "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    "capture_layer_ids": [0, 1, 2],
}
# As nvidia's, RadixArk's and Inferact's for M3 and M3.1; the last in both of its forms.
DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DSpark": (
        "dspark",
        _LAYERS | {"architectures": ["Qwen3DSparkModel"], "dflash_config": _BLOCK | {"markov_rank": 16}},
    ),
    "DFlash2": (
        "dflash2",
        _LAYERS | {"block_size": 7, "num_target_layers": 3, "dflash_config": _BLOCK | _SELECTOR},
    ),
    "EAGLE-3": ("eagle3", _EAGLE3 | {"draft_vocab_size": 704}),
    "EAGLE-3 with a part of the vocabulary": ("eagle3", _EAGLE3 | {"draft_vocab_size": 256}),
}


def make(name: str) -> Any:
    module, config = DRAFTERS[name]
    module = import_module(f"mlx_vlm.speculative.drafters.{module}")
    mx.random.seed(1)
    drafter = module.Model(module.ModelConfig.from_dict(config))
    if getattr(drafter, "d2t", None) is not None:
        drafter.d2t = mx.arange(256) % 3 * 100
    return drafter


def make_knowing_eagle3(drafter: Any, answers: Sequence[Answer], seed: int, rate: float) -> None:
    """As :func:`make_knowing`, for all rows at once."""
    random = np.random.default_rng(seed)
    own_block = type(drafter).draft_block.__get__(drafter)
    by_first = {answer.tokens[0]: answer.tokens for answer in answers}
    rows: list[list[int]] = []

    def draft_block(last_bonus: Any, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        own = own_block(last_bonus, hidden, *args, **kwargs)
        newest = np.array(last_bonus).reshape(-1).tolist()
        if not drafter.accept_lens:
            rows[:] = [by_first[token] for token in newest]
        at = int(sum(drafter.accept_lens)) + len(drafter.accept_lens)
        drafts = own.tolist()
        for row, tokens in enumerate(rows if len(rows) == len(newest) else []):
            for i, token in enumerate(tokens[at + 1 : at + 1 + len(drafts[row])]):
                drafts[row][i] = token if random.random() < rate else drafts[row][i]
        return mx.array(drafts, dtype=own.dtype)

    drafter.draft_block = draft_block


def test_which_prompts_are_read_in_pieces(model: Any) -> None:
    policy = model.language_model.chunked_prefill_policy
    short, long = mx.zeros((1, 8192)), mx.zeros((1, 8193))
    assert policy(input_ids=long) is True
    cases = [("dflash", short), ("dflash", long), ("eagle3", short), ("eagle3", long), ("mtp", long)]
    found = [policy(input_ids=ids, draft_model=1, draft_kind=kind) for kind, ids in cases]
    assert found == [True, True, False, True, False]


@pytest.mark.parametrize("name", DRAFTERS)
def test_past_the_budget_and_in_batches(
    name: str, model: Any, fresh_seed: int, count: Callable[[int, int], int]
) -> None:
    kind = "eagle3" if "EAGLE" in name else "dflash"
    random = np.random.default_rng(fresh_seed)
    drafter = make(name)
    rates = []

    make_good = make_knowing_eagle3 if kind == "eagle3" else make_knowing

    def prompt() -> Any:
        return text(int(random.integers(5, 8 * BUDGET)), int(random.integers(2**31)))

    for _ in range(count(1, 25)):
        options: dict[str, Any] = {"draft_kind": kind, "draft_block_size": int(random.integers(3, 9))}
        expected = alone(model, one := prompt(), 16)
        # The first knows all, so that many are accepted whatever the seed.
        make_good(drafter, [expected], fresh_seed, 0.8 if rates else 1.0)
        assert_same_tokens(drafted(model, one, 16, drafter, prefill_step_size=32, **options), expected)
        rates.append(sum(drafter.accept_lens) / sum(drafter.draft_lens))

        requests = [Request(prompt(), int(random.integers(6, 12))) for _ in range(3)]
        answers = [alone(model, request.prompt, request.n_tokens) for request in requests]
        if len({answer.tokens[0] for answer in answers}) == len(answers):
            make_good(drafter, answers, fresh_seed, 0.8)
            said = drafted_together(model, requests, drafter, prefill_step_size=32, **options)
            for tokens, answer in zip(said, answers, strict=True):
                assert_same_tokens(tokens, answer)
    assert max(rates) > 0.3
