"""Pipeline parallelism: each process holds a contiguous run of layers."""

from typing import Any

import mlx.core as mx


class PipelineMixin:
    """mlx-lm's protocol of the same name, with any split.

    Rank 0 holds the last layers and the highest rank the first, as in mlx-lm.  Written out
    here because mlx-lm before 0.32 drops layers when they don't divide evenly, and mlx-vlm
    has no such class.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pipeline_rank = 0
        self.pipeline_size = 1
        self.start_idx = 0
        self.end_idx: int | None = None

    @property
    def pipeline_layers(self) -> Any:
        return self.layers[self.start_idx : self.end_idx]  # type: ignore[attr-defined]

    def pipeline(self, group: mx.distributed.Group, split: list[int] | None = None) -> None:
        """Keep this rank's layers.  ``split[rank]`` layers for each rank, evenly by default.

        Raises:
            ValueError: ``split`` does not give every rank at least one layer and all layers a rank.
        """
        layers = list(self.layers)  # type: ignore[has-type]
        n_layers = len(layers)
        rank, size = group.rank(), group.size()
        if split is None:
            each, more = divmod(n_layers, size)
            split = [each + (r < more) for r in range(size)]
        if len(split) != size or min(split) < 1 or sum(split) != n_layers:
            raise ValueError(f"cannot split {n_layers} layers over {size} processes as {split}")
        self.pipeline_rank, self.pipeline_size = rank, size
        self.start_idx = sum(split[rank + 1 :])
        self.end_idx = self.start_idx + split[rank]
        # Layer numbers stay what they are in the checkpoint.
        self.layers = [None] * self.start_idx + layers[self.start_idx : self.end_idx]
