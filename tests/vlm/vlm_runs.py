"""The same prompts through the model itself and through mlx-vlm's loops, with the logits of each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

VLM_VERSION = tuple(int(part) for part in version("mlx-vlm").split(".")[:3])
BUDGET = 4 * 8  # tokens that a query of the tiny checkpoint may attend to on a sparse layer
VOCABULARY = 640  # the ids below its markers for images and video
IMAGE_TOKEN, VIDEO_TOKEN = 644, 645
TOLERANCE = 1e-4
# 3 channels, 2 frames, 14 x 14 pixels.
PATCH = 3 * 2 * 14 * 14

has_checkpoints = pytest.mark.skipif(
    VLM_VERSION < (0, 7, 0), reason="the prefix cache of mlx-vlm before 0.7 takes no caches but its own"
)
has_offload = pytest.mark.skipif(VLM_VERSION < (0, 7, 0), reason="mlx-vlm offloads experts from 0.7 on")


@dataclass
class Prompt:
    """Tokens, and what the processor would give beside them."""

    tokens: list[int]
    media: dict[str, mx.array] = field(default_factory=dict)


@dataclass
class Answer:
    """Greedy tokens, and the logits that each was taken from."""

    tokens: list[int]
    logits: list[mx.array]
    cached_tokens: int = 0


def text(n: int, seed: int = 0) -> Prompt:
    return Prompt(np.random.default_rng(seed).integers(0, VOCABULARY, n).tolist())


def pixels(grids: Sequence[tuple[int, int, int]], seed: int) -> tuple[mx.array, mx.array]:
    n_patches = sum(t * h * w for t, h, w in grids)
    array = np.random.default_rng(seed).normal(size=(n_patches, PATCH)).astype(np.float32)
    return mx.array(array), mx.array(grids)


def with_images(n: int, grids: Sequence[tuple[int, int, int]] = ((1, 4, 6),), seed: int = 0) -> Prompt:
    """``n`` tokens of text, and an image for each grid after its first quarter."""
    array, grid = pixels(grids, seed + 1000)
    words = text(n, seed).tokens
    images: list[int] = []
    for t, h, w in grids:
        images += [IMAGE_TOKEN] * (t * h * w // 4) + [seed % VOCABULARY]
    tokens = words[: n // 4] + images + words[n // 4 :]
    return Prompt(tokens, {"pixel_values": array, "image_grid_thw": grid})


def embeddings(model: Any, prompt: Prompt) -> dict[str, mx.array]:
    """As the server hands them to the batch generator."""
    made = model.get_input_embeddings(mx.array([prompt.tokens]), **_with_pixels(prompt)).to_dict()
    return {key: value for key, value in made.items() if value is not None}


def fresh_logits(model: Any, prompt: Prompt, more: Sequence[int] = ()) -> mx.array:
    """Logits ``[L, vocabulary]`` of one pass without a cache."""
    tokens = mx.array([[*prompt.tokens, *more]])
    return model(tokens, **_with_pixels(prompt)).logits[0]


def alone(model: Any, prompt: Prompt, n_tokens: int) -> Answer:
    """Step by step, with nothing of mlx-vlm's around the model and its cache."""
    cache = model.make_cache()
    answer = Answer([], [])
    logits = model(mx.array([prompt.tokens]), cache=cache, **_with_pixels(prompt)).logits[0, -1]
    while True:
        answer.logits.append(logits)
        answer.tokens.append(int(mx.argmax(logits)))
        if len(answer.tokens) == n_tokens:
            return answer
        logits = model.language_model(mx.array([answer.tokens[-1:]]), cache=cache).logits[0, -1]


def _with_pixels(prompt: Prompt) -> dict[str, Any]:
    return {"pixel_values": None, **prompt.media}


class _StoppingCriteria:
    def add_eos_token_ids(self, ids: Any = None) -> None:
        pass

    def __call__(self, token: int) -> bool:
        return False


class Processor:
    """What the loops ask of a processor, for token ids that stand for nothing."""

    def __init__(self) -> None:
        self.tokenizer = self.detokenizer = self
        self.stopping_criteria = _StoppingCriteria()
        self.last_segment = ""

    def reset(self) -> None:
        pass

    def add_token(self, token: int, skip_special_token_ids: Any = None) -> None:
        pass

    def finalize(self) -> None:
        pass


def recorder(logits_of_steps: list[mx.array]) -> Callable[[mx.array, mx.array], mx.array]:
    def record(tokens: mx.array, logits: mx.array) -> mx.array:
        logits_of_steps.append(logits.reshape(-1))
        return logits

    return record


def streamed(model: Any, prompt: Prompt, n_tokens: int, **options: Any) -> Answer:
    """Through ``stream_generate``."""
    from mlx_vlm.generate import stream_generate

    logits: list[mx.array] = []
    options |= {"temperature": 0.0, "logits_processors": [recorder(logits)], "max_tokens": n_tokens}
    tokens, cached = [], 0
    for result in stream_generate(
        model, Processor(), "", input_ids=mx.array([prompt.tokens]), **prompt.media, **options
    ):
        if result.generation_tokens > len(tokens):
            tokens.append(int(result.token))
        cached = getattr(result, "cached_tokens", 0)
    return Answer(tokens, logits[:n_tokens], cached)


@dataclass
class Request:
    prompt: Prompt
    n_tokens: int
    joins_at: int = 0
    more: dict[str, Any] = field(default_factory=dict)  # keywords for the model and the prefix cache


def together(model: Any, requests: Sequence[Request], **options: Any) -> list[Answer]:
    """Through ``BatchGenerator``; each request joins at its step."""
    from mlx_vlm.generate import BatchGenerator

    generator = BatchGenerator(model.language_model, Processor(), stop_tokens=set(), **options)
    answers = [Answer([], []) for _ in requests]
    waiting = sorted(range(len(requests)), key=lambda row: requests[row].joins_at)
    row_of: dict[int, int] = {}
    step = 0
    while any(len(a.tokens) < r.n_tokens for a, r in zip(answers, requests, strict=True)):
        while waiting and requests[waiting[0]].joins_at <= step:
            row = waiting.pop(0)
            row_of[_insert(generator, model, requests[row], answers[row])] = row
        for response in generator.next()[1]:
            answers[row_of[response.uid]].tokens.append(int(response.token))
        step += 1
        assert step < 500, "the generator makes no progress"
    for answer in answers:
        answer.logits = answer.logits[: len(answer.tokens)]
    return answers


def _insert(generator: Any, model: Any, request: Request, answer: Answer) -> int:
    (uid,) = generator.insert(
        [list(request.prompt.tokens)],
        max_tokens=[request.n_tokens],
        prompt_kwargs=[{**embeddings(model, request.prompt), **request.more}],
        logits_processors=[[recorder(answer.logits)]],
    )
    return uid


def difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return mx.abs(a - b).max().item()


def assert_same_answer(answer: Answer, expected: Answer) -> float:
    """Equal tokens and logits; returns the largest difference of the latter."""
    assert answer.tokens == expected.tokens
    assert len(answer.logits) == len(expected.logits) == len(expected.tokens)
    largest = max(difference(a, b) for a, b in zip(answer.logits, expected.logits, strict=True))
    assert largest <= TOLERANCE
    return largest
