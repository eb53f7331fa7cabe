"""Which code computes MSA: Metal kernels where they have proved right on this machine, else the plain form.

Before a kernel serves, it runs on small cases beside the plain form, once in each process.  If it differs or
does not compile, the plain form serves, and one warning says so.  Of two right forms the faster one serves.
That is measured once for each machine, version of MLX and kind of arrays, and kept in a file.

Without a Metal GPU nothing of this happens.
"""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import mlx.core as mx

from . import kernels
from .attend import attend as plain_attention
from .common import KeysValues, Offset, Padding, Quantized, default_tile_bytes, later, on_gpu, over_queries
from .gradient import with_gradient
from .select import select_blocks as plain_selection

SELECTION, ATTENTION = "selection", "attention"
# Up to so many queries a call is measured as one of few, with one query; others with many.
FEW = 16
# What is measured: queries and context.
SIZES = {"few": (1, 32_768), "many": (512, 8_192)}

# Memory of the kernels' partial outputs, float32 for each pair of a query and a block: enough for 2,048
# queries of M3, mlx-lm's step of a prompt, because a tile reads all chosen blocks anew.
PARTIAL_BYTES = 5 << 28


@dataclass
class _Settings:
    mode: str = "auto"
    strict: bool = False
    store: str | None = None


_settings = _Settings()
_lock = RLock()


def configure(mode: str = "auto", strict: bool = False, store: str | None = None) -> None:
    """For all models of this process.

    Args:
        mode: ``"auto"``; ``"plain"``, never a kernel; ``"kernels"``, kernels wherever they are right.
        strict: a kernel that fails is an error instead of a warning.
        store: file that keeps measurements; None keeps none.

    Raises:
        RuntimeError: kernels are asked for, ``strict`` is set, and there is no Metal GPU.
    """
    global _settings
    if (chosen := _Settings(mode, strict, store)) != _settings:
        _settings = chosen
        _examined.cache_clear()
        if mode == "kernels" and not has_metal():
            _complain("MSA kernels are asked for, but MLX has no Metal GPU here. The plain form serves")


class Setup(NamedTuple):
    """What a kernel is proved and measured for: everything but the number of rows, queries and keys."""

    dtype: mx.Dtype
    kv_bits: int
    kv_group_size: int
    heads: int
    groups: int
    channels: int
    value_channels: int
    index_channels: int
    block_size: int
    k: int
    local_blocks: int = 1
    init_blocks: int = 0

    def __str__(self) -> str:
        name = str(self.dtype).rpartition(".")[2]
        return f"{name}, K and V in {self.kv_bits} bits" if self.kv_group_size else name

    @property
    def selection(self) -> dict[str, int]:
        """Options of :func:`.select.select_blocks`."""
        forced = {"local_blocks": self.local_blocks, "init_blocks": self.init_blocks}
        return {"block_size": self.block_size, "topk_blocks": self.k, **forced}

    @property
    def attention(self) -> dict[str, Any]:
        """Options of :func:`.attend.attend`."""
        return {"block_size": self.block_size, "scale": self.channels**-0.5}


@dataclass
class Verdict:
    """What is known of the kernels for a :class:`Setup`.

    Attributes:
        failure: why no kernel serves; None if all are right.
        is_unexpected: whether that is a fault, and not a limit of the kernels.
        milliseconds: of the plain form and of the kernels, by part and size, such as ``"attention, few"``.
    """

    failure: str | None = None
    is_unexpected: bool = False
    milliseconds: dict[str, tuple[float, float]] = field(default_factory=dict)

    def kernels_serve(self, what: str, mode: str) -> bool:
        """Whether the kernels serve a part and size in this mode; ``auto`` has measured them."""
        if self.failure is not None or mode == "plain":
            return False
        if mode == "kernels":
            return True
        plain, kernel = self.milliseconds[what]
        return kernel < plain


# --- what the model calls ---


def select_blocks(
    index_queries: mx.array,
    index_keys: mx.array,
    offset: Offset,
    left_padding: Padding = None,
    *,
    setup: Setup,
) -> mx.array:
    """As :func:`.select.select_blocks`."""
    serve = _select if _kernels_serve(SELECTION, setup, index_queries.shape[2]) else plain_selection
    return serve(index_queries, index_keys, offset, left_padding, **setup.selection)


def attend(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Offset,
    left_padding: Padding = None,
    *,
    setup: Setup,
    is_training: bool = False,
) -> mx.array:
    """As :func:`.attend.attend`; for training with the gradient that keeps no tile, see ``gradient.py``."""
    arrays: Any = (queries, keys, values)
    where: Any = (block_ids, offset, left_padding)
    by_kernels = _kernels_serve(ATTENTION, setup, queries.shape[2])

    def serve(*arrays: Any) -> mx.array:
        return (_attend if by_kernels else plain_attention)(*arrays, *where, **setup.attention)

    # A kernel has no gradient of its own.
    if (is_training or by_kernels) and not isinstance(keys, Quantized):
        return with_gradient(serve, *where, **setup.attention)(*arrays)
    return serve(*arrays)


def has_metal() -> bool:
    return on_gpu() and mx.metal.is_available()


def _kernels_serve(part: str, setup: Setup, n_queries: int) -> bool:
    if _settings.mode == "plain" or not has_metal():
        return False
    size = "few" if n_queries <= FEW else "many"
    return examine(setup).kernels_serve(f"{part}, {size}", _settings.mode)


# --- the kernels as functions of the plain form's arguments ---


def _select(
    index_queries: mx.array,
    index_keys: mx.array,
    offset: Offset,
    left_padding: Padding,
    *,
    block_size: int,
    topk_blocks: int,
    **forced: int,
) -> mx.array:
    batch, groups, _, _ = index_queries.shape
    n_keys = index_keys.shape[2]
    n_blocks = -(-n_keys // block_size)
    k = min(topk_blocks, n_blocks)
    # A choice has no derivative.
    index_queries, index_keys = mx.stop_gradient(index_queries), mx.stop_gradient(index_keys)

    def select_tile(start: int, tile: mx.array) -> mx.array:
        first = later(offset, start)
        scores = kernels.block_scores(
            tile, index_keys, first, left_padding, n_keys=n_keys, block_size=block_size
        )
        return kernels.choose_blocks(scores, first, block_size=block_size, k=k, **forced)

    tile_length = max(1, default_tile_bytes() // (2 * 4 * batch * groups * n_blocks))
    return mx.stop_gradient(over_queries(select_tile, index_queries, tile_length))


def _attend(
    queries: mx.array,
    keys: KeysValues,
    values: KeysValues,
    block_ids: mx.array,
    offset: Offset,
    left_padding: Padding,
    **options: Any,
) -> mx.array:
    batch, n_heads, _, _ = queries.shape
    bytes_per_query = 4 * batch * n_heads * block_ids.shape[3] * (values.shape[-1] + 1)
    tile_length = max(1, PARTIAL_BYTES // bytes_per_query)

    def attend_tile(start: int, tile: mx.array) -> mx.array:
        ids = block_ids[:, :, start : start + tile_length]
        return kernels.attend_blocks(tile, keys, values, ids, later(offset, start), left_padding, **options)

    return over_queries(attend_tile, queries, tile_length)


# --- proving and measuring ---


def examine(setup: Setup) -> Verdict:
    """Prove and measure the kernels, at the first call for this setup.  Warns once if they fail.

    Raises:
        RuntimeError: they fail, and ``strict`` is set.
    """
    with _lock:
        known = _examined.cache_info().currsize
        verdict = _examined(setup)
        is_new = _examined.cache_info().currsize > known
    if verdict.failure is None or not (verdict.is_unexpected or _settings.mode == "kernels"):
        return verdict
    if is_new or _settings.strict:
        advice = "; it is right, and may be slower. Please report this" if verdict.is_unexpected else ""
        _complain(f"no Metal kernels for {setup}: {verdict.failure}. The plain form serves{advice}")
    return verdict


def _complain(what: str) -> None:
    if _settings.strict:
        raise RuntimeError(f"mlx-m3-plugin: {what}")
    warnings.warn(f"mlx-m3-plugin: {what}.", RuntimeWarning, stacklevel=3)


@cache
def _examined(setup: Setup) -> Verdict:
    work = _Work(setup, 1, 1, setup.block_size)
    if limit := work.limit():
        return Verdict(limit)
    try:
        failure = _prove(setup)
        if failure is None:
            return Verdict(milliseconds=_measured(setup) if _settings.mode == "auto" else {})
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    return Verdict(failure, is_unexpected=True)


class _Work:
    """Random arrays of a setup, for one call."""

    def __init__(self, setup: Setup, rows: int, length: int, n_keys: int, left_padding: Padding = None):
        self.setup, self.left_padding = setup, left_padding
        first = n_keys - length
        self.offset: Offset = first if left_padding is None else [first - padding for padding in left_padding]
        seeds = iter(mx.random.split(mx.random.key(n_keys + length), 5))

        def normal(heads: int, length: int, channels: int) -> mx.array:
            return mx.random.normal((rows, heads, length, channels), setup.dtype, key=next(seeds))

        self.queries = normal(setup.heads, length, setup.channels)
        self.keys = self._held(normal(setup.groups, n_keys, setup.channels))
        self.values = self._held(normal(setup.groups, n_keys, setup.value_channels))
        self.index_queries = normal(setup.groups, length, setup.index_channels)
        self.index_keys = normal(1, n_keys, setup.index_channels)

    def _held(self, x: mx.array) -> KeysValues:
        bits, group_size = self.setup.kv_bits, self.setup.kv_group_size
        return Quantized(*mx.quantize(x, group_size, bits), group_size, bits) if group_size else x

    def limit(self) -> str | None:
        """Why the kernels do not take these arrays."""
        setup = self.setup
        return (
            kernels.supports_scores(self.index_queries, self.index_keys)
            or kernels.supports_choice(setup.k)
            or kernels.supports_attention(
                self.queries, self.keys, self.values, block_size=setup.block_size, k=setup.k
            )
        )

    def select(self, function: Callable[..., mx.array]) -> mx.array:
        options = self.setup.selection
        if self.left_padding is not None:
            # Of padded rows the first block is always in, as in M3.1.
            options["init_blocks"] = int(self.setup.k > 1)
        return function(self.index_queries, self.index_keys, self.offset, self.left_padding, **options)

    def attend(self, function: Callable[..., mx.array], block_ids: mx.array) -> mx.array:
        arrays = self.queries, self.keys, self.values, block_ids
        return function(*arrays, self.offset, self.left_padding, **self.setup.attention)


def _prove(setup: Setup) -> str | None:
    """Why the kernels are wrong; None if they equal the plain form on small cases."""
    n_keys = (setup.k + 3) * setup.block_size + setup.block_size // 3
    for length, padding in ((1, None), (FEW + 4, None), (1, [0, 5]), (FEW + 4, [setup.block_size + 1, 0])):
        work = _Work(setup, 1 if padding is None else len(padding), length, n_keys, padding)
        where = f"{length} queries, {'padded' if padding else 'one row'}"
        expected_ids = work.select(plain_selection)
        difference = mx.sort(expected_ids, axis=-1) != mx.sort(work.select(_select), axis=-1)
        # Random scores are no ties, but the last of thousands may be as close as rounding.
        if float(mx.mean(difference).item()) > 0.01:  # type: ignore[arg-type]
            return f"other blocks are chosen ({where})"
        expected = work.attend(plain_attention, expected_ids).astype(mx.float32)
        found = work.attend(_attend, expected_ids).astype(mx.float32)
        # Both are rounded once, from sums that differ by float32 rounding.
        step = {mx.bfloat16: 2**-7, mx.float16: 2**-10}.get(setup.dtype, 0)
        error = mx.abs(found - expected)
        if not (error <= step * mx.abs(expected) + 1e-5).all().item():
            return f"attention differs by {error.max().item():.3g} ({where})"
    return None


def _measured(setup: Setup) -> dict[str, tuple[float, float]]:
    """Milliseconds of each part and size, from the store or measured and stored."""
    stored = _read_store()
    key = json.dumps(
        [mx.device_info().get("device_name", ""), version("mlx"), _digest_of_kernels(), *map(str, setup)]
    )
    if key not in stored:
        stored[key] = _measure(setup)
        _write_store(stored)
    return {name: (plain, kernel) for name, (plain, kernel) in stored[key].items()}


def _measure(setup: Setup) -> dict[str, tuple[float, float]]:
    found = {}
    for size, (length, n_keys) in SIZES.items():
        work = _Work(setup, 1, length, max(n_keys, (setup.k + 1) * setup.block_size))
        ids = work.select(plain_selection)
        mx.eval(ids, work.queries, *_arrays(work.keys), *_arrays(work.values), work.index_keys)
        selections = [partial(work.select, function) for function in (plain_selection, _select)]
        attentions = [partial(work.attend, function, ids) for function in (plain_attention, _attend)]
        found[f"{SELECTION}, {size}"] = (_best_of(selections[0]), _best_of(selections[1]))
        found[f"{ATTENTION}, {size}"] = (_best_of(attentions[0]), _best_of(attentions[1]))
    return found


def _arrays(x: KeysValues) -> tuple[mx.array, ...]:
    return x[:3] if isinstance(x, Quantized) else (x,)


def _best_of(function: Callable[[], mx.array]) -> float:
    mx.eval(function())
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(function())
        best = min(best, 1e3 * (time.perf_counter() - start))
    return best


# --- the file of measurements ---


@cache
def _digest_of_kernels() -> str:
    sources = sorted(Path(kernels.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def _read_store() -> dict[str, Any]:
    try:
        found = json.loads(Path(_settings.store or "").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_store(measurements: dict[str, Any]) -> None:
    """Whole or not at all; a directory that cannot be written costs a measurement in the next process."""
    if _settings.store is None:
        return
    store = Path(_settings.store)
    unfinished = store.with_suffix(f".{os.getpid()}")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(measurements, indent=1))
        unfinished.replace(store)
    except OSError:
        pass
