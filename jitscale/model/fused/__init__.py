"""Operators of a block in one pass over memory each, forward and backward, as Triton kernels for GPUs.

`choice` decides whether they are used; only then `heads`, `gated` and `residual` are imported, since they import
triton. `dropping` is the dropout of the latter two.
"""
