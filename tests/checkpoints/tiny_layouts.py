"""Every MiniMax-M3 checkpoint layout in circulation, as a tiny directory with true values.

``LAYOUTS`` are to be opened, ``UNREPRESENTABLE`` to be refused.  ``layout.write(directory)`` writes the
checkpoint and returns the float32 parameters that it stands for.
"""

from pathlib import Path

from tests.checkpoints import layouts
from tests.checkpoints import refusals as refusals
from tests.checkpoints.layouts.source import Weights
from tests.checkpoints.tiny_model import tiny


class Layout(layouts.Layout):
    """Of the tiny model."""

    def write(self, directory: Path) -> Weights:  # type: ignore[override]
        return super().write(directory, tiny())


LAYOUTS = {name: Layout(**vars(layout)) for name, layout in layouts.LAYOUTS.items()}

_REFUSED = (
    Layout(
        "fp8_blocks",
        "FP8 with float32 scales of 128 x 128 blocks",
        "own quantizations",
        refusals.fp8_blocks,
        offender="weight_scale_inv",
    ),
    Layout("gptq", "GPTQ", "own quantizations", refusals.gptq, offender="qweight"),
    Layout("awq", "AWQ", "own quantizations", refusals.awq, offender="qweight"),
    Layout(
        "int8_channels_compressed_tensors",
        "compressed-tensors 8-bit integers, one scale for each row",
        "own quantizations",
        refusals.compressed_tensors_channels,
        offender="weight_packed",
    ),
    Layout(
        "unknown_tensor",
        "published, with a tensor that nobody knows",
        "nobody",
        refusals.unknown_tensor,
        offender="self_attn.surprise",
    ),
    Layout(
        "stray_duplicate",
        "published, with one tensor a second time under another prefix",
        "merges gone wrong",
        refusals.stray_duplicate,
        offender="layers.0.self_attn.q_proj",
    ),
)

UNREPRESENTABLE = {layout.name: layout for layout in _REFUSED}
