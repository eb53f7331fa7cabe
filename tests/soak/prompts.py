"""Long prompts that share prefixes, with answers that no rounding changes."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step

from tests.hosts.ties import closest_choice
from tests.soak.clients import words

FAMILIES, TOKENS = 4, 10
# Of the logits' two highest, where they are of the order of 1: what batches change is below 1e-5.
MARGIN = 1e-3


def write_prompts(model: Path, count: int, seed: int) -> list[str]:
    """``count`` users' messages of 50 to 130 words in ``FAMILIES`` families of one beginning each."""
    rng = random.Random(seed)
    loaded, tokenizer = load(str(model))[:2]
    beginnings = [words(rng, 40) for _ in range(FAMILIES)]
    prompts: list[str] = []
    while len(prompts) < count:
        prompt = f"{beginnings[len(prompts) % FAMILIES]} {words(rng, rng.randrange(10, 90))}"
        if _is_clear(loaded, tokenizer, prompt):
            prompts.append(prompt)
    return prompts


def _is_clear(model: Any, tokenizer: Any, prompt: str) -> bool:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    with closest_choice() as closest:
        steps = generate_step(mx.array(ids), model, max_tokens=TOKENS)
        for _, logprobs in steps:
            second, first = mx.sort(logprobs)[-2:].tolist()
            if first - second < MARGIN or closest.is_tie:
                return False
    return True
