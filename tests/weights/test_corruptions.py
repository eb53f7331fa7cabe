"""A damaged checkpoint is refused with an error that names what is wrong; none loads."""

import random
import shutil
from pathlib import Path

import pytest
from mlx_lm.utils import load_config, load_model

from mlx_m3_plugin.model.config import text_config_of
from mlx_m3_plugin.weights.headers import read_headers
from mlx_m3_plugin.weights.layouts import plan_layout
from tests.checkpoints.corruptions import CORRUPTIONS, Shards
from tests.checkpoints.tiny_layouts import LAYOUTS

DAMAGED = (
    "published_float",
    "mxfp8_official",
    "transformers_in_memory",
    "nvfp4_modelopt_mixed",
    "mlx_config_i",
    "mlx_unfused_4bit_vision",
    "mlx_fused_129_oq4",
    "mlx_text_only_4bit",
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, list[str]]]]:
    """Each checkpoint, written once, and what becomes of each of its tensors."""
    written = {}
    for name in DAMAGED:
        directory = tmp_path_factory.mktemp(name)
        LAYOUTS[name].write(directory)
        load_model(directory)
        written[name] = (directory, origins(directory))
    return written


def origins(directory: Path) -> dict[str, list[str]]:
    config = text_config_of(load_config(directory))
    made_from: dict[str, list[str]] = {}
    for parameter, tensor in plan_layout(read_headers(directory).tensors, config, "").items():
        for stored in tensor.stored_names():
            made_from.setdefault(stored, []).append(parameter)
    return made_from


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_damaged_checkpoint_is_refused_by_name(kind, sound, tmp_path, count, fresh_seed):
    for case in range(count(6, 182)):
        seed = f"{fresh_seed}-{case}"
        rng = random.Random(seed)
        directory, made_from = sound[rng.choice(DAMAGED)]
        copy = tmp_path / f"{case}"
        shutil.copytree(directory, copy)
        damage = CORRUPTIONS[kind](Shards.read(copy, made_from), rng)
        told = error_of_loading(copy)
        assert told is not None, f"{damage.what} of {directory.name} loads (seed {seed})"
        assert damage.is_named_in(told), f"{damage.what} of {directory.name} (seed {seed}): {told}"
        shutil.rmtree(copy)


def error_of_loading(directory: Path) -> str | None:
    try:
        load_model(directory)
    except Exception as error:  # which one is upstream's to choose
        return str(error)
    return None
