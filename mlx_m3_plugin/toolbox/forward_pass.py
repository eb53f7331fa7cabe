"""A text taken through a checkpoint with one layer in memory at a time.

Between layers the hidden states of all tokens are in a file, and a state file says which layers are done.
An interrupted pass continues in the layer that it was in.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import __version__
from ..weights.dtypes import from_bytes, name_of, to_bytes
from ..weights.headers import weight_files
from .checkpoint import Checkpoint
from .new_directory import replace_text
from .shards import TensorReader, read_at, write_at
from .streaming import Embedding, StreamedLayer

# Tokens whose hidden states are kept after every layer, to compare.
_SAMPLED = 1024
# Copies of a token's hidden state in the second half of a layer, for each of its experts.
_COPIES = 6
_STATE = "walk.json"

# Called after each layer with its number and 1, and once with -1 and the number of layers done before.
Progress = Callable[[int, int], None]
# Makes a Progress from a title and the number of layers.
Watch = Callable[[str, int], Progress]


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx-m3" / "walks"


# --- the text ---


@dataclass(frozen=True)
class Texts:
    """Windows of token ids, each read from its own beginning; all of one length but the last."""

    windows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> list[int]:
        return [token for window in self.windows for token in window]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each window begins and ends among all tokens."""
        ends = np.cumsum([len(window) for window in self.windows]).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def predictions(self) -> tuple[list[int], list[int]]:
        """Positions that predict a token of their window, and those tokens."""
        positions = [p for first, last in self.spans for p in range(first, last - 1)]
        tokens = self.tokens
        return positions, [tokens[position + 1] for position in positions]

    def key(self) -> str:
        return hashlib.sha256(repr(self.windows).encode()).hexdigest()


def built_in_text() -> str:
    """Prose in several languages, code and tool calls, written for this purpose."""
    return (files(__package__) / "calibration.txt").read_text(encoding="utf-8")


def read_texts(checkpoint: Path, text: str, tokens: int | None, context: int) -> Texts:
    """The first ``tokens`` tokens of ``text`` in windows of ``context``.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the text has too few tokens, or the checkpoint has no tokenizer.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is not a directory")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # Its parsers raise exceptions of all kinds.
    except Exception as error:
        raise ValueError(f"{checkpoint}: cannot read its tokenizer: {error}") from error
    # Not verbose: it would warn that the text is longer than the model's context, which it is cut for.
    return cut(tokenizer.encode(text, add_special_tokens=False, verbose=False), tokens, context)


def cut(ids: list[int], tokens: int | None, context: int) -> Texts:
    if context < 2:
        raise ValueError(f"--context {context}: a window needs at least two tokens")
    if tokens is not None and len(ids) < tokens:
        raise ValueError(f"--tokens {tokens:,}: the text has only {len(ids):,} tokens")
    ids = ids[:tokens]
    windows = [tuple(ids[start : start + context]) for start in range(0, len(ids), context)]
    # One token predicts nothing.
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError("the text has fewer than two tokens")
    return Texts(tuple(windows))


# --- hidden states on disk ---


class HiddenStates:
    """A file of hidden states ``[N, D]``.

    Args:
        dtype: ``float32``, ``float16`` or ``bfloat16``.
    """

    def __init__(self, path: Path, width: int, dtype: str):
        self._path, self._width = path, width
        self._dtype: mx.Dtype = getattr(mx, dtype)
        self._bytes_per_token = width * self._dtype.size

    def write(self, first: int, hidden: mx.array) -> None:
        """``hidden`` ``[n, D]`` of the tokens from ``first`` on."""
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            write_at(file.fileno(), first * self._bytes_per_token, to_bytes(hidden))

    def read(self, first: int, last: int) -> mx.array:
        """``[last - first, D]``."""
        start, size = first * self._bytes_per_token, (last - first) * self._bytes_per_token
        with self._path.open("rb") as file:
            data = read_at(file.fileno(), start, size)
        return from_bytes(data, (last - first, self._width), self._dtype)

    def sync(self) -> None:
        with self._path.open("r+b") as file:
            os.fsync(file.fileno())

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def hidden_states(directory: Path, layer: int, width: int, dtype: str) -> HiddenStates:
    """Of all tokens, before ``layer``."""
    return HiddenStates(directory / f"states-{layer:03}.bin", width, dtype)


# --- the forward pass ---


@dataclass(frozen=True)
class ForwardPass:
    """A finished forward pass: what it left in ``directory``."""

    directory: Path
    layers: int
    tokens: int
    width: int
    dtype: str

    def hidden_states(self) -> HiddenStates:
        """Of all tokens, after the last layer."""
        return self._before(self.layers)

    def layer(self, number: int) -> dict[str, np.ndarray]:
        """``sample`` ``[S, D]``: some hidden states after the layer; and what it chose.

        ``experts`` ``[T, k]`` only where there is a router.  ``blocks`` ``[T, G, k]`` only where a block was
        left out: -1 for none, and for all of a token that attended every block.
        """
        with np.load(_layer_file(self.directory, number)) as arrays:
            return dict(arrays)

    def _before(self, layer: int) -> HiddenStates:
        return hidden_states(self.directory, layer, self.width, self.dtype)


def forward_pass(
    checkpoint: Checkpoint, texts: Texts, directory: Path, *, memory: int, step: int, progress: Progress
) -> ForwardPass:
    """Take ``texts`` through all layers.

    Args:
        directory: what is kept goes there; an earlier pass of the same continues from it.
        memory: bytes that tokens may take in a layer, in addition to its weights.
        step: tokens of a window that attend at a time.

    Raises:
        OSError: a shard or the directory cannot be read or written.
        ValueError: a hidden state is not a number.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = checkpoint.text_config
    tokens = texts.tokens
    with TensorReader(checkpoint.directory, checkpoint.headers.tensors) as reader:
        done, dtype = begin(directory, checkpoint, reader, tokens)
        progress(-1, done)
        made = ForwardPass(directory, config.num_hidden_layers, len(tokens), config.hidden_size, dtype)
        for number in range(done, config.num_hidden_layers):
            layer = StreamedLayer(checkpoint, reader, number)
            before, after = made._before(number), made._before(number + 1)
            run_layer(layer, before, after, texts, tokens_at_once(checkpoint, dtype, memory), step)
            after.sync()
            _record_layer(checkpoint, layer, after, texts, step, number, _layer_file(directory, number))
            write_state(directory, number + 1, dtype)
            before.remove()
            progress(number, 1)
    return made


def pass_key(checkpoint: Checkpoint, texts: Texts) -> str:
    """The same for forward passes that leave the same files."""
    shards = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weight_files(checkpoint.directory)]
    config = json.dumps(checkpoint.config, sort_keys=True)
    device = str(mx.default_device().type)
    same = [__version__, str(checkpoint.directory.resolve()), shards, config, texts.key(), _SAMPLED, device]
    return hashlib.sha256(json.dumps(same).encode()).hexdigest()[:20]


def begin(
    directory: Path, checkpoint: Checkpoint, reader: TensorReader, tokens: list[int]
) -> tuple[int, str]:
    """How many layers are done, and the dtype of hidden states.  Embeds the tokens if none is done."""
    try:
        state = json.loads((directory / _STATE).read_text(encoding="utf-8"))
        return state["done"], state["dtype"]
    except FileNotFoundError:
        pass
    embed = Embedding(checkpoint, reader)
    first = embed(tokens[:1])
    dtype = name_of(first.dtype)
    hidden = hidden_states(directory, 0, first.shape[1], dtype)
    for start in range(0, len(tokens), _SAMPLED):
        hidden.write(start, embed(tokens[start : start + _SAMPLED]))
    write_state(directory, 0, dtype)
    return 0, dtype


def write_state(directory: Path, done: int, dtype: str) -> None:
    replace_text(directory / _STATE, json.dumps({"done": done, "dtype": dtype}))


def run_layer(
    layer: StreamedLayer, before: HiddenStates, after: HiddenStates, texts: Texts, at_once: int, step: int
) -> None:
    """Hidden states before a layer to those after it; ``at_once`` tokens go through its experts together."""
    for first, last in texts.spans:
        position = first
        for h in layer.attend(before.read(first, last)[None], step):
            after.write(position, h[0])
            position += h.shape[1]
    tokens = texts.spans[-1][1]
    for first in range(0, tokens, at_once):
        last = min(first + at_once, tokens)
        after.write(first, layer.feed_forward(after.read(first, last)))


def tokens_at_once(checkpoint: Checkpoint, dtype: str, memory: int) -> int:
    """How many tokens go through the experts together."""
    config = checkpoint.text_config
    itemsize = 4 if dtype == "float32" else 2
    return max(64, memory // (config.hidden_size * itemsize * config.num_experts_per_tok * _COPIES))


# --- what is kept of a layer ---


def _record_layer(
    checkpoint: Checkpoint,
    layer: StreamedLayer,
    after: HiddenStates,
    texts: Texts,
    step: int,
    number: int,
    file: Path,
) -> None:
    record: dict[str, Any] = {"sample": _sample(after, len(texts.tokens))}
    if not np.isfinite(record["sample"]).all():
        raise ValueError(
            f"{checkpoint.directory}: hidden states after layer {number} are not finite; "
            "its weights may be damaged (`mlx-m3 inspect --verify` compares them with their checksums)"
        )
    if layer.choices.experts:
        record["experts"] = np.concatenate([np.array(ids) for ids in layer.choices.experts]).astype(np.uint16)
    if any(ids is not None for ids in layer.choices.blocks):
        record["blocks"] = _blocks(layer.choices.blocks, texts, step, checkpoint)
    temporary = file.with_suffix(".tmp.npz")
    np.savez(temporary, **record)
    os.replace(temporary, file)


def _sample(hidden: HiddenStates, tokens: int) -> np.ndarray:
    positions = np.unique(np.linspace(0, tokens - 1, min(tokens, _SAMPLED)).astype(int))
    sampled = [hidden.read(int(p), int(p) + 1).astype(mx.float32) for p in positions]
    return np.array(mx.concatenate(sampled))


def _blocks(chosen: list[mx.array | None], texts: Texts, step: int, checkpoint: Checkpoint) -> np.ndarray:
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


def _layer_file(directory: Path, layer: int) -> Path:
    return directory / f"layer-{layer:03}.npz"
