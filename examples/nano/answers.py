"""Who answers: a checkpoint in stock mlx-lm, in stock mlx-vlm, or in transformers; always greedily."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from case import Case, media

MOST_TOKENS = 160

Answer = Callable[[Sequence[Case]], list[str]]


def by_mlx_lm(model: Path) -> Answer:
    from mlx_lm import generate, load

    loaded, tokenizer = load(str(model))[:2]

    def answer(case: Case) -> str:
        return generate(loaded, tokenizer, prompt_of(tokenizer, case), max_tokens=MOST_TOKENS)

    return lambda cases: [answer(case) for case in cases]


def by_mlx_lm_in_batches(model: Path) -> Answer:
    """Several times as fast, and by what this plugin promises the same."""
    from mlx_lm import batch_generate, load

    loaded, tokenizer = load(str(model))[:2]

    def answer(cases: Sequence[Case]) -> list[str]:
        prompts = [tokenizer.encode(prompt_of(tokenizer, case), add_special_tokens=False) for case in cases]
        return batch_generate(loaded, tokenizer, prompts, max_tokens=MOST_TOKENS).texts

    return answer


def by_mlx_vlm(model: Path) -> Answer:
    from mlx_vlm import generate, load

    loaded, processor = load(str(model))

    def answer(case: Case) -> str:
        given = media([case])
        shown = {"image": given.get("images")}
        if case.is_video:
            # As its loader gives what it reads from a file: frames, channels, height, width.
            shown = {"video": [video.transpose(0, 3, 1, 2) for video in given["videos"]]}
        prompt = prompt_of(processor.tokenizer, case)
        return generate(loaded, processor, prompt, max_tokens=MOST_TOKENS, temperature=0.0, **shown).text

    return lambda cases: [answer(case) for case in cases]


def by_transformers(model: Path) -> Answer:
    """Pictures are read by mlx-vlm's processor: transformers' own needs torchvision."""
    import mlx_vlm.models.minimax_m3_vl  # noqa: F401 (with it come the processors)
    import torch
    from mlx_vlm.utils import load_processor
    from transformers import AutoTokenizer, MiniMaxM3SparseForConditionalGeneration

    loaded = MiniMaxM3SparseForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(model), load_processor(model)

    def answer(case: Case) -> str:
        made = processor(text=prompt_of(tokenizer, case), **media([case]))
        inputs = {name: torch.from_numpy(np.array(array)) for name, array in made.items()}
        with torch.inference_mode():
            ids = loaded.generate(**inputs, do_sample=False, max_new_tokens=MOST_TOKENS)
        return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]).removesuffix(tokenizer.eos_token)

    return lambda cases: [answer(case) for case in cases]


WAYS = {
    "mlx_lm": by_mlx_lm,
    "mlx_lm_in_batches": by_mlx_lm_in_batches,
    "mlx_vlm": by_mlx_vlm,
    "transformers": by_transformers,
}


def prompt_of(tokenizer: Any, case: Case) -> str:
    return tokenizer.apply_chat_template(
        case.messages, tools=case.tools, add_generation_prompt=True, tokenize=False
    )
