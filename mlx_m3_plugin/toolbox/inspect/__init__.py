"""``mlx-m3 inspect``: what a checkpoint is, what is wrong with it, and how to run it.

From headers and settings alone: no tensor is read, so a checkpoint of 850 GB takes about a second.
"""

from .inspection import Inspection, inspect

__all__ = ["Inspection", "inspect"]
