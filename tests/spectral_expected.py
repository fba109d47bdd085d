"""Calls of the spectral core and what they must give, from the reference in float64. For the tests of GPU paths."""

from __future__ import annotations

import torch
from torch import Tensor

from pyface.ops.reference import spectral as reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]
TOLERANCE = {F32: 3e-6, F64: 2e-14, BF16: 2**-8, F16: 2**-11}  # of the largest element
# shape, half width, symmetric; sizes around and off the tiles of 32 rows and 64 columns
CASES = [
    ((2, 3, 16, 17), (2, 3), False),
    ((3, 33, 65), (5, 5), False),
    ((2, 20, 24), (4, 1), True),
    ((1, 7, 8), (5, 2), False),  # all rows' frequencies: one axis with an edge
    ((2, 1, 9), (0, 3), True),
    ((2, 6, 1), (2, 2), False),
    ((1, 41, 70), (20, 9), False),
    ((1, 2, 2), (1, 1), False),
]


def keeps(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Masks of bytes for all planes, and of numbers for each."""
    wide = F64 if dtype == F64 else F32
    return [torch.rand(shape[-2:]) > 0.4, torch.rand(shape, dtype=wide), torch.rand(shape[-1:], dtype=wide)]


def off_by(found: Tensor, exact: Tensor) -> float:
    """Error relative to the largest element."""
    return ((found.cpu().double() - exact).abs().max() / exact.abs().max().clamp_min(1e-3)).item()


def check_core(core, case, dtype: torch.dtype, device: str = "cpu", layout: torch.memory_format | None = None) -> None:
    """The three tasks of a core against float64; core has the methods of a path of `pyface.ops.spectral`."""
    shape, half_width, symmetric = case
    x, grad = (torch.randn(shape).to(dtype).to(device) for _ in range(2))
    if layout is not None:
        x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    wide, allowed = x.cpu().double(), TOLERANCE[dtype]
    exact = reference.high_pass(wide, half_width, symmetric)
    found = core.high_pass(x, half_width, symmetric)
    assert found.dtype == dtype
    scale = wide.abs().max()
    assert (found.cpu().double() - exact).abs().max() <= allowed * scale
    for keep in keeps(shape, dtype):
        keep = keep.to(device)
        exact, sign = reference.mask_high_frequencies(wide, keep.cpu(), half_width, symmetric)
        for with_sign in (False, True):
            found, signs = core.mask_high_frequencies(x, keep, half_width, symmetric, with_sign)
            assert off_by(found, exact) <= allowed
        unsure = reference.high_pass(wide, half_width, symmetric).abs() < 1e-5 * scale
        assert torch.equal(signs.cpu()[~unsure], sign[~unsure])
        exact = reference.mask_high_frequencies_backward(
            grad.cpu().double(), signs.cpu(), keep.cpu(), half_width, symmetric
        )
        found = core.mask_high_frequencies_backward(grad, signs, keep, half_width, symmetric)
        assert off_by(found, exact) <= 2 * allowed
