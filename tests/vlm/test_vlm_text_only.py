"""Checkpoints without a vision tower: text works, and images are refused in so many words."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from tests.checkpoints.random_vision import processor_files
from tests.checkpoints.tiny_layouts import LAYOUTS
from tests.checkpoints.tiny_model import tiny
from tests.vlm.vlm_runs import (
    TOLERANCE,
    Request,
    alone,
    assert_same_answer,
    difference,
    streamed,
    text,
    together,
    with_images,
)

# Each holds the values of the checkpoint with vision.
WITHOUT_VISION = ("mlx_unfused_float", "published_text_only", "published_text_only_text_config")


@pytest.fixture(scope="module", params=WITHOUT_VISION)
def text_only(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from mlx_vlm.utils import load_model

    directory = tmp_path_factory.mktemp(request.param)
    LAYOUTS[request.param].write(directory)
    return load_model(directory)


def test_text_is_answered_as_with_vision(text_only: Any, model: Any) -> None:
    tokens = mx.array([text(120).tokens])
    assert difference(text_only(tokens).logits, model(tokens).logits) <= TOLERANCE
    answer = streamed(text_only, text(120), 5)
    assert_same_answer(answer, alone(model, text(120), 5))
    for one in together(text_only, [Request(text(120), 5), Request(text(9, 1), 5)])[:1]:
        assert_same_answer(one, answer)


def test_images_and_videos_are_refused(text_only: Any) -> None:
    prompt = with_images(30)
    array, grid = prompt.media.values()
    tokens = mx.array([prompt.tokens])
    with pytest.raises(ValueError, match="no vision tower: it takes text only"):
        streamed(text_only, prompt, 2)
    with pytest.raises(ValueError, match="no vision tower: it takes text only"):
        text_only(tokens, array, image_grid_thw=grid)
    with pytest.raises(ValueError, match="no vision tower: it takes text only"):
        text_only(tokens, pixel_values_videos=array, video_grid_thw=grid)
    with pytest.raises(ValueError, match="no vision tower: it takes text only"):
        text_only.get_input_embeddings(tokens, pixel_values_videos=array, video_grid_thw=grid)


def test_no_vision_parameters(text_only: Any) -> None:
    assert all(name.startswith("language_model.") for name, _ in tree_flatten(text_only.parameters()))


def test_the_rest_of_the_surface(text_only: Any) -> None:
    assert [type(entry).__name__ for entry in text_only.make_cache()] == ["KVCache"] + [
        "MiniMaxM3KVCache"
    ] * 2
    assert len(text_only.layers) == 3
    assert text_only.quant_predicate("language_model.model.layers.1.block_sparse_moe.gate", None)["bits"] == 8
    cache = text_only.make_cache()
    text_only(mx.array([text(9).tokens]), cache=cache)
    assert text_only.rollback_speculative_cache(cache, None, 1, 4) == 1
    hidden = mx.ones((1, 1, 128))
    assert text_only.speculative_logits_from_hidden(hidden).shape == (1, 1, 704)


def test_padding_masks(text_only: Any) -> None:
    tokens = mx.array([[0] * 5 + text(50).tokens])
    mask = mx.array([[0] * 5 + [1] * 50])
    padded, plain = text_only(tokens, None, mask).logits[:, 5:], text_only(tokens[:, 5:]).logits
    assert difference(padded, plain) <= TOLERANCE


@pytest.mark.parametrize("name", [*WITHOUT_VISION, "mlx_text_only_4bit"])
def test_processor_files_make_no_difference(name: str, tmp_path: Path) -> None:
    """Tools that take the vision tower out leave them there; without torchvision they do not load."""
    from mlx_vlm import generate, load

    LAYOUTS[name].write(tmp_path)
    model, expected = load(str(tmp_path))
    for file, content in processor_files().items():
        (tmp_path / file).write_text(json.dumps(content))
    _, found = load(str(tmp_path))
    assert type(found) is type(expected)
    assert found.chat_template == expected.chat_template
    answers = [
        generate(model, processor, "Hello", max_tokens=5, temperature=0.0, verbose=False).text
        for processor in (expected, found)
    ]
    assert answers[0] == answers[1]


def test_a_vision_tower_has_its_processor(tmp_path: Path) -> None:
    from mlx_vlm import load

    LAYOUTS["published_float"].write(tmp_path)
    for file, content in processor_files().items():
        (tmp_path / file).write_text(json.dumps(content))
    assert type(load(str(tmp_path))[1]).__name__ == "MiniMaxM3VLProcessor"


@pytest.mark.parametrize("config", [None, "{", '{"model_type": "llama"}'])
def test_processors_of_other_models_are_asked_for_as_ever(
    config: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from mlx_vlm.utils import load_processor

    asked = []
    answer = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=dict))
    monkeypatch.setattr(
        transformers.AutoProcessor,
        "from_pretrained",
        lambda *args, **kwargs: asked.append((args, kwargs)) or answer,
    )
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert load_processor(tmp_path, False, use_fast=False) is answer
    assert asked == [((tmp_path,), {"use_fast": False})]


def test_a_vision_tower_with_a_part_missing_is_no_text_model(tmp_path: Path) -> None:
    from mlx_vlm.utils import load_model

    checkpoint = LAYOUTS["published_float"].make(source=tiny())
    for name in [n for n in checkpoint.tensors if n.startswith("patch_merge_mlp")]:
        del checkpoint.tensors[name]
    checkpoint.write(tmp_path, tiny().files)
    with pytest.raises(ValueError, match="patch_merge_mlp"):
        load_model(tmp_path)
