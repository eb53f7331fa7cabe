"""The sensitivity of layers, measured: how much each one's output changes when its weights get fewer bits."""

from functools import partial
from pathlib import Path

import mlx.core as mx

from ...weights.quantization import AFFINE_BITS
from ..checkpoint import Checkpoint
from ..common import Progress, layers_bar
from ..forward_pass import ForwardPass, HiddenStates, Texts, default_cache, pass_key, read_texts
from ..new_directory import LOCK, locked
from ..precision import Quantization
from ..streaming import StreamedLayer
from .allocation import Scores, read_scores, write_scores
from .recipe import Recipe

# As oQ: 128 samples of 256 tokens, or as many as the text has.
_SAMPLES, _WINDOW = 128, 256
# The router and the indexer, which no level of oQ quantizes: their bits are not tried either.
_ROUTER_AND_INDEXER = (".block_sparse_moe.gate", ".index_q_proj", ".index_k_proj")
# Tokens compared at a time.
_TOKENS = 1024


def measured(checkpoint: Checkpoint, recipe: Recipe, text: str, memory: int) -> Scores:
    """The score of every layer for the bits of ``recipe``; ``memory``: bytes that the work may take."""
    texts = Texts(read_texts(checkpoint.directory, text, None, _WINDOW).windows[:_SAMPLES])
    base = Quantization(int(recipe.bit_targets.get("base_bits", 4)), recipe.default.group_size)
    progress = layers_bar(f"sensitivity of {checkpoint.title}", checkpoint.text_config.num_hidden_layers)
    return measure_sensitivity(
        checkpoint, texts, base, default_cache(), memory=memory, step=_WINDOW, progress=progress
    )


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
    """The score of every layer with the bits of ``base``; continues an interrupted measurement.

    The next layer gets the output of the unquantized one.

    Raises:
        BlockingIOError: another process measures the same.
        OSError: a shard or the cache cannot be read or written.
    """
    directory = cache / f"{pass_key(checkpoint, texts)}-{base.bits}-bits"
    doing = f"`mlx-m3 convert` is measuring {checkpoint.directory} in {directory}"
    file = directory / "scores.json"
    made = ForwardPass(checkpoint, texts, directory, memory, step)
    with locked(directory / LOCK, doing, "give a map with --sensitivity"), checkpoint.reader() as reader:
        scores = read_scores(file) if file.exists() else {}
        for number, before, after, _ in made.run(reader, progress):
            tried = HiddenStates(directory / "tried.bin", checkpoint.text_config.hidden_size, made.dtype)
            trial = StreamedLayer(checkpoint, reader, number, partial(_fewer_bits, base))
            made.run_layer(trial, before, tried)
            scores[number] = _relative_error(after, tried, len(texts.tokens))
            write_scores(file, scores)
    return scores


def _fewer_bits(base: Quantization, path: str, spec: Quantization) -> Quantization:
    """``base``; for a matrix that has no more bits already, the next fewer bits."""
    if path.endswith(_ROUTER_AND_INDEXER):
        return spec
    if spec.bits is None or spec.bits > (base.bits or 0):
        return base
    fewer = [bits for bits in AFFINE_BITS if bits < spec.bits]
    return Quantization(fewer[-1], base.group_size) if fewer else spec


def _relative_error(expected: HiddenStates, tried: HiddenStates, tokens: int) -> float:
    error = squares = 0.0
    for first in range(0, tokens, _TOKENS):
        last = min(first + _TOKENS, tokens)
        out, out_q = (hidden.read(first, last).astype(mx.float32) for hidden in (expected, tried))
        error += float(mx.square(out - out_q).sum())
        squares += float(mx.square(out).sum())
    return error / max(squares, 1e-10 * tokens)
