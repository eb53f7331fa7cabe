"""Checkpoints: their layouts, recognised from key names, shapes and dtypes, and the way to ours.

A layout is read into a plan, ``{our name: Tensor}``, where a :class:`Tensor` says from which stored
tensors it is made, and by which operations.  Applying a plan to lazy arrays reads nothing.
"""
