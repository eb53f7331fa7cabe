"""Logits of transformers for several rows, with text only and with pictures.

Each row is run alone and unpadded, in one pass.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tests.checkpoints.random_model import m3_tokenizer
from tests.live import oracle
from tests.live.oracle import t5
from tests.live.vlm_pictures import Prompt, make_prompt

# Most of them past the block budget of every shape, with room to decode; the last one on its way there.
LENGTHS = (150, 97, 61, 29)
# transformers' processor cuts a video into grid rows of so many temporal patches.
SEGMENT = 4
VISION = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=2016,
    spatial_merge_size=2,
    temporal_patch_size=2,
    patch_size=14,
)


# How often a prompt met a true tie and was replaced by another one, of how many.
counts = {"prompts": 0, "replaced": 0}

Made = TypeVar("Made")


def without_ties(
    model: Any, make: Callable[[int], Made], logits_of: Callable[[Any, Made], np.ndarray]
) -> tuple[Made, np.ndarray]:
    """The first of ``make(0)``, ``make(1)``, ... that meets no true tie, and its logits."""
    counts["prompts"] += 1
    for attempt in range(5):
        made = make(attempt)
        with oracle.recorded_ties(model) as ties:
            logits = logits_of(model, made)
        if not ties:
            return made, logits
        counts["replaced"] += 1
    raise AssertionError("true ties in five prompts")


def assert_ties_are_rare() -> None:
    """Of 154 prompts with pictures, eight met one by chance; of 720 rows of text, three."""
    assert counts["replaced"] <= max(5, counts["prompts"] / 10), counts


@dataclass
class Expected:
    """Rows of tokens with what transformers says of each: ``[T, vocab]`` logits."""

    model: Any
    tokens: list[np.ndarray]
    logits: list[np.ndarray]


def text_rows(shape: dict[str, Any], seed: int) -> Expected:
    """A random model, and rows that meet no true tie."""
    expected = Expected(oracle.make_oracle(shape, seed).model, [], [])
    random = np.random.default_rng(seed)

    def make_row(_: int, length: int) -> np.ndarray:
        tokens = random.integers(0, expected.model.config.text_config.vocab_size, length)
        # A run of equal tokens makes index keys that differ by their rotation only.
        tokens[length // 2 : length // 2 + 10] = tokens[0]
        return tokens

    for length in LENGTHS:
        tokens, logits = without_ties(expected.model, partial(make_row, length=length), oracle.forward)
        expected.tokens.append(tokens)
        expected.logits.append(logits)
    return expected


def vision_model(seed: int) -> Any:
    """A random model with M3's layers, a tower of two layers, and the demo's tokenizer."""
    torch.manual_seed(seed)
    tokenizer = m3_tokenizer()
    text = {
        **oracle.BASE,
        **oracle.SHAPES["as_published"],
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "bos_token_id": tokenizer.token_to_id("]~b]"),
        "eos_token_id": tokenizer.token_to_id("[e~["),
    }
    config = oracle.MiniMaxM3VLConfig(
        text_config=text,
        vision_config=VISION,
        image_token_index=tokenizer.token_to_id("]<]image[>["),
        video_token_index=tokenizer.token_to_id("]<]video[>["),
        # mlx-vlm's projectors are as wide as the text model, and so are those of M3.
        projector_hidden_size=text["hidden_size"],
    )
    config._attn_implementation = "eager"
    model = t5.MiniMaxM3SparseForConditionalGeneration(config).float().eval()
    oracle._randomize(model)
    _randomize_vision(model)
    oracle._unit_logits(model, np.random.default_rng(seed).integers(0, text["vocab_size"], 100))
    return model


def _randomize_vision(model: Any) -> None:
    """Features of the size of embeddings, which depend on every bias and norm of the tower."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision" not in name and "projector" not in name:
                continue
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(1, 0.3)
        noise = torch.randn(128, 3 * 2 * 14 * 14)
        features = model.get_image_features(noise, torch.tensor([[1, 8, 16]])).pooler_output[0]
        last = model.model.multi_modal_projector.merge_linear_2
        last.weight.div_(features.std())
        last.bias.div_(features.std())


def save_checkpoint(model: Any, path: Path) -> None:
    """As ``save_pretrained`` writes it, with the least of a tokenizer that a processor wants."""
    oracle.save_model(model, path)
    m3_tokenizer().save(str(path / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[e~[", "pad_token": "[e~["}
    (path / "tokenizer_config.json").write_text(json.dumps(described))


def prompt_with_pictures(model: Any, processor: Any, parts: Any, seed: int) -> tuple[Prompt, np.ndarray]:
    """A prompt that meets no true tie, and its logits."""
    return without_ties(
        model, lambda attempt: make_prompt(processor, parts, seed + attempt * 1_000_003), logits_of
    )


def logits_of(model: Any, prompt: Prompt, cut_videos: bool = True) -> np.ndarray:
    """``[T, vocab]`` logits of the prompt and its continuation."""
    inputs = {name: torch.tensor(array) for name, array in prompt.pictures.items()}
    grid = inputs.get("video_grid_thw")
    if grid is not None and cut_videos:
        inputs["video_grid_thw"] = torch.tensor(cut(grid.tolist()))
    with torch.no_grad():
        return model(input_ids=torch.tensor(prompt.tokens)[None], **inputs).logits[0].numpy()


def cut(grids: list[list[int]]) -> list[list[int]]:
    """``[6, h, w]`` -> ``[4, h, w], [2, h, w]``."""
    return [[min(SEGMENT, t - start), h, w] for t, h, w in grids for start in range(0, t, SEGMENT)]


def is_cut(part: Any) -> bool:
    """Whether a prompt's part is a video of more than one segment."""
    return isinstance(part, tuple) and len(part) == 3 and part[0] > SEGMENT * VISION["temporal_patch_size"]
