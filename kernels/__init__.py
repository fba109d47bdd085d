"""Triton kernels, one module per core; the op table (`pyface.ops`) loads one when its path is first chosen."""
