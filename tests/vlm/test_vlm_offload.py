"""Experts on disk (``mlx_vlm.moe_offload``): repacked by upstream, run by our class, to the same logits."""

import contextlib
import io
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.checkpoints.edits import edit_json
from tests.checkpoints.tiny_layouts import LAYOUTS
from tests.vlm.vlm_runs import alone, assert_same_answer, difference, has_offload, text, with_images

pytestmark = has_offload

ORIGINAL = ("published_float", "published_text_only", "transformers_in_memory")
CONVERTED = ("mlx_unfused_4bit", "mlx_unfused_4bit_vision", "mlx_unfused_float")


def write(layout: str, directory: Path) -> tuple[str, str]:
    """The checkpoint, and its expert store."""
    from mlx_vlm import moe_offload

    source, store = directory / "source", directory / "store"
    LAYOUTS[layout].write(source)
    with contextlib.redirect_stdout(io.StringIO()):
        moe_offload.repack(str(source), str(store))
    return str(source), str(store)


def load(directory: str, **options: Any) -> Any:
    from mlx_vlm.utils import load_model

    return load_model(Path(directory), **options)


@pytest.mark.some(2)
@pytest.mark.parametrize("layout", [*ORIGINAL, *CONVERTED])
def test_logits_are_those_of_resident_experts(tmp_path: Path, layout: str) -> None:
    source, store = write(layout, tmp_path)
    resident, offloaded = load(source), load(store, expert_cache_gb=1.0)
    assert "mlx_m3_plugin" in type(offloaded.layers[0]).__module__
    experts = offloaded.moe_offload_store
    assert (experts.num_experts, experts.swapped) == (4, 2)
    tokens = mx.array([text(120).tokens])
    assert difference(offloaded(tokens).logits, resident(tokens).logits) <= 1e-6
    assert_same_answer(alone(offloaded, text(60), 4), alone(resident, text(60), 4))


def test_images(tmp_path: Path) -> None:
    source, store = write("published_float", tmp_path)
    resident, offloaded = load(source), load(store, expert_cache_gb=1.0)
    assert_same_answer(alone(offloaded, with_images(90), 4), alone(resident, with_images(90), 4))


def test_few_experts_in_memory(tmp_path: Path) -> None:
    """Room for a part of them: they come and go."""
    source, store = write("published_float", tmp_path)
    resident = load(source)
    one_expert = 3 * 256 * 128 * 4
    offloaded = load(store, expert_cache_gb=3 * one_expert / 2**30)
    tokens = mx.array([text(120).tokens])
    assert difference(offloaded(tokens).logits, resident(tokens).logits) <= 1e-6


@pytest.mark.some(1)
@pytest.mark.parametrize("layout", ["mlx_fused_129_4bit", "mlx_fused_129_oq4", "mlx_shared_8bit_unpacked"])
def test_experts_in_mlx_vlms_own_layout(tmp_path: Path, layout: str) -> None:
    """Gate and up fused, and the shared expert one more row where its bits are those of the others."""
    source, store = write(layout, tmp_path)
    resident, offloaded = load(source), load(store, expert_cache_gb=1.0)
    experts = offloaded.moe_offload_store
    assert (experts.num_experts, experts.swapped) == (4 if "unpacked" in layout else 5, 2)
    tokens = mx.array([text(120).tokens])
    assert difference(offloaded(tokens).logits, resident(tokens).logits) <= 1e-6
    assert_same_answer(alone(offloaded, text(60), 4), alone(resident, text(60), 4))


def test_a_store_of_another_model_is_refused(tmp_path: Path) -> None:
    _, store = write("mlx_fused_129_4bit", tmp_path)
    edit_json(Path(store) / "offload_index.json", lambda index: index.update(num_experts=8))
    with pytest.raises(ValueError, match=r"8 experts a layer, and config\.json has 4"):
        load(store, expert_cache_gb=1.0)
