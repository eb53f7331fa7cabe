"""Pipeline parallelism: each process holds a contiguous run of layers."""

import zlib
from collections.abc import Sequence

import mlx.core as mx


def split_layers(
    n_layers: int, group: mx.distributed.Group, split: Sequence[int] | None = None
) -> tuple[int, int]:
    """The first of this process's layers, and the one after its last.

    ``split[rank]`` layers for each rank, or evenly without it.  Rank 0 holds the last layers and
    the highest rank the first, as in mlx-lm.

    Raises:
        ValueError: the split does not give every rank at least one layer and all layers a rank, or
            the ranks were given different ones.
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
    """Ranks with different splits would run layers twice, or not at all."""
    if group.size() == 1:
        return
    mine = mx.array([zlib.crc32(repr(split).encode())], mx.uint32)
    everyone = mx.distributed.all_gather(mine, group=group, stream=mx.cpu)
    if (everyone != mine).any().item():
        raise ValueError(
            f"the processes have different pipeline splits (here {split}); "
            "give all of them the same one with mlx.launch --env MLX_M3_PLUGIN_PIPELINE_SPLIT=..."
        )
