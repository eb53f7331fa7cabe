"""``mlx-m3 evaluate``: how good a checkpoint is, with one layer of it in memory at a time."""

from .command import evaluate
from .metrics import Evaluation

__all__ = ["Evaluation", "evaluate"]
