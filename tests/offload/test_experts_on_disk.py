"""Experts on the disk give the bits of experts in memory."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_m3_plugin.model.memory import PREFILL_STEP, bytes_per_token, reserve_of, transient_bytes
from mlx_m3_plugin.offload import install
from mlx_m3_plugin.weights.headers import INDEX, read_header
from tests.checkpoints.random_model import write_random_model
from tests.checkpoints.tiny_layouts import LAYOUTS
from tests.offload.disk_models import (
    VARIABLE,
    assert_same_bits,
    experts_of,
    load_on_disk,
    load_with,
    memory_for,
)

HOSTS = ("mlx_lm", "mlx_vlm")


def test_a_layout(layout_name: str, tmp_path: Path, fresh_seed: int) -> None:
    """In one of the hosts, with one number of slots: each layout opens in both in tests of their own."""
    rng = random.Random(fresh_seed)
    tokens = np.random.default_rng(fresh_seed).integers(0, 600, (2, 60))
    LAYOUTS[layout_name].write(tmp_path)
    host, slots = rng.choice(HOSTS), rng.choice((1, 2, 3))
    resident = load_with(host, tmp_path)
    on_disk = load_on_disk(host, tmp_path, memory_for(resident, slots))
    assert [experts.slots.count for experts in experts_of(on_disk)] == [slots, slots]
    assert_same_bits(resident, on_disk, tokens, [40, 1, 1, 8])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 experts in each of 4 layers, 4 of them for each token."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_random_model(directory)
    return directory


@pytest.fixture(scope="module")
def resident(checkpoint: Path) -> Any:
    return load_with("mlx_lm", checkpoint)


@pytest.mark.some(1)
@pytest.mark.parametrize("slots", [1, 3, 8, 15])
def test_few_and_many_slots(slots: int, checkpoint: Path, resident: Any, fresh_seed: int) -> None:
    on_disk = load_on_disk("mlx_lm", checkpoint, memory_for(resident, slots))
    # Rows by the thousand, a few, and one at a time.
    tokens = np.random.default_rng(fresh_seed).integers(0, 600, (3, 200))
    assert_same_bits(resident, on_disk, tokens, [90, 20, 3, *[1] * 12])


def test_an_output_that_nobody_has_asked_for_yet(checkpoint: Path, resident: Any) -> None:
    """Its experts stay where they are until it is computed."""
    layer = experts_of(load_on_disk("mlx_lm", checkpoint, memory_for(resident, 4)))[-1]
    whole = experts_of(resident)[-1]
    x = mx.random.normal((3, 1, 128))
    ids = [mx.array([[n, n + 1, n + 2, n + 3]], mx.uint32) for n in (0, 0, 4)]
    mx.eval(layer(x[0], ids[0]))
    outputs = [layer(row, chosen) for row, chosen in zip(x, ids, strict=True)]
    for row, chosen, output in zip(x, ids, outputs, strict=True):
        assert bool(mx.array_equal(output, whole(row, chosen)))


def test_what_a_checkpoint_lacks_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """As without experts on disk."""
    LAYOUTS["mlx_unfused_4bit"].write(tmp_path)
    file, name = next(
        (file, name)
        for file in tmp_path.glob("model*.safetensors")
        for name in read_header(file)
        if name.endswith("layers.2.block_sparse_moe.switch_mlp.up_proj.biases")
    )
    index = tmp_path / INDEX
    weights = {n: array for n, array in mx.load(str(file)).items() if n != name}
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    index.unlink(missing_ok=True)
    for memory in (1 << 30, 300_000):
        with pytest.raises(ValueError, match=r"missing \(1\):\n.*switch_mlp\.up_proj\.biases"):
            load_on_disk("mlx_lm", tmp_path, memory)


def test_off_where_all_experts_fit(checkpoint: Path, resident: Any) -> None:
    everything = memory_for(resident, 16)
    for memory, is_off in ((everything, True), (everything - 1, False)):
        layers = experts_of(load_on_disk("mlx_lm", checkpoint, memory))
        assert all((type(layer) is type(experts_of(resident)[0])) == is_off for layer in layers)


@pytest.mark.parametrize("recommended", [True, False])
def test_auto(checkpoint: Path, resident: Any, monkeypatch: pytest.MonkeyPatch, recommended: bool) -> None:
    """What the machine has left, or what its GPU may keep in memory."""
    config = resident.language_model.model.config
    weights = sum(array.nbytes for _, array in tree_flatten(resident.parameters()))
    rest = weights - memory_for(resident, 16)
    rest += bytes_per_token(config, 4) * 32_768 + transient_bytes(config, PREFILL_STEP, 32_768)
    needed = rest + memory_for(resident, 5)
    machine = needed if recommended else needed + reserve_of(needed)
    monkeypatch.setattr(install, "machine_memory", lambda: 1 << 40 if recommended else machine)
    monkeypatch.setattr(
        mx, "device_info", lambda: {"max_recommended_working_set_size": needed} if recommended else {}
    )
    monkeypatch.setenv(VARIABLE, "auto")
    assert [layer.slots.count for layer in experts_of(load_with("mlx_lm", checkpoint))] == [5] * 4
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": rest})
    with pytest.raises(ValueError, match="too small: 0 bytes"):
        load_with("mlx_lm", checkpoint)


def test_refusals(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.utils import load_model, save_model
    from mlx_vlm.utils import save_weights

    with pytest.raises(ValueError, match=f"{VARIABLE} is too small: 393,215 bytes, and one expert of each"):
        load_on_disk("mlx_lm", checkpoint, 393_215)
    on_disk = load_on_disk("mlx_lm", checkpoint, 393_216)
    on_disk.train()
    with pytest.raises(NotImplementedError, match=f"cannot be trained: unset {VARIABLE}"):
        on_disk(mx.array([[1, 2, 3]]))
    on_disk.eval()
    needs_them = f"experts are on disk, and are needed in memory: unset {VARIABLE}"
    adapter = "model.layers.2.block_sparse_moe.switch_mlp.up_proj.lora_a"
    with pytest.raises(ValueError, match=needs_them):
        on_disk.load_weights([(adapter, mx.zeros((16, 8, 128)))], strict=False)
    with pytest.raises(ValueError, match=needs_them):
        save_model(tmp_path / "saved", on_disk)
    with pytest.raises(ValueError, match=needs_them):
        save_weights(tmp_path / "saved", load_on_disk("mlx_vlm", checkpoint, 393_216))
    with pytest.raises(ValueError, match=needs_them):
        on_disk.shard()
    monkeypatch.setenv(VARIABLE, "400kb")
    with pytest.raises(ValueError, match=f"{VARIABLE} is set, .* unset it to convert"):
        load_model(checkpoint, lazy=True)
