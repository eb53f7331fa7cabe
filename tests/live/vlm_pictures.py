"""Prompts with synthetic pictures, made by mlx-vlm's own processor; and ways to feed them.

Nothing here needs torch: see ``vlm_ways``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.generate.ar import _make_cache, generate_step
from mlx_vlm.models.cache import make_prompt_cache
from PIL import Image

from tests.live.vlm_ways import PADDING, Pieces, content_of, decode, feed

IMAGE, VIDEO = "]<]image[>[", "]<]video[>["
CONTINUED = 24

# The prompt's parts in order: sizes (height, width) of images, (frames, height, width) of videos,
# numbers of words.  None of the sizes is one that a processor leaves alone.
PROMPTS: dict[str, tuple[Any, ...]] = {
    "image": (30, (100, 150), 30),
    "image first": ((150, 90), 40),
    "two images": (9, (100, 150), 20, (60, 170), 25),
    # Six temporal patches: a segment of four, and one of two.
    "video": (20, (11, 50, 90), 20),
    # Nine: two segments of four, and one of one; the second video is shorter than a segment.
    "two videos": (5, (18, 60, 60), 10, (3, 90, 60), 10),
    "image and video": (12, (60, 110), 12, (10, 60, 80), 16),
    "video and images": (4, (12, 50, 90), 8, (100, 80), 8, (60, 60), 16),
}
WORDS = (
    "the",
    "tool",
    "returns",
    "a",
    "value",
    "and",
    "another",
    "call",
    "in",
    "this",
    "turn",
    "may",
    "follow",
)


@dataclass
class Prompt:
    """One row.

    Attributes:
        tokens: ``[T]``, of which the last ``CONTINUED`` are to be decoded.
        pictures: what the processor made of images and videos: pixel values and grids.
    """

    tokens: np.ndarray
    pictures: dict[str, np.ndarray]

    @property
    def length(self) -> int:
        return len(self.tokens) - CONTINUED


def make_prompt(processor: Any, parts: tuple[Any, ...], seed: int) -> Prompt:
    random = np.random.default_rng(seed)
    text: list[str] = []
    images, videos = [], []
    for part in parts:
        if isinstance(part, int):
            text += random.choice(WORDS, part).tolist()
        elif len(part) == 2:
            text.append(IMAGE)
            images.append(Image.fromarray(random_frames(random, 1, *part)[0]))
        else:
            text.append(VIDEO)
            videos.append(random_frames(random, *part))
    made = processor(text=" ".join(text), images=images or None, videos=videos or None)
    arrays = {name: np.array(array) for name, array in made.items()}
    prompt = arrays.pop("input_ids")[0]
    arrays.pop("attention_mask")
    # Below the markers, which come last in this vocabulary.
    continuation = random.integers(0, 600, CONTINUED)
    return Prompt(np.concatenate([prompt, continuation]), arrays)


def random_frames(random: np.random.Generator, n: int, height: int, width: int) -> np.ndarray:
    return random.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def one_pass(model: Any, prompts: Sequence[Prompt]) -> Pieces:
    for n, prompt in enumerate(prompts):
        yield n, 0, np.array(model(mx.array(prompt.tokens)[None], **arrays_of(prompt)).logits[0])


def arrays_of(prompt: Prompt) -> dict[str, mx.array]:
    return {name: mx.array(array) for name, array in prompt.pictures.items()}


def embeddings(model: Any, prompt: Prompt, **keywords: Any) -> mx.array:
    """``[1, length, D]``, of the prompt without its continuation."""
    ids = mx.array(prompt.tokens[: prompt.length])[None]
    return model.get_input_embeddings(ids, **{**arrays_of(prompt), **keywords}).inputs_embeds


def prefill_and_decode(model: Any, prompts: Sequence[Prompt], step: int) -> Pieces:
    """Pictures' embeddings in pieces of ``step``, then one token at a time."""
    for n, prompt in enumerate(prompts):
        cache = make_prompt_cache(model.language_model)
        embedded = embeddings(model, prompt)
        for start in range(0, prompt.length, step):
            piece = slice(start, min(start + step, prompt.length))
            yield n, start, feed(model, prompt.tokens[piece], cache, inputs_embeds=embedded[:, piece])[0]
        yield from decode(model, cache, tokens_of(prompts), {n: prompt.length})


def tokens_of(prompts: Sequence[Prompt]) -> list[np.ndarray]:
    return [prompt.tokens for prompt in prompts]


def stock_generation(model: Any, prompts: Sequence[Prompt]) -> Pieces:
    """mlx-vlm's own generation, which is made to choose the continuation."""
    for n, prompt in enumerate(prompts):
        seen: list[mx.array] = []

        def look(_: mx.array, logits: mx.array, seen: list[mx.array] = seen) -> mx.array:
            seen.append(logits)
            return logits

        # One more token is drawn ahead than asked for.
        chosen = iter([*prompt.tokens[prompt.length :].tolist(), PADDING])
        pictures = arrays_of(prompt)
        steps = generate_step(
            mx.array(prompt.tokens[: prompt.length])[None],
            model,
            pictures.pop("pixel_values", None),
            None,
            max_tokens=CONTINUED,
            sampler=lambda logprobs, chosen=chosen: mx.array([next(chosen)]),
            logits_processors=[look],
            prefill_step_size=16,
            **pictures,
        )
        assert [token for token, _ in steps] == prompt.tokens[prompt.length :].tolist()
        for step, logits in enumerate(seen):
            yield n, prompt.length - 1 + step, np.array(logits)


def remembered_features(model: Any, prompts: Sequence[Prompt]) -> Pieces:
    """Features of images encoded before, as mlx-vlm's chat and server remember them."""
    for n, prompt in enumerate(prompts):
        pictures = arrays_of(prompt)
        if "pixel_values" not in pictures:
            continue
        features = model.encode_images(pictures["pixel_values"], image_grid_thw=pictures["image_grid_thw"])
        assert len(features) == len(pictures["image_grid_thw"])
        embedded = embeddings(model, prompt, pixel_values=None, cached_image_features=features)
        cache = make_prompt_cache(model.language_model)
        yield n, 0, feed(model, prompt.tokens[: prompt.length], cache, inputs_embeds=embedded)[0]
        yield from decode(model, cache, tokens_of(prompts), {n: prompt.length})


def one_batch(model: Any, prompts: Sequence[Prompt]) -> Pieces:
    """All prompts as rows of one left-padded batch, then decoding."""
    width = max(prompt.length for prompt in prompts)
    padding = [width - prompt.length for prompt in prompts]
    starts = [prompt.tokens[: prompt.length] for prompt in prompts]
    tokens = np.stack(
        [np.pad(s, (n, 0), constant_values=PADDING) for s, n in zip(starts, padding, strict=True)]
    )
    embedded = mx.concatenate(list(padded_embeddings(model, prompts, padding)))
    cache = _make_cache(model.language_model, padding)
    yield from content_of(feed(model, tokens, cache, inputs_embeds=embedded), 0, starts, width)
    at = {n: prompt.length for n, prompt in enumerate(prompts)}
    yield from decode(model, cache, tokens_of(prompts), at)


def padded_embeddings(model: Any, prompts: Sequence[Prompt], padding: list[int]) -> Iterator[mx.array]:
    for prompt, n in zip(prompts, padding, strict=True):
        yield mx.pad(embeddings(model, prompt), [(0, 0), (n, 0), (0, 0)])


WAYS: dict[str, Any] = {
    "one pass": one_pass,
    "prefill, decode": partial(prefill_and_decode, step=10_000),
    "prefill in pieces, decode": partial(prefill_and_decode, step=13),
    "stock generation": stock_generation,
    "remembered features": remembered_features,
    "one batch": one_batch,
}
