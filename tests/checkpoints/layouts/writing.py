"""Files of a checkpoint whose dtypes MLX does not write itself."""

import json
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_m3_plugin.weights.dtypes import FLOAT8, STORED_NAMES

from .source import Json, Weights


def write_safetensors(path: Path, tensors: Weights, float8: Iterable[str]) -> None:
    """MLX has no float8: its bytes are in uint8 arrays, and only the header says what they are."""
    header: Json = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, array in tensors.items():
        dtype = FLOAT8 if name in float8 else STORED_NAMES[array.dtype]
        start = len(data)
        data += np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_files(
    directory: Path,
    tensors: Weights,
    config: Json,
    float8: set[str],
    files: dict[str, bytes],
    other: Json,
    folder: str = "",
) -> None:
    """A checkpoint directory of three shards, cut without regard to layers and modules.

    Args:
        folder: of the shards, inside ``directory``.
        files, other: as bytes and as JSON, by name.
    """
    (directory / folder).mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(3):
        file = f"{folder}/" * bool(folder) + f"model-0000{shard + 1}-of-00003.safetensors"
        own = names[len(names) * shard // 3 : len(names) * (shard + 1) // 3]
        write_safetensors(directory / file, {name: tensors[name] for name in own}, float8)
        weight_map |= dict.fromkeys(own, file)
    metadata = {"total_size": sum(array.nbytes for array in tensors.values())}
    index = {"metadata": metadata, "weight_map": weight_map}
    texts = {"config.json": config, "model.safetensors.index.json": index, **other}
    for file, bytes_ in files.items():
        (directory / file).write_bytes(bytes_)
    for file, content in texts.items():
        (directory / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
