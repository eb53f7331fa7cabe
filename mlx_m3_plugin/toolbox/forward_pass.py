"""A text taken through a checkpoint with one layer in memory at a time.

Between layers the hidden states of all tokens are in a file, and a state file says which layers are done.
An interrupted pass continues in the layer that it was in.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import __version__
from ..startup.settings import cache_directory
from ..weights.byte_ranges import TensorReader
from ..weights.dtypes import from_bytes, name_of, to_bytes
from ..weights.headers import weight_files
from .checkpoint import Checkpoint
from .common import Progress
from .new_directory import replace_text
from .streaming import Choices, Embedding, StreamedLayer

# Tokens whose hidden states are kept after every layer, to compare.
_SAMPLED = 1024
# Copies of a token's hidden state in the second half of a layer, for each of its experts.
_COPIES = 6
_STATE = "walk.json"


def default_cache() -> Path:
    return Path(cache_directory()) / "walks"


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
        return list(pairwise(accumulate(map(len, self.windows), initial=0)))

    def predictions(self) -> tuple[list[int], list[int]]:
        """Positions that predict a token of their window, and those tokens."""
        positions = [p for first, last in self.spans for p in range(first, last - 1)]
        tokens = self.tokens
        return positions, [tokens[position + 1] for position in positions]


def read_texts(checkpoint: Path, text: str, tokens: int | None, context: int) -> Texts:
    """The first ``tokens`` tokens of ``text`` in windows of ``context``.

    Raises:
        ValueError: the text has too few tokens, or the checkpoint has no tokenizer.
    """
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
        self.path, self._width = path, width
        self._dtype: mx.Dtype = getattr(mx, dtype)
        self.bytes_per_token = width * self._dtype.size

    def write(self, first: int, hidden: mx.array) -> None:
        """``hidden`` ``[n, D]`` of the tokens from ``first`` on."""
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(first * self.bytes_per_token)
            file.write(to_bytes(hidden))

    def read(self, first: int, last: int) -> mx.array:
        """``[last - first, D]``.

        Raises:
            OSError: the file is cut off.
        """
        size = (last - first) * self.bytes_per_token
        with self.path.open("rb") as file:
            file.seek(first * self.bytes_per_token)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{self.path} is cut off: delete its directory, and the pass begins again")
        return from_bytes(data, (last - first, self._width), self._dtype)


# --- the forward pass ---


@dataclass
class ForwardPass:
    """A text on its way through a checkpoint's layers, and what it leaves in ``directory``.

    Attributes:
        memory: bytes that tokens may take in a layer, in addition to its weights.
        step: tokens of a window that attend at a time.
        dtype: of the hidden states, once the pass has begun.
    """

    checkpoint: Checkpoint
    texts: Texts
    directory: Path
    memory: int
    step: int
    dtype: str = ""

    def hidden_states(self, layer: int | None = None) -> HiddenStates:
        """Of all tokens, before ``layer``; None: after the last one."""
        config = self.checkpoint.text_config
        number = config.num_hidden_layers if layer is None else layer
        return HiddenStates(self.directory / f"states-{number:03}.bin", config.hidden_size, self.dtype)

    def layer(self, number: int) -> dict[str, np.ndarray]:
        """``sample`` ``[S, D]``: some hidden states after the layer; and what it chose.

        ``experts`` ``[T, k]`` only where there is a router.  ``blocks`` ``[T, G, k]`` only where a block was
        left out: -1 for none, and for all of a token that attended every block.
        """
        with np.load(self.file_of(number)) as arrays:
            return dict(arrays)

    def file_of(self, layer: int) -> Path:
        return self.directory / f"layer-{layer:03}.npz"

    def run(
        self, reader: TensorReader, progress: Progress
    ) -> Iterator[tuple[int, HiddenStates, HiddenStates, Choices]]:
        """Take the texts through all layers that an earlier pass has not done.

        Yields a layer's number, the hidden states before and after it, and what it chose.  It counts as done,
        and the states before it are deleted, when the next layer is asked for.
        """
        done = self._begin(reader)
        progress(-1, done)
        for number in range(done, self.checkpoint.text_config.num_hidden_layers):
            before, after = self.hidden_states(number), self.hidden_states(number + 1)
            choices = self.run_layer(StreamedLayer(self.checkpoint, reader, number), before, after)
            with after.path.open("r+b") as file:
                os.fsync(file.fileno())
            yield number, before, after, choices
            self._write_state(number + 1)
            before.path.unlink(missing_ok=True)
            progress(number, 1)

    def run_layer(self, layer: StreamedLayer, before: HiddenStates, after: HiddenStates) -> Choices:
        """Hidden states before a layer to those after it."""
        for first, last in self.texts.spans:
            position = first
            for h in layer.attend(before.read(first, last)[None], self.step):
                after.write(position, h[0])
                position += h.shape[1]
        # So many tokens go through the experts together.
        copies = self.checkpoint.text_config.num_experts_per_tok * _COPIES
        at_once = max(64, self.memory // (after.bytes_per_token * copies))
        tokens = self.texts.spans[-1][1]
        for first in range(0, tokens, at_once):
            last = min(first + at_once, tokens)
            after.write(first, layer.feed_forward(after.read(first, last)))
        return layer.choices

    def _begin(self, reader: TensorReader) -> int:
        """How many layers are done.  Embeds the tokens if none is."""
        if (self.directory / _STATE).exists():
            state = json.loads((self.directory / _STATE).read_text(encoding="utf-8"))
            self.dtype = state["dtype"]
            return int(state["done"])
        embed, tokens = Embedding(self.checkpoint, reader), self.texts.tokens
        self.dtype = name_of(embed(tokens[:1]).dtype)
        hidden = self.hidden_states(0)
        for start in range(0, len(tokens), _SAMPLED):
            hidden.write(start, embed(tokens[start : start + _SAMPLED]))
        self._write_state(0)
        return 0

    def _write_state(self, done: int) -> None:
        replace_text(self.directory / _STATE, json.dumps({"done": done, "dtype": self.dtype}))


def forward_pass(
    checkpoint: Checkpoint, texts: Texts, directory: Path, *, memory: int, step: int, progress: Progress
) -> ForwardPass:
    """Take ``texts`` through all layers, and keep a record of each.

    Args:
        directory: what is kept goes there; an earlier pass of the same continues from it.

    Raises:
        OSError: a shard or the directory cannot be read or written.
        ValueError: a hidden state is not a number.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = ForwardPass(checkpoint, texts, directory, memory, step)
    with checkpoint.reader() as reader:
        for number, _, after, choices in made.run(reader, progress):
            _record_layer(made, number, after, choices)
    return made


def pass_key(checkpoint: Checkpoint, texts: Texts) -> str:
    """The same for forward passes that leave the same files."""
    directory = checkpoint.directory
    shards = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weight_files(directory)]
    config, device = json.dumps(checkpoint.config, sort_keys=True), str(mx.default_device().type)
    words = hashlib.sha256(repr(texts.windows).encode()).hexdigest()
    same = [__version__, str(directory.resolve()), shards, config, words, _SAMPLED, device]
    return hashlib.sha256(json.dumps(same).encode()).hexdigest()[:20]


# --- what is kept of a layer ---


def _record_layer(made: ForwardPass, number: int, after: HiddenStates, choices: Choices) -> None:
    record: dict[str, Any] = {"sample": _sample(after, len(made.texts.tokens))}
    if not np.isfinite(record["sample"]).all():
        raise ValueError(
            f"{made.checkpoint.directory}: hidden states after layer {number} are not finite; "
            "its weights may be damaged (`mlx-m3 inspect --verify` compares them with their checksums)"
        )
    if choices.experts:
        record["experts"] = np.concatenate([np.array(ids) for ids in choices.experts]).astype(np.uint16)
    if any(ids is not None for ids in choices.blocks):
        record["blocks"] = _blocks(choices.blocks, made)
    temporary = made.file_of(number).with_suffix(".tmp.npz")
    np.savez(temporary, **record)
    os.replace(temporary, made.file_of(number))


def _sample(hidden: HiddenStates, tokens: int) -> np.ndarray:
    positions = np.unique(np.linspace(0, tokens - 1, min(tokens, _SAMPLED)).astype(int))
    sampled = [hidden.read(int(p), int(p) + 1).astype(mx.float32) for p in positions]
    return np.array(mx.concatenate(sampled))


def _blocks(chosen: list[mx.array | None], made: ForwardPass) -> np.ndarray:
    config, texts = made.checkpoint.text_config, made.texts
    ids = np.full((len(texts.tokens), config.index_n_heads, config.index_topk_blocks), -1, np.int32)
    starts = (start for first, last in texts.spans for start in range(first, last, made.step))
    for start, call in zip(starts, chosen, strict=True):
        if call is not None:
            found = np.array(call)[0].swapaxes(0, 1)
            ids[start : start + found.shape[0], :, : found.shape[2]] = found
    return ids
