"""A checkpoint whose heads, widths and quantization groups divide by four."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlx_m3_plugin.model.config import text_config_of
from tests.checkpoints.random_model import m3_config, m3_tokenizer, random_weights, write_tokenizer

N_SHARDS = 7


def write_published(directory: Path) -> None:
    directory.mkdir()
    ids = m3_tokenizer().get_vocab()
    config = m3_config(len(ids), ids)
    for width in ("intermediate_size", "shared_intermediate_size"):
        config["text_config"][width] = 256
    weights = dict(random_weights(text_config_of(config), np.random.default_rng(0)))
    write_shards(directory, weights)
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory, config["text_config"]["max_position_embeddings"])


def write_shards(directory: Path, weights: dict[str, Any]) -> None:
    """In the order of the names, so that shards end within layers."""
    names = sorted(weights)
    index = {}
    for number in range(N_SHARDS):
        file = f"model-{number + 1:05}-of-{N_SHARDS:05}.safetensors"
        share = names[len(names) * number // N_SHARDS : len(names) * (number + 1) // N_SHARDS]
        save_file({name: weights[name] for name in share}, directory / file)
        index |= dict.fromkeys(share, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
