"""Checkpoints: their layouts, recognised from key names, shapes and dtypes, and the way to ours.

A layout is read into a plan, ``{our name: Tensor}``, where a :class:`Tensor` says from which stored
tensors it is made, and by which operations.  Applying a plan to lazy arrays reads nothing.
"""

from .check import check_values, check_weights, group_names, shorten
from .headers import Headers, StoredTensor, read_headers
from .layouts import fuse_experts, lacks_indexers, plan_draft, plan_layout
from .names import unused_in_words
from .quantization import infer_quantization, quantization_entry, quantized_in, with_quantization

__all__ = [
    "Headers",
    "StoredTensor",
    "check_values",
    "check_weights",
    "fuse_experts",
    "group_names",
    "infer_quantization",
    "lacks_indexers",
    "plan_draft",
    "plan_layout",
    "quantization_entry",
    "quantized_in",
    "read_headers",
    "shorten",
    "unused_in_words",
    "with_quantization",
]
