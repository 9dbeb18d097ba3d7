"""Triton kernels for the operators of a block; each makes one pass over memory, forward and backward.

`choice` decides whether they are used. Only then are `heads`, `gated` and `residual` imported, because they import
triton. `dropping` is the dropout of `gated` and `residual`.
"""
