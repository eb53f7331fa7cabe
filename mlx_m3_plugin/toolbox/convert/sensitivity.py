"""How much each layer suffers from fewer bits, measured layer by layer with the float states going on.

The score of a layer is the squared error of what it puts out when its weights are quantized, as a
share of what it puts out otherwise: ``mean((out - out_q)^2) / max(mean(out^2), 1e-10)``, as oQ has it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ..checkpoint import Checkpoint
from ..forward_pass import (
    Progress,
    begin,
    run_layer,
    states_file,
    tokens_at_once,
    walk_key,
    write_state,
)
from ..new_directory import LOCK, locked, replace_text
from ..precision import Quantization
from ..shards import TensorReader
from ..streaming import States, StreamedLayer
from ..text_files import read_json_object
from ..texts import Texts

Scores = Mapping[int, float]

_WIDTHS = (2, 3, 4, 5, 6, 8)
# What no level of oQ quantizes, so that it is not tried either.
_CHOOSERS = (".block_sparse_moe.gate", ".index_q_proj", ".index_k_proj")
_ROWS = 1024


def measure_sensitivity(
    checkpoint: Checkpoint,
    texts: Texts,
    base: Quantization,
    cache: Path,
    *,
    memory: int,
    step: int,
    progress: Progress,
) -> dict[int, float]:
    """The score of every layer at the bits of ``base``; goes on where an earlier run was interrupted.

    Raises:
        BlockingIOError: another process measures the same.
        OSError: a shard or the cache cannot be read or written.
    """
    directory = cache / f"{walk_key(checkpoint, texts)}-{base.bits}-bits"
    doing = f"`mlx-m3 convert` is measuring {checkpoint.directory} in {directory}"
    with locked(directory / LOCK, doing, "give a map with --sensitivity"):
        return _measure(checkpoint, texts, base, directory, memory=memory, step=step, progress=progress)


def _measure(
    checkpoint: Checkpoint,
    texts: Texts,
    base: Quantization,
    directory: Path,
    *,
    memory: int,
    step: int,
    progress: Progress,
) -> dict[int, float]:
    file = directory / "scores.json"
    scores = read_scores(file) if file.exists() else {}
    with TensorReader(checkpoint.directory, checkpoint.headers.tensors) as reader:
        done, dtype = begin(directory, checkpoint, reader, texts.tokens)
        done = min(done, len(scores))
        progress(-1, done)
        width = checkpoint.text_config.hidden_size
        block = tokens_at_once(checkpoint, dtype, memory)
        for number in range(done, checkpoint.text_config.num_hidden_layers):
            before, after = (States(states_file(directory, n), width, dtype) for n in (number, number + 1))
            tried = States(directory / "tried.bin", width, dtype)
            run_layer(StreamedLayer(checkpoint, reader, number), before, after, texts, block, step)
            trial = StreamedLayer(
                checkpoint, reader, number, lambda path, spec: _fewer_bits(path, spec, base)
            )
            run_layer(trial, before, tried, texts, block, step)
            after.sync()
            scores[number] = _error(after, tried, len(texts.tokens))
            write_scores(file, scores)
            write_state(directory, number + 1, dtype)
            before.remove()
            progress(number, 1)
    return scores


def _fewer_bits(path: str, spec: Quantization, base: Quantization) -> Quantization:
    """``base``, or of what has no more bits than that already, the next width below."""
    if path.endswith(_CHOOSERS):
        return spec
    if spec.bits is None or spec.bits > (base.bits or 0):
        return base
    below = [bits for bits in _WIDTHS if bits < spec.bits]
    return Quantization(below[-1], base.group_size) if below else spec


def _error(states: States, tried: States, tokens: int) -> float:
    error = squares = 0.0
    for first in range(0, tokens, _ROWS):
        last = min(first + _ROWS, tokens)
        out, out_q = (s.read(first, last).astype(mx.float32) for s in (states, tried))
        error += float(mx.square(out - out_q).sum())
        squares += float(mx.square(out).sum())
    return error / max(squares, 1e-10 * tokens)


def scores_by_position(layers: int) -> dict[int, float]:
    """Without a measurement: the nearer to an end, the more sensitive."""
    return {n: 1 / (1 + min(n, layers - 1 - n)) for n in range(layers)}


def read_scores(file: Path) -> dict[int, float]:
    """A map that was saved.

    Raises:
        ValueError: it is none.
    """
    try:
        content = read_json_object(file)
        return {int(layer): float(score) for layer, score in content["scores"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{file} is no map of sensitivity: {{"scores": {{"0": 0.01, ...}}}}') from None


def write_scores(file: Path, scores: Scores) -> None:
    content = {"scores": {str(layer): score for layer, score in sorted(scores.items())}}
    replace_text(file, json.dumps(content, indent=2) + "\n")
