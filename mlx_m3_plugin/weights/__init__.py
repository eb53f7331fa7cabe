"""What a checkpoint is: its layout, recognised from key names and shapes, and the way to ours.

A layout is read into a plan, ``{our name: Tensor}``, where a :class:`Tensor` says how it is
made from the stored ones.  The plan is made from names, shapes and dtypes alone; applying it
to lazy arrays reads nothing.
"""

from .check import check_weights
from .layouts import lacks_indexers, map_weights, plan_layout

__all__ = ["check_weights", "lacks_indexers", "map_weights", "plan_layout"]
