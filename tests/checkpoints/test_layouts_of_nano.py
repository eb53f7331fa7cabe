"""Every layout can be made of any model, M3-nano too."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_m3_plugin.toolbox.demo import NANO
from tests.checkpoints.layouts import LAYOUTS
from tests.checkpoints.layouts.reading import source_of


def test_every_layout_is_the_same_model(tmp_path: Path, count: Any, fresh_seed: int) -> None:
    """Each is opened by our reader again, and has the values that its maker says it has."""
    names = random.Random(fresh_seed).sample(sorted(LAYOUTS), count(8, len(LAYOUTS)))
    source = source_of(NANO)
    for name in names:
        values = LAYOUTS[name].write(tmp_path / name, source)
        again = source_of(tmp_path / name)
        assert again.parameters.keys() == values.keys(), name
        for parameter, value in values.items():
            difference = mx.abs(again.parameters[parameter] - value).max().item()
            # bfloat16 scales and tensors are read as such.
            assert difference <= 2**-7 * mx.abs(value).max().item(), (name, parameter)
        assert again.vision.keys() == (source.vision.keys() if LAYOUTS[name].has_vision else set()), name
