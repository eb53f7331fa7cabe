"""The random model that other tests use: complete, valid and repeatable."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from tests.checkpoints import random_vision
from tests.checkpoints.random_model import write_random_model

NEEDED_TOKENS = [
    "]<]minimax[>[",
    "<tool_call>",
    "</tool_call>",
    "<mm:think>",
    "</mm:think>",
    "]~b]",
    "]~!b[",
    "[e~[",
    "]<]image[>[",
    "]<]video[>[",
]
FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
VISION_FILES = {
    "picture.png",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
}
HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "checkpoint"
    write_random_model(directory)
    return directory


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "with vision"
    write_random_model(directory, vision=True)
    return directory


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_it_opens_with_stock_mlx_lm_and_every_marker_is_one_token(checkpoint: Path) -> None:
    model, tokenizer = load(str(checkpoint))
    for token in NEEDED_TOKENS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1, token
    assert tokenizer.eos_token_ids == {tokenizer.encode("[e~[", add_special_tokens=False)[0]}
    assert (tokenizer.think_start, tokenizer.think_end) == ("<mm:think>", "</mm:think>")
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    logits = model(mx.array(tokens)[None])
    assert len(tokens) > 4 * 32  # several budgets of four blocks of eight tokens
    assert mx.isfinite(logits).all().item()
    assert logits.shape[-1] == model.text_config.vocab_size


def test_text_survives_the_tokenizer(checkpoint: Path) -> None:
    _, tokenizer = load(str(checkpoint))
    text = "Grüße, 世界!\n\tprint('x' * 3)  # <mm:think>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_config_and_files_are_those_of_a_published_checkpoint(checkpoint: Path) -> None:
    assert {p.name for p in checkpoint.iterdir()} == FILES
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "minimax_m3_vl"
    assert config["text_config"]["sparse_attention_config"]["sparse_block_size"] == 8
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert "language_model.model.layers.5.block_sparse_moe.experts.15.w2.weight" in index
    assert set(index) == set(mx.load(str(checkpoint / "model.safetensors")))


def test_every_row_of_the_vocabulary_has_a_name(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    rows = read_json(checkpoint / "config.json")["text_config"]["vocab_size"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(rows))
    assert rows % 64 == 0


def test_padding_is_no_end_of_a_turn(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("]!p~[", "[e~[")
    short, long = tokenizer(["a", "a b c d e f g"], padding=True)["input_ids"]
    assert len(short) == len(long)
    assert tokenizer.pad_token_id in short


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_random_model(tmp_path / name, seed)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


class TestVision:
    def test_it_is_the_demo_with_more_beside_it(self, checkpoint: Path, seeing: Path) -> None:
        assert {p.name for p in seeing.iterdir()} == FILES | VISION_FILES
        for name in FILES - {"config.json", "model.safetensors", "model.safetensors.index.json"}:
            assert (seeing / name).read_text() == (checkpoint / name).read_text(), name
        config, more = read_json(checkpoint / "config.json"), read_json(seeing / "config.json")
        assert more.keys() > config.keys()
        assert {key: more[key] for key in config} == config
        plain, with_vision = (load_file(d / "model.safetensors") for d in (checkpoint, seeing))
        assert all(np.array_equal(plain[name], with_vision[name]) for name in plain if name != HEAD)
        added = {name.partition(".")[0] for name in with_vision.keys() - plain.keys()}
        assert added == {"vision_tower", "multi_modal_projector", "patch_merge_mlp"}

    def test_shapes_are_those_of_its_config(self, seeing: Path) -> None:
        config = read_json(seeing / "config.json")
        vision, text_width = config["vision_config"], config["text_config"]["hidden_size"]
        width, wide, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
        merged = vision["img_token_compression_config"]["spatial_merge_size"] ** 2
        tensors = load_file(seeing / "model.safetensors")
        tower = "vision_tower.vision_model"
        expected = {
            f"{tower}.embeddings.patch_embedding.weight": (width, 3, 2, patch, patch),
            f"{tower}.encoder.layers.1.mlp.fc1.weight": (wide, width),
            f"{tower}.encoder.layers.1.self_attn.out_proj.bias": (width,),
            "multi_modal_projector.linear_1.weight": (text_width, width),
            "patch_merge_mlp.linear_1.weight": (text_width, merged * text_width),
        }
        assert {name: tensors[name].shape for name in expected} == expected
        assert f"{tower}.encoder.layers.{vision['num_hidden_layers']}.layer_norm1.weight" not in tensors
        assert all(np.isfinite(array).all() and array.dtype == np.float32 for array in tensors.values())

    def test_it_says_nothing_that_cannot_be_printed(self, checkpoint: Path, seeing: Path) -> None:
        """Not greedily, and not among the 40 likeliest tokens that the checkpoint recommends."""
        model, tokenizer = load(str(seeing))
        tokens = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
        likeliest = mx.argpartition(-model(mx.array(tokens)[None])[0], 40, axis=-1)[:, :40]
        said = {tokenizer.decode([token]) for token in np.unique(np.array(likeliest)).tolist()}
        assert len(said) > 200
        unprintable = {text for text in said if not text.isprintable() or "\ufffd" in text}
        assert not unprintable
        assert not said & ({*NEEDED_TOKENS} - {"[e~["})
        head, plain = (load_file(d / "model.safetensors")[HEAD] for d in (seeing, checkpoint))
        spoken = head.any(axis=1)
        assert spoken[list(tokenizer.eos_token_ids)].all()
        assert np.array_equal(head[spoken], plain[spoken])

    def test_transformers_reads_its_config(self, seeing: Path) -> None:
        config = AutoConfig.from_pretrained(seeing)
        assert type(config).__name__ == "MiniMaxM3VLConfig"
        vision = config.vision_config
        assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size) == (64, 2, 14)
        assert (vision.temporal_patch_size, vision.spatial_merge_size) == (2, 2)
        assert config.projector_hidden_size == config.text_config.hidden_size
        tokenizer = Tokenizer.from_file(str(seeing / "tokenizer.json"))
        assert tokenizer.id_to_token(config.image_token_id) == "]<]image[>["
        assert tokenizer.id_to_token(config.video_token_id) == "]<]video[>["

    def test_the_processors_files_agree_with_the_config(self, seeing: Path) -> None:
        vision = read_json(seeing / "config.json")["vision_config"]
        merging = vision["img_token_compression_config"]
        for name, pixels in (("preprocessor_config", 451_584), ("video_preprocessor_config", 602_112)):
            processor = read_json(seeing / f"{name}.json")
            assert processor["patch_size"] == vision["patch_size"]
            assert processor["merge_size"] == merging["spatial_merge_size"]
            assert processor["temporal_patch_size"] == merging["temporal_patch_size"]
            assert (processor["min_pixels"], processor["max_pixels"]) == (3136, pixels)
        names = read_json(seeing / "processor_config.json")
        assert names == {"processor_class": "MiniMaxM3VLProcessor"}

    def test_the_picture_is_one(self, seeing: Path) -> None:
        image = pytest.importorskip("PIL.Image", reason="Pillow is not installed here")
        with image.open(seeing / "picture.png") as picture:
            picture.load()
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (112, 84))
            assert picture.getpixel((50, 40)) == (255, 255, 255)
            assert picture.getpixel((100, 10)) == (200, 30, 145)

    def test_the_seed_decides_its_weights(self) -> None:
        config = random_vision.with_vision({"text_config": {"hidden_size": 32}})
        made = [
            dict(random_vision.random_vision_weights(config, np.random.default_rng(seed)))
            for seed in (3, 3, 4)
        ]
        assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])
        assert not any(np.array_equal(made[0][name], made[2][name]) for name in made[0])
