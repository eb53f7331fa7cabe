"""Pipeline parallelism: each process holds a contiguous run of layers."""

import zlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .config import TextConfig


def split_layers(
    n_layers: int, group: mx.distributed.Group, split: Sequence[int] | None = None
) -> tuple[int, int]:
    """The first of this process's layers, and the one after its last.

    ``split[rank]`` layers for each rank, or evenly without it.  Rank 0 holds the last layers and
    the highest rank the first, as in mlx-lm.

    Raises:
        ValueError: the split does not give every rank at least one layer and all layers a rank, or
            the ranks have been told different ones.
    """
    rank, size = group.rank(), group.size()
    split = list(split or _even(n_layers, size))
    _agree(split, group)
    if len(split) != size or min(split) < 1 or sum(split) != n_layers:
        raise ValueError(f"cannot split {n_layers} layers over {size} processes as {split}")
    start = sum(split[rank + 1 :])
    return start, start + split[rank]


def _even(n_layers: int, size: int) -> list[int]:
    each, more = divmod(n_layers, size)
    return [each + (rank < more) for rank in range(size)]


def _agree(split: list[int], group: mx.distributed.Group) -> None:
    """Layers would be run twice or not at all by ranks that have been told different splits."""
    if group.size() == 1:
        return
    mine = mx.array([zlib.crc32(repr(split).encode())], mx.uint32)
    everyone = mx.distributed.all_gather(mine, group=group, stream=mx.cpu)
    if (everyone != mine).any().item():
        raise ValueError(
            f"the processes disagree about who runs which layers (here {split}); "
            "give all of them the same with mlx.launch --env MLX_M3_PLUGIN_PIPELINE_SPLIT=..."
        )


class PipelineMixin:
    """mlx-lm's protocol of the same name, with any split.

    Written out here because mlx-lm before 0.32 drops layers when they don't divide evenly, and
    mlx-vlm has no such class.
    """

    config: TextConfig

    def __init__(self) -> None:
        super().__init__()
        self.pipeline_rank = 0
        self.pipeline_size = 1
        self.start_idx = 0
        self.end_idx: int | None = None

    @property
    def pipeline_layers(self) -> Any:
        return self.layers[self.start_idx : self.end_idx]  # type: ignore[attr-defined]

    def pipeline(self, group: mx.distributed.Group, split: Sequence[int] | None = None) -> None:
        """Keep this rank's layers, by ``split`` or by the config's; see :func:`split_layers`."""
        layers = list(self.layers)  # type: ignore[has-type]
        self.start_idx, self.end_idx = split_layers(len(layers), group, split or self.config.pipeline_split)
        self.pipeline_rank, self.pipeline_size = group.rank(), group.size()
        # Layer numbers stay what they are in the checkpoint.
        self.layers = [None] * self.start_idx + layers[self.start_idx : self.end_idx]
