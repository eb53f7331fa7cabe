"""Which code serves: kernels where they are right and faster, the plain form in every other case."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_m3_plugin.msa import attend as plain_attend
from mlx_m3_plugin.msa import engine
from mlx_m3_plugin.msa import select_blocks as plain_select
from mlx_m3_plugin.msa.engine import Setup
from mlx_m3_plugin.msa.kernels import attend as attend_kernels
from mlx_m3_plugin.msa.kernels import choose as choose_kernels

BLOCK = 8
SETUP = Setup(
    dtype=mx.bfloat16, kv_bits=0, kv_group_size=0, heads=4, groups=2, channels=16, value_channels=16,
    index_channels=16, block_size=BLOCK, k=4,
)  # fmt: skip
OPTIONS = {"block_size": BLOCK, "topk_blocks": 4}


def output(length: int = 3, seed: int = 0) -> tuple[mx.array, mx.array]:
    """Chosen blocks, and what the engine makes of them."""
    q, k, v, iq, ik = arrays(length, seed)
    ids = engine.select_blocks(iq, ik, 90 - length, setup=SETUP)
    return ids, engine.attend(q, k, v, ids, 90 - length, setup=SETUP)


def plain_output(length: int = 3, seed: int = 0) -> tuple[mx.array, mx.array]:
    q, k, v, iq, ik = arrays(length, seed)
    ids = plain_select(iq, ik, 90 - length, **OPTIONS)
    return ids, plain_attend(q, k, v, ids, 90 - length, block_size=BLOCK, scale=0.25)


def arrays(length: int, seed: int) -> list[mx.array]:
    keys = mx.random.split(mx.random.key(seed), 5)
    shapes = [(1, 4, length, 16), (1, 2, 90, 16), (1, 2, 90, 16), (1, 2, length, 16), (1, 1, 90, 16)]
    return [mx.random.normal(s, mx.bfloat16, key=k) for s, k in zip(shapes, keys, strict=True)]


def assert_plain(length: int = 3) -> None:
    """Bit for bit."""
    for found, expected in zip(output(length), plain_output(length), strict=True):
        assert mx.array_equal(found, expected)


@pytest.mark.parametrize("length", [1, 3, 40])
def test_right_kernels_serve(started_kernels: list[str], length: int) -> None:
    engine.configure("kernels", strict=True)
    engine.examine(SETUP)
    started_kernels.clear()
    (ids, out), (expected_ids, expected) = output(length), plain_output(length)
    assert {name.rpartition("plugin_")[2] for name in started_kernels} >= {
        "choose_blocks",
        "attend_pairs",
        "merge_pairs",
    }
    assert mx.array_equal(mx.sort(ids, axis=-1), mx.sort(expected_ids, axis=-1))
    error = mx.abs(out.astype(mx.float32) - expected.astype(mx.float32))
    assert (error <= 2**-7 * mx.abs(expected.astype(mx.float32)) + 1e-5).all().item()


WRONG = {
    "wrong": ("p < min(pair0 + pairs_per_group, n_pairs)", "p + 1 < min(pair0 + pairs_per_group, n_pairs)"),
    "does not compile": ("int held = -1;", "int held = no_such_name;"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_kernel_does_not_serve(
    started_kernels: list[str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = attend_kernels.ATTEND.source
    assert WRONG[fault][0] in source
    kernel = dataclasses.replace(attend_kernels.ATTEND, source=source.replace(*WRONG[fault]))
    monkeypatch.setattr(attend_kernels, "ATTEND", kernel)
    engine.configure("auto")
    with pytest.warns(RuntimeWarning, match="bfloat16"):
        assert_plain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_plain(40)

    engine.configure("auto", strict=True)
    with pytest.raises(RuntimeError, match="bfloat16"):
        output()


def test_a_wrong_choice_does_not_serve(started_kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = choose_kernels.CHOOSE.source.replace("local_blocks", "0", 1)
    broken = dataclasses.replace(choose_kernels.CHOOSE, source="return;" + source)
    monkeypatch.setattr(choose_kernels, "CHOOSE", broken)
    engine.configure("auto")
    with pytest.warns(RuntimeWarning):
        assert_plain()


def test_the_faster_form_serves(started_kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"selection, few": (2.0, 1.0), "selection, many": (1.0, 2.0)}
    times |= {"attention, few": (1.0, 2.0), "attention, many": (2.0, 1.0)}
    monkeypatch.setattr(engine, "_measure", lambda setup: times)
    engine.configure("auto")
    engine.examine(SETUP)
    started_kernels.clear()
    output(1)
    assert not any("attend" in name for name in started_kernels)
    assert any("choose" in name for name in started_kernels)
    started_kernels.clear()
    output(engine.FEW + 1)
    assert any("attend" in name for name in started_kernels)
    assert not any("choose" in name for name in started_kernels)


def test_measured_once_for_a_machine(
    started_kernels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "cache" / "engine.json"
    engine.configure("auto", store=str(store))
    first = engine.examine(SETUP)
    assert set(first.milliseconds) == {
        f"{part}, {size}" for part in ("selection", "attention") for size in ("few", "many")
    }
    assert len(json.loads(store.read_text())) == 1

    def fail(setup: Setup) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_measure", fail)
        engine._examined.cache_clear()
        assert engine.examine(SETUP) == first
    # A file that is no measurement, or that belongs to others, is one that is not there.
    store.write_text("[1, ")
    engine._examined.cache_clear()
    assert engine.examine(SETUP).failure is None
    assert len(json.loads(store.read_text())) == 1


def test_what_kernels_do_not_take_is_no_fault(started_kernels: list[str]) -> None:
    engine.configure("auto", strict=True)
    wide = SETUP._replace(channels=256, value_channels=256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "256" in (engine.examine(wide).failure or "")
    engine.configure("kernels")
    with pytest.warns(RuntimeWarning, match="256"):
        engine.examine(wide)


@pytest.mark.parametrize("mode", ["auto", "plain"])
def test_without_a_metal_gpu_nothing_is_looked_at(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_examined", None)
    monkeypatch.setattr(engine, "_settings", engine._Settings(mode))
    assert_plain()


def test_kernels_without_a_metal_gpu_are_announced() -> None:
    try:
        with pytest.warns(RuntimeWarning, match="no Metal GPU"):
            engine.configure("kernels")
        with pytest.raises(RuntimeError, match="no Metal GPU"):
            engine.configure("kernels", strict=True)
    finally:
        engine.configure()


def test_gradients_are_those_of_the_plain_form(started_kernels: list[str]) -> None:
    engine.configure("kernels", strict=True)
    q, k, v, iq, ik = (x.astype(mx.float32) for x in arrays(20, 1))
    setup = SETUP._replace(dtype=mx.float32)
    weights = mx.random.normal(q.shape)

    def loss(serve: Callable[..., mx.array], select: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def of(q: mx.array, k: mx.array, v: mx.array, iq: mx.array, ik: mx.array) -> mx.array:
            ids = select(iq, ik, 70)
            return (serve(q, k, v, ids, 70) * weights).sum()

        return of

    by_kernels, select_by_kernels = (partial(f, setup=setup) for f in (engine.attend, engine.select_blocks))
    by_plain, select_plain = partial(plain_attend, **setup.attention), partial(plain_select, **OPTIONS)
    engine.examine(setup)
    found = mx.grad(loss(by_kernels, select_by_kernels), argnums=list(range(5)))(q, k, v, iq, ik)
    expected = mx.grad(loss(by_plain, select_plain), argnums=list(range(5)))(q, k, v, iq, ik)
    for ours, theirs in zip(found, expected, strict=True):
        assert mx.abs(ours - theirs).max().item() <= 1e-5
    assert all(mx.abs(gradient).max().item() > 1e-2 for gradient in found[:3])


def test_the_first_use_may_be_inside_a_compiled_function(started_kernels: list[str]) -> None:
    """As in a step of ``mlx_lm.lora``."""
    engine.configure("auto", strict=True)

    def step(x: mx.array) -> mx.array:
        assert engine.examine(SETUP).failure is None
        return x + 1

    assert mx.compile(step)(mx.array(1)).item() == 2
    assert started_kernels
