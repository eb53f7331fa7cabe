"""Images and video: their features, the places they go to, and the caches that keep them."""

from typing import Any

import mlx.core as mx
import pytest

from tests.vlm.vlm_runs import (
    BUDGET,
    IMAGE_TOKEN,
    TOLERANCE,
    VIDEO_TOKEN,
    VLM_VERSION,
    Prompt,
    alone,
    assert_same_answer,
    difference,
    embeddings,
    pixels,
    streamed,
    text,
    with_images,
)

TWO = ((1, 4, 6), (1, 8, 4))
N_FEATURES = (6, 8)
needs_keys_of_pixels = pytest.mark.skipif(
    VLM_VERSION < (0, 7, 0), reason="mlx-vlm asks for the features of each image from 0.7 on"
)


def inputs_embeds(model: Any, prompt: Prompt, **more: Any) -> mx.array:
    media = {"pixel_values": None, **prompt.media, **more}
    return model.get_input_embeddings(mx.array([prompt.tokens]), **media).inputs_embeds[0]


class Count:
    """How many times visual features were computed."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch):
        self.computed = 0
        compute = model._compute_visual_features

        def counted(*args: Any) -> mx.array:
            self.computed += 1
            return compute(*args)

        monkeypatch.setattr(model, "_compute_visual_features", counted)


# --- features ---


def test_encode_image_is_what_lands_in_the_embeddings(model: Any) -> None:
    prompt = with_images(60, TWO)
    features = model.encode_image(prompt.media["pixel_values"], prompt.media["image_grid_thw"])
    assert features.shape == (sum(N_FEATURES), 128)
    embedded = inputs_embeds(model, prompt)
    words = model.language_model.model.embed_tokens(mx.array(prompt.tokens))
    is_image = mx.array(prompt.tokens) == IMAGE_TOKEN
    places = [i for i, image in enumerate(is_image.tolist()) if image]
    others = [i for i, image in enumerate(is_image.tolist()) if not image]
    assert mx.array_equal(embedded[mx.array(places)], features)
    assert mx.array_equal(embedded[mx.array(others)], words[mx.array(others)])
    assert mx.array_equal(embeddings(model, prompt)["visual_pos_masks"][0], is_image)


def test_encode_images_gives_one_array_for_each(model: Any) -> None:
    array, grid = pixels(TWO, 3)
    features = model.encode_images(array, grid, an_option_of_generate=1)
    assert [f.shape[0] for f in features] == list(N_FEATURES)
    assert mx.array_equal(mx.concatenate(features), model.encode_image(array, grid))
    alone_, _ = pixels(TWO[:1], 3)
    assert mx.array_equal(alone_, array[:24])
    assert difference(features[0], model.encode_image(alone_, grid[:1])) <= TOLERANCE


def test_encode_image_without_the_grid(model: Any) -> None:
    """mlx-vlm before 0.7 calls it so; features are made later then."""
    array, grid = pixels(TWO, 3)
    assert model.encode_image(array) is None
    with pytest.raises(ValueError, match="image_grid_thw"):
        model.encode_images(array)
    with pytest.raises(ValueError, match="video_grid_thw"):
        model.encode_video(array)
    assert grid.shape == (2, 3)


def with_video(n: int, grid: tuple[int, int, int]) -> Prompt:
    array, grids = pixels([grid], 9)
    frames = [VIDEO_TOKEN] * (grid[0] * grid[1] * grid[2] // 4)
    return Prompt(
        text(n).tokens[:9] + frames + text(n).tokens[9:],
        {"pixel_values_videos": array, "video_grid_thw": grids},
    )


def test_video(model: Any) -> None:
    prompt = with_video(80, (3, 4, 4))
    features = model.encode_video(prompt.media["pixel_values_videos"], prompt.media["video_grid_thw"])
    assert features.shape == (12, 128)
    assert mx.array_equal(inputs_embeds(model, prompt)[9:21], features)
    assert_same_answer(streamed(model, prompt, 4), alone(model, prompt, 4))


def test_image_and_video_together(model: Any) -> None:
    image, video = with_images(40), with_video(50, (2, 4, 4))
    both = Prompt(image.tokens + video.tokens, {**image.media, **video.media})
    expected = mx.concatenate([inputs_embeds(model, image), inputs_embeds(model, video)])
    assert mx.array_equal(inputs_embeds(model, both), expected)


def test_counts_must_agree(model: Any) -> None:
    prompt = with_images(60)
    array, grid = pixels(TWO, 3)
    with pytest.raises(ValueError, match="do not match"):
        inputs_embeds(model, prompt, pixel_values=array, image_grid_thw=grid)
    with pytest.raises(ValueError, match="image_grid_thw"):
        inputs_embeds(model, prompt, image_grid_thw=None)


def test_merging_functions(model: Any) -> None:
    """Static, with upstream's parameters: called on the class by its tests and by users."""
    tokens, features = mx.array([[5, IMAGE_TOKEN, 6, VIDEO_TOKEN]]), mx.ones((2, 128))
    words = model.language_model.model.embed_tokens(tokens)
    merge = type(model).merge_input_ids_with_image_features
    merged, mask = merge(features, words, tokens, IMAGE_TOKEN, VIDEO_TOKEN)
    assert mx.array_equal(merged[0, 1], features[0])
    assert mx.array_equal(merged[0, 2], words[0, 2])
    assert mask[0, :, 0].tolist() == [False, True, False, True]
    merged, mask = type(model).merge_input_ids_with_visual_features(
        words, tokens, image_features=features[:1], image_token_index=IMAGE_TOKEN
    )
    assert mask.tolist() == [[False, True, False, False]]
    assert mx.array_equal(merged[0, 3], words[0, 3])


# --- features that were kept ---


def test_cached_image_features(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = with_images(60, TWO)
    expected = inputs_embeds(model, prompt)
    whole = model.encode_image(**prompt.media)
    parts = model.encode_images(**prompt.media)
    count = Count(model, monkeypatch)
    for cached in (whole, parts, tuple(parts)):
        given = inputs_embeds(model, prompt, cached_image_features=cached)
        assert difference(given, expected) <= TOLERANCE
        given = inputs_embeds(model, Prompt(prompt.tokens), cached_image_features=cached)
        assert difference(given, expected) <= TOLERANCE
    assert count.computed == 0


def test_cached_video_features(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = with_video(60, (2, 4, 4))
    expected = inputs_embeds(model, prompt)
    features = model.encode_video(prompt.media["pixel_values_videos"], prompt.media["video_grid_thw"])
    count = Count(model, monkeypatch)
    assert mx.array_equal(inputs_embeds(model, prompt, cached_video_features=features), expected)
    assert count.computed == 0


def test_the_servers_cache_of_features(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_vlm.vision_cache import VisionFeatureCache

    first, second = with_images(60, TWO, seed=1), with_images(60, TWO, seed=2)
    expected = [inputs_embeds(model, prompt) for prompt in (first, second)]
    count, cache = Count(model, monkeypatch), VisionFeatureCache()
    for _ in range(2):
        for prompt, embedded, key in zip((first, second), expected, ("one", "two"), strict=True):
            given = inputs_embeds(model, prompt, vision_cache=cache, _image_key=key)
            assert mx.array_equal(given, embedded)
    assert count.computed == 2
    # Text, and images without a key, go through.
    inputs_embeds(model, text(9), vision_cache=cache)
    inputs_embeds(model, first, vision_cache=cache)
    assert count.computed == 3


@needs_keys_of_pixels
def test_stream_generate_with_a_cache_of_features(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``mlx_vlm.chat`` calls it; upstream's own class raises here."""
    from mlx_vlm.vision_cache import VisionFeatureCache

    two, one = with_images(60, TWO), with_images(60)
    expected = {"two.png": alone(model, two, 4), "one.png": alone(model, one, 4)}
    cache, count = VisionFeatureCache(), Count(model, monkeypatch)
    for prompt, file, computed in ((two, "two.png", 1), (two, "two.png", 1), (one, "one.png", 2)):
        answer = streamed(model, prompt, 4, image=[file], vision_cache=cache)
        assert_same_answer(answer, expected[file])
        assert count.computed == computed


@pytest.mark.skipif(VLM_VERSION >= (0, 7, 0), reason="mlx-vlm gives the grid from 0.7 on")
def test_older_versions_answer_right_with_a_cache_of_features(model: Any) -> None:
    from mlx_vlm.vision_cache import VisionFeatureCache

    cache, prompt = VisionFeatureCache(), with_images(60, TWO)
    for _ in range(2):
        answer = streamed(model, prompt, 4, image=["an.png"], vision_cache=cache)
        assert_same_answer(answer, alone(model, prompt, 4))


def test_a_long_image(model: Any) -> None:
    """More image tokens than the block budget, in pieces that cut the image."""
    prompt = with_images(30, ((1, 16, 20),))
    assert prompt.tokens.count(IMAGE_TOKEN) == 80 > 2 * BUDGET
    assert_same_answer(streamed(model, prompt, 6, prefill_step_size=17), alone(model, prompt, 6))
