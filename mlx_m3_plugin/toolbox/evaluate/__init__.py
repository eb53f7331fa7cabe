"""``mlx-m3 evaluate``: how good a checkpoint is, without the memory to load it."""

from ..texts import Texts, built_in_text, cut, read_texts
from .evaluation import Evaluation, evaluate

__all__ = ["Evaluation", "Texts", "built_in_text", "cut", "evaluate", "read_texts"]
