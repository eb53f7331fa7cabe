"""A text taken through a checkpoint, one layer in memory at a time.

Between layers the hidden states of all tokens are in a file, and what has been done is written
down, so a walk that is interrupted goes on with the layer that it was in.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import __version__
from ..weights.headers import weight_files
from .checkpoint import Checkpoint
from .new_directory import replace_text
from .shards import TensorReader
from .streaming import Embedding, States, StreamedLayer
from .texts import Texts

# Tokens whose hidden states are kept after every layer, to compare.
_SAMPLED = 1024
# What a token takes in the second half of a layer: its state, and what each of its experts makes of it.
_COPIES = 6
_STATE = "walk.json"

# Called after each layer with its number, and once with -1 for those that were there before.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Walk:
    """A finished walk: what it has left on disk.

    Attributes:
        blocks: on sparse layers ``[T, G, k]`` ids, -1 for none; absent where all were taken.
    """

    directory: Path
    layers: int
    tokens: int
    width: int
    dtype: str

    def states(self) -> States:
        """Of all tokens, after the last layer."""
        return States(states_file(self.directory, self.layers), self.width, self.dtype)

    def layer(self, number: int) -> dict[str, np.ndarray]:
        """``sample`` ``[S, D]``, and where there are any ``experts`` ``[T, k]``, ``blocks``."""
        with np.load(_layer_file(self.directory, number)) as arrays:
            return dict(arrays)


def walk(
    checkpoint: Checkpoint, texts: Texts, directory: Path, *, memory: int, step: int, progress: Progress
) -> Walk:
    """Take ``texts`` through all layers.

    Args:
        directory: for what is kept; one of an earlier walk of the same goes on there.
        memory: bytes that tokens may take in a layer, beside its weights.
        step: tokens of a window that attend at a time.

    Raises:
        OSError: a shard or the directory cannot be read or written.
        ValueError: a state of the model is not a number.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = checkpoint.text_config
    tokens = texts.tokens
    with TensorReader(checkpoint.directory, checkpoint.headers.tensors) as reader:
        done, dtype = begin(directory, checkpoint, reader, tokens)
        progress(-1, done)
        walked = Walk(directory, config.num_hidden_layers, len(tokens), config.hidden_size, dtype)
        for number in range(done, config.num_hidden_layers):
            _through_layer(walked, checkpoint, reader, texts, number, memory, step)
            write_state(directory, number + 1, dtype)
            States(states_file(directory, number), walked.width, dtype).remove()
            progress(number, 1)
    return walked


def walk_key(checkpoint: Checkpoint, texts: Texts) -> str:
    """The same for walks that would leave the same."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weight_files(checkpoint.directory)]
    config = json.dumps(checkpoint.config, sort_keys=True)
    device = str(mx.default_device().type)
    told = [__version__, str(checkpoint.directory.resolve()), files, config, texts.key(), _SAMPLED, device]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:20]


def begin(
    directory: Path, checkpoint: Checkpoint, reader: TensorReader, tokens: list[int]
) -> tuple[int, str]:
    """How many layers are done, and the dtype of hidden states; the embeddings are there then."""
    try:
        state = json.loads((directory / _STATE).read_text(encoding="utf-8"))
        return state["done"], state["dtype"]
    except FileNotFoundError:
        pass
    embed = Embedding(checkpoint, reader)
    first = embed(tokens[:1])
    dtype = str(first.dtype).removeprefix("mlx.core.")
    states = States(states_file(directory, 0), first.shape[1], dtype)
    for start in range(0, len(tokens), _SAMPLED):
        states.write(start, embed(tokens[start : start + _SAMPLED]))
    write_state(directory, 0, dtype)
    return 0, dtype


def _through_layer(
    walked: Walk,
    checkpoint: Checkpoint,
    reader: TensorReader,
    texts: Texts,
    number: int,
    memory: int,
    step: int,
) -> None:
    layer = StreamedLayer(checkpoint, reader, number)
    before, after = (
        States(states_file(walked.directory, n), walked.width, walked.dtype) for n in (number, number + 1)
    )
    run_layer(layer, before, after, texts, tokens_at_once(checkpoint, walked.dtype, memory), step)
    after.sync()
    record: dict[str, Any] = {"sample": _sample(after, walked.tokens)}
    if not np.isfinite(record["sample"]).all():
        raise ValueError(
            f"after layer {number} hidden states are not numbers: is {checkpoint.directory} whole?"
        )
    if layer.choices.experts:
        record["experts"] = np.concatenate([np.array(ids) for ids in layer.choices.experts]).astype(np.uint16)
    if any(ids is not None for ids in layer.choices.blocks):
        record["blocks"] = _blocks(layer.choices.blocks, texts, step, checkpoint)
    _write_atomically(_layer_file(walked.directory, number), record)


def run_layer(
    layer: StreamedLayer, before: States, after: States, texts: Texts, block: int, step: int
) -> None:
    """From the states before a layer to those after it; ``block`` tokens meet its experts together."""
    for first, last in texts.spans:
        position = first
        for h in layer.attend(before.read(first, last)[None], step):
            after.write(position, h[0])
            position += h.shape[1]
    tokens = texts.spans[-1][1]
    for first in range(0, tokens, block):
        last = min(first + block, tokens)
        after.write(first, layer.feed_forward(after.read(first, last)))


def tokens_at_once(checkpoint: Checkpoint, dtype: str, memory: int) -> int:
    """How many tokens go through the experts together."""
    config = checkpoint.text_config
    itemsize = 4 if dtype == "float32" else 2
    return max(64, memory // (config.hidden_size * itemsize * config.num_experts_per_tok * _COPIES))


def _sample(states: States, tokens: int) -> np.ndarray:
    positions = np.unique(np.linspace(0, tokens - 1, min(tokens, _SAMPLED)).astype(int))
    rows = [states.read(int(p), int(p) + 1).astype(mx.float32) for p in positions]
    return np.array(mx.concatenate(rows))


def _blocks(chosen: list[mx.array | None], texts: Texts, step: int, checkpoint: Checkpoint) -> np.ndarray:
    """``[T, G, k]``; -1 in all of a token's where its layer took every block."""
    config = checkpoint.text_config
    ids = np.full((len(texts.tokens), config.index_n_heads, config.index_topk_blocks), -1, np.int32)
    calls = iter(chosen)
    for first, last in texts.spans:
        for start in range(first, last, step):
            call = next(calls)
            if call is not None:
                found = np.array(call)[0].swapaxes(0, 1)
                ids[start : start + found.shape[0], :, : found.shape[2]] = found
    return ids


def write_state(directory: Path, done: int, dtype: str) -> None:
    replace_text(directory / _STATE, json.dumps({"done": done, "dtype": dtype}))


def _write_atomically(path: Path, arrays: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    os.replace(temporary, path)


def states_file(directory: Path, layer: int) -> Path:
    return directory / f"states-{layer:03}.bin"


def _layer_file(directory: Path, layer: int) -> Path:
    return directory / f"layer-{layer:03}.npz"
