"""Random cases for the Metal kernels, and what the definition says of each."""

import math
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_m3_plugin.msa import KeysValues, Quantized
from mlx_m3_plugin.msa.kernels import attend_blocks, block_scores, choose_blocks
from tests.msa import reference

# Half of the last place: what rounding to a dtype can change, relative and (below its normal range) absolute.
HALF_STEP = {mx.bfloat16: (2.0**-8, 0.0), mx.float16: (2.0**-11, 2.0**-25), mx.float32: (2.0**-24, 0.0)}


@dataclass(frozen=True)
class Model:
    """What is compiled into a kernel."""

    dtype: mx.Dtype
    dims: int
    value_dims: int
    index_dims: int
    block_size: int
    heads: int  # of a group
    topk: int
    quantization: tuple[int, int] | None = None  # bits, group size

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("mlx.core.")
        bits = f"-{self.quantization[0]}bit" if self.quantization else ""
        return f"{dtype}{bits}-{self.dims}-{self.value_dims}-block{self.block_size}-heads{self.heads}"


MODELS = [
    Model(mx.bfloat16, 32, 32, 16, block_size=8, heads=2, topk=4),
    Model(mx.bfloat16, 128, 128, 128, block_size=128, heads=16, topk=3),
    Model(mx.bfloat16, 64, 64, 32, block_size=16, heads=4, topk=4, quantization=(8, 32)),
    Model(mx.bfloat16, 128, 64, 64, block_size=8, heads=8, topk=4, quantization=(4, 64)),
    Model(mx.float32, 16, 24, 8, block_size=5, heads=3, topk=3),
    Model(mx.float32, 64, 32, 64, block_size=16, heads=9, topk=5, quantization=(4, 32)),
    Model(mx.float16, 64, 64, 32, block_size=16, heads=9, topk=4),
    Model(mx.float16, 72, 72, 72, block_size=24, heads=2, topk=2),
    Model(mx.float16, 64, 128, 8, block_size=4, heads=16, topk=16, quantization=(8, 64)),
    Model(mx.float32, 40, 8, 24, block_size=12, heads=17, topk=1),
    Model(mx.bfloat16, 8, 8, 8, block_size=1, heads=1, topk=2),
    Model(mx.bfloat16, 16, 120, 40, block_size=40, heads=5, topk=3),
]

# Numbers of the kernels' modules that decide who computes what.
TILES = {
    "scores.MANY_SIMDGROUPS": [1, 2, 16],
    "scores.MANY_GROUPS": [1, 2, 160],
    "choose.BLOCKS_PER_SIMDGROUP": [2, 8, 256],
    "attend.SORTED_GROUPS": [1, 4, 240],
}


@dataclass
class Case:
    """One batch: ``length`` queries are the last of ``n_keys`` slots; each row pads the first few of them."""

    model: Model
    seed: int
    batch: int = 1
    groups: int = 2
    length: int = 1
    n_keys: int = 60
    spare: int = 0
    padding: list[int] | None = None
    local_blocks: int = 1
    init_blocks: int = 0
    unused: float = math.nan  # in the slots before a row's first token and after its last
    coarse: bool = False  # few different values, so that scores meet ties
    # Tiles far smaller than on a GPU, so that small cases have several; None for those of a GPU.
    tiles: dict[str, int] | None = None
    clean: dict[str, KeysValues] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        m, key = self.model, mx.random.key(self.seed)
        slots, heads = self.n_keys + self.spare, self.groups * m.heads
        shapes = {
            "index_queries": (self.batch, self.groups, self.length, m.index_dims),
            "index_keys": (self.batch, 1, slots, m.index_dims),
            "queries": (self.batch, heads, self.length, m.dims),
            "keys": (self.batch, self.groups, slots, m.dims),
            "values": (self.batch, self.groups, slots, m.value_dims),
        }
        for (name, shape), sub in zip(shapes.items(), mx.random.split(key, len(shapes)), strict=True):
            x = mx.random.normal(shape, key=sub)
            x = (mx.round(x) if self.coarse else x).astype(m.dtype)
            quantized = m.quantization is not None and name in ("keys", "values")
            self.clean[name] = quantize(x, *m.quantization) if quantized and m.quantization else x
        self.left_padding = self.padding
        first = self.n_keys - self.length
        self.offset: Any = first if self.padding is None else [first - padding for padding in self.padding]
        paddings = mx.array(self.padding or [0] * self.batch, dtype=mx.int32)[:, None]
        self.query_at = first - paddings + mx.arange(self.length)
        self.key_at = mx.arange(self.n_keys) - paddings
        self.real = (self.query_at >= 0)[:, None, :, None]

    def given(self, name: str) -> Any:
        """The input of a kernel."""
        x = self.clean[name]
        if isinstance(x, Quantized):
            return x._replace(scales=self._with_unused(x.scales), biases=self._with_unused(x.biases))
        return self._with_unused(x) if "keys" in name or "values" in name else x

    def _with_unused(self, x: mx.array) -> mx.array:
        slots = mx.arange(x.shape[2])[None]
        paddings = mx.array(self.padding or [0] * self.batch)[:, None]
        used = (slots >= paddings) & (slots < self.n_keys)
        return mx.where(used[:, None, :, None], x, mx.array(self.unused, dtype=x.dtype))

    def exact(self, name: str) -> mx.array:
        """The used slots in float32, of K and V what their bits stand for."""
        x = self.clean[name]
        if isinstance(x, Quantized):
            x = x._replace(
                scales=x.scales.astype(mx.float32), biases=x.biases.astype(mx.float32)
            ).dequantize()
        x = x.astype(mx.float32)
        return x[:, :, : self.n_keys] if "keys" in name or "values" in name else x


def quantize(x: mx.array, bits: int, group_size: int) -> Quantized:
    return Quantized(*mx.quantize(x, group_size=group_size, bits=bits), group_size, bits)


def draw(model: Model, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 4))
    blocks = 80 if model.block_size <= 8 and rng.integers(4) == 0 else model.topk + 5
    n_keys = int(rng.integers(1, blocks * model.block_size + 1))
    # One token, a few, and enough that pairs are sorted; never more work than a small matrix.
    length = min(n_keys, int(rng.choice([1, 1, int(rng.integers(2, 8)), int(rng.integers(8, 26))])))
    padded = bool(rng.integers(2))
    local = int(rng.integers(0, min(2, model.topk) + 1))
    return Case(
        model,
        seed,
        batch=batch,
        groups=int(rng.integers(1, 4)),
        length=length,
        n_keys=n_keys,
        spare=int(rng.integers(0, 9)),
        padding=[int(rng.integers(0, n_keys + 1)) for _ in range(batch)] if padded else None,
        local_blocks=local,
        init_blocks=int(rng.integers(0, min(2, model.topk - local) + 1)),
        unused=float(rng.choice([math.nan, 1000.0])),
        coarse=bool(rng.integers(4) == 0),
        tiles={name: int(rng.choice(values)) for name, values in TILES.items()},
    )


def check(case: Case) -> None:
    """All kernels on one case: AssertionError where one differs from the definition."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (case.tiles or {}).items():
            module, _, constant = name.partition(".")
            patch.setattr(import_module(f"mlx_m3_plugin.msa.kernels.{module}"), constant, value)
        scores = check_scores(case)
        ids = check_choice(case, scores)
        check_attention(case, ids)


def check_scores(case: Case) -> mx.array:
    m = case.model
    scores = block_scores(
        case.given("index_queries"),
        case.given("index_keys"),
        case.offset,
        case.left_padding,
        n_keys=case.n_keys,
        block_size=m.block_size,
    )
    queries, keys = case.exact("index_queries"), case.exact("index_keys")
    key_at = None if case.padding is None else case.key_at
    expected = reference.block_scores(
        queries, keys, case.query_at, key_at, block_size=m.block_size, local_blocks=0, init_blocks=0
    )
    assert scores.shape == expected.shape
    assert scores.dtype == mx.float32
    # Both sums of D products, in any order.
    products = (mx.abs(queries) @ mx.abs(keys).swapaxes(-1, -2)).max(axis=-1, keepdims=True)
    bound = 2 * m.index_dims * 2.0**-24 * products
    same = (scores == expected) | (mx.abs(scores - expected) <= bound)
    assert mx.where(case.real, same, scores == -mx.inf).all().item(), "scores"
    return scores


def check_choice(case: Case, scores: mx.array) -> mx.array:
    """Of the same scores: as many ids as blocks to choose from, all different, with the largest scores."""
    m = case.model
    options = {"local_blocks": case.local_blocks, "init_blocks": case.init_blocks}
    ids = choose_blocks(scores, case.offset, block_size=m.block_size, k=m.topk, **options)
    assert ids.shape == (*scores.shape[:3], m.topk)
    n_blocks = scores.shape[3]
    block, own = mx.arange(n_blocks), case.query_at[:, None, :, None] // m.block_size
    forced = ((block > own - case.local_blocks) | (block < case.init_blocks)) & (block <= own)
    wanted = np.array(mx.where(forced, mx.inf, scores))
    chosen = np.array(ids)
    assert ((chosen >= -1) & (chosen < n_blocks)).all(), "ids"
    padded = np.concatenate([wanted, np.full((*wanted.shape[:3], m.topk), -np.inf, np.float32)], axis=-1)
    found = np.take_along_axis(padded, np.where(chosen < 0, n_blocks, chosen), axis=-1)
    best = -np.sort(-padded, axis=-1)[..., : m.topk]
    # What a padding query chooses has no meaning, and MLX before 0.32 rounds its block towards zero.
    real = np.broadcast_to(np.array(case.real)[..., 0], best.shape[:3])
    assert (-np.sort(-found, axis=-1) == best)[real].all(), "choice"
    used = np.sort(np.where(chosen < 0, -1 - np.arange(m.topk), chosen), axis=-1)
    assert (np.diff(used, axis=-1) > 0).all(), "a block is chosen twice"
    return ids


def check_attention(case: Case, ids: mx.array) -> mx.array:
    m, scale = case.model, case.model.dims**-0.5
    out = attend_blocks(
        case.given("queries"),
        case.given("keys"),
        case.given("values"),
        ids,
        case.offset,
        case.left_padding,
        block_size=m.block_size,
        scale=scale,
    )
    queries, keys, values = (case.exact(name) for name in ("queries", "keys", "values"))
    key_at = None if case.padding is None else case.key_at
    expected = reference.attend(
        queries, keys, values, ids, case.query_at, key_at, block_size=m.block_size, scale=scale
    )
    assert out.dtype == m.dtype
    assert out.shape == expected.shape
    assert mx.isfinite(out).all().item(), "not finite"
    relative, absolute = HALF_STEP[m.dtype]
    largest = mx.abs(values).max(axis=(2, 3)).max()
    # In float32, on both sides: the error of a score moves its weight by as much, relatively; then the sum
    # over all keys, and a few roundings of single numbers.
    per_key = mx.repeat(keys, m.heads, axis=1)
    score = scale * (mx.abs(queries) @ mx.abs(per_key).swapaxes(-1, -2)).max(axis=-1, keepdims=True)
    noise = 2 * 2.0**-24 * (2 * (m.dims + 4) * score + m.topk * m.block_size + 16) * largest
    error = mx.abs(out.astype(mx.float32) - expected)
    bound = relative * mx.abs(expected) + absolute + (1 + relative) * noise
    assert mx.where(case.real, error <= bound, True).all().item(), "attention"
    return out
