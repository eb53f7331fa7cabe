"""Checkpoints without a vision tower: text works, and images are refused in so many words."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoint_parts import tiny
from checkpoints import LAYOUTS
from mlx.utils import tree_flatten
from vlm_runs import (
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


def test_a_vision_tower_with_a_part_missing_is_no_text_model(tmp_path: Path) -> None:
    from mlx_vlm.utils import load_model

    checkpoint = LAYOUTS["published_float"].make(source=tiny())
    for name in [n for n in checkpoint.tensors if n.startswith("patch_merge_mlp")]:
        del checkpoint.tensors[name]
    checkpoint.write(tmp_path, tiny().files)
    with pytest.raises(ValueError, match="patch_merge_mlp"):
        load_model(tmp_path)
