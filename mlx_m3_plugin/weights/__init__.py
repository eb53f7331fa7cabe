"""What a checkpoint is: its layout, recognised from key names and shapes, and the way to ours.

A layout is read into a plan, ``{our name: Tensor}``, where a :class:`Tensor` says how it is
made from the stored ones.  The plan is made from names, shapes and dtypes alone; applying it
to lazy arrays reads nothing.
"""

from .check import check_values, check_weights, group_names
from .headers import Headers, StoredTensor, read_headers
from .layouts import fuse_experts, lacks_indexers, map_weights, plan_layout
from .quantization import infer_quantization, with_quantization

__all__ = [
    "Headers",
    "StoredTensor",
    "check_values",
    "check_weights",
    "fuse_experts",
    "group_names",
    "infer_quantization",
    "lacks_indexers",
    "map_weights",
    "plan_layout",
    "read_headers",
    "with_quantization",
]
