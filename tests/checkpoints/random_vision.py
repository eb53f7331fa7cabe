"""The demo's vision: a tower of two layers under the published names, processor files, a picture."""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

PICTURE = "picture.png"

_PATCH, _MERGE, _FRAMES = 14, 2, 2
_COMPRESSION = {
    "image_token_compression_method": "patch_merge",
    "spatial_merge_size": _MERGE,
    "temporal_patch_size": _FRAMES,
}


def with_vision(config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` with all that it says of vision, in the published spelling."""
    text_width = config["text_config"]["hidden_size"]
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_channels": 3,
        "patch_size": _PATCH,
        "image_size": 2016,
        "projection_dim": text_width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "position_embedding_type": "rope",
        "rope_mode": "3d",
        "rope_theta": 10000.0,
        "vision_segment_max_frames": 4,
        "img_token_compression_config": _COMPRESSION,
    }
    return config | {
        "img_token_compression_config": _COMPRESSION,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": text_width,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": vision_config,
    }


def random_vision_weights(
    config: dict[str, Any], random: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Published names with random values, each linear map of unit gain."""
    vision, text_width = config["vision_config"], config["text_config"]["hidden_size"]
    width, wide = vision["hidden_size"], vision["intermediate_size"]

    def values(scale: float, *shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def linear(name: str, n_out: int, n_in: int) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{name}.weight", values(n_in**-0.5, n_out, n_in)
        yield f"{name}.bias", values(0.02, n_out)

    def norm(name: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{name}.weight", 1 + values(0.1, width)
        yield f"{name}.bias", values(0.1, width)

    tower = "vision_tower.vision_model"
    pixels = (vision["num_channels"], _FRAMES, _PATCH, _PATCH)
    embedding = values(float(np.prod(pixels)) ** -0.5, width, *pixels)
    yield f"{tower}.embeddings.patch_embedding.weight", embedding
    yield from norm(f"{tower}.pre_layrnorm")
    for number in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{number}"
        yield from norm(f"{layer}.layer_norm1")
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{projection}", width, width)
        yield from norm(f"{layer}.layer_norm2")
        yield from linear(f"{layer}.mlp.fc1", wide, width)
        yield from linear(f"{layer}.mlp.fc2", width, wide)
    yield from linear("multi_modal_projector.linear_1", text_width, width)
    yield from linear("multi_modal_projector.linear_2", text_width, text_width)
    yield from linear("patch_merge_mlp.linear_1", text_width, text_width * _MERGE**2)
    yield from linear("patch_merge_mlp.linear_2", text_width, text_width)


def processor_files() -> dict[str, dict[str, Any]]:
    """What mlx-vlm's processors, and those of transformers, read beside the config."""
    common = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": _PATCH,
        "temporal_patch_size": _FRAMES,
        "merge_size": _MERGE,
        "min_pixels": 4 * 28 * 28,
    }
    of_images = {
        "image_processor_type": "MiniMaxM3VLImageProcessor",
        # As published; every processor goes by the numbers of pixels instead.
        "size": [672, 672],
        "max_pixels": 576 * 28 * 28,
        **common,
    }
    of_videos = {
        "video_processor_type": "MiniMaxM3VLVideoProcessor",
        "max_pixels": 768 * 28 * 28,
        "fps": 1.0,
        "min_frames": 4,
        "max_frames": 768,
        "do_sample_frames": False,
        **common,
    }
    return {
        "preprocessor_config.json": of_images,
        "video_preprocessor_config.json": of_videos,
        "processor_config.json": {"processor_class": "MiniMaxM3VLProcessor"},
    }


def unspeakable(tokenizer: Tokenizer, end: int) -> list[int]:
    """All tokens but printable text and ``end``.

    mlx-vlm 0.6 cannot print bytes that are no UTF-8, and no mlx-vlm a marker with a space in it.
    A trained model never says them; one with random weights does, unless their rows of the head
    are zero: then hundreds of others are likelier.
    """
    pieces = tokenizer.get_vocab(with_added_tokens=False).values()
    text = {token: tokenizer.decode([token], skip_special_tokens=False) for token in pieces}
    speakable = {token for token, said in text.items() if said.isprintable() and "\ufffd" not in said}
    return [token for token in range(tokenizer.get_vocab_size()) if token not in speakable | {end}]


def picture() -> bytes:
    """A PNG file of 112 x 84 pixels: a gradient with a white square in it."""
    height, width = 84, 112
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 2, y * 3, 255 - x - y], axis=-1)
    pixels[28:56, 42:70] = 255
    # Each line starts with the number of its filter: none.
    lines = np.concatenate([np.zeros((height, 1)), pixels.reshape(height, -1)], axis=1).astype(np.uint8)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
