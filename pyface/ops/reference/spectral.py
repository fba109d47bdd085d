"""Filters in the plane of frequencies, written to be read: `torch.fft` in float32 at least, any sizes.

Signatures and conventions are those of `pyface.ops`; half_width is a pair (y, x) here.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[int, int]


def in_block(size: int, half_width: int, symmetric: bool) -> Tensor:
    """bool[size]: which residues k of one axis belong to the block -d..d-1, or -d..d, clipped to what there is.

    Clipped, not wrapped: the slice `c - d : c + d` of a shifted spectrum starts from the end where d > c.
    """
    k = torch.fft.fftfreq(size, 1 / size).round()  # 0, 1, ..., -2, -1
    return (k >= -half_width) & (k <= half_width - (not symmetric))


def low_gain(size: Pair, half_width: Pair, symmetric: bool) -> Tensor:
    """float64[H, W]: what the real part of the low-pass keeps of each frequency, 0, 1/2 or 1.

    The real part of a real image filtered by B is that image filtered by (B(k) + B(-k)) / 2. In the asymmetric block
    the edge -d has no mirror image, and so a weight of 1/2 on both sides.
    """
    rows, columns = (in_block(n, d, symmetric).double() for n, d in zip(size, half_width, strict=True))
    block = rows[:, None] * columns
    return (block + _mirrored(block)) / 2


def _mirrored(spectrum: Tensor) -> Tensor:
    """The values at -k, both axes."""
    return spectrum.flip((-2, -1)).roll((1, 1), (-2, -1))


def high_pass(x: Tensor, half_width: Pair, symmetric: bool) -> Tensor:
    """The real part of x without its block of low frequencies."""
    if not x.numel():
        return x.clone(memory_format=torch.contiguous_format)
    height, width = x.shape[-2:]
    gain = (1 - low_gain((height, width), half_width, symmetric))[:, : width // 2 + 1]
    return _filter(_wide(x), gain.to(x.device)).to(x.dtype)


def high_pass_modulus(x: Tensor, half_width: Pair, symmetric: bool) -> Tensor:
    """The modulus of x without its block, not the real part: what ACMF's NumPy code computes."""
    height, width = x.shape[-2:]
    rows, columns = (in_block(n, d, symmetric).to(x.device) for n, d in zip((height, width), half_width, strict=True))
    spectrum = torch.fft.fft2(_wide(x))
    return torch.fft.ifft2(spectrum.masked_fill(rows[:, None] & columns, 0)).abs().to(x.dtype)


def mask_high_frequencies(x: Tensor, keep: Tensor, half_width: Pair, symmetric: bool) -> tuple[Tensor, Tensor]:
    """x - (1 - keep) |high_pass(x)|, and the sign of high_pass(x): -1, 0 or 1, int8 (0 for NaN)."""
    wide = _wide(x)
    high = high_pass(wide, half_width, symmetric)
    return (wide - dropped(keep, wide) * high.abs()).to(x.dtype), high.sign().nan_to_num(0).to(torch.int8)


def mask_high_frequencies_backward(
    grad: Tensor, sign: Tensor, keep: Tensor, half_width: Pair, symmetric: bool
) -> Tensor:
    """The gradient of x: grad - high_pass((1 - keep) sign grad)."""
    wide = _wide(grad)
    return (wide - high_pass(dropped(keep, wide) * sign * wide, half_width, symmetric)).to(grad.dtype)


def dropped(keep: Tensor, like: Tensor) -> Tensor:
    """1 - keep in the type of `like`."""
    return 1 - keep.to(like.dtype)


def symmetrized(gain: Tensor, width: int) -> Tensor:
    """A gain of the half spectrum [..., H, W//2 + 1] with equal values at (k_y, k_x) and (-k_y, k_x) where k_x = -k_x.

    A real image has conjugate values there, so their mean is what a real result can follow. Libraries differ in what
    they do with other gains; with this one the spectrum stays that of a real image.
    """
    own_mirrors = [0, width // 2] if width % 2 == 0 else [0]
    columns = gain[..., own_mirrors]
    gain = gain.clone()
    gain[..., own_mirrors] = (columns + columns.flip(-2).roll(1, -2)) / 2
    return gain


def spectral_filter(x: Tensor, gain: Tensor) -> Tensor:
    """irfft2(gain * rfft2(x)) with the gain symmetrised."""
    wide = _wide(x)
    return _filter(wide, symmetrized(gain.to(wide.dtype), x.shape[-1])).to(x.dtype)


def cross_spectrum(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the gain at every plane, [..., H, W//2 + 1].

    Re(conj(rfft2(x)) rfft2(grad)) / (H W), twice where the half spectrum stands for two frequencies.
    """
    height, width = x.shape[-2:]
    wide = _wide(x)
    a, b = torch.fft.rfft2(wide), torch.fft.rfft2(grad.to(wide.dtype))
    product = (a.real * b.real + a.imag * b.imag) / (height * width)  # conj() is lazy, and lost inside an op
    product[..., 1 : (width + 1) // 2] *= 2
    return symmetrized(product, width)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _filter(x: Tensor, gain: Tensor) -> Tensor:
    # s: without it an odd width comes back one short
    return torch.fft.irfft2(torch.fft.rfft2(x) * gain.to(x.dtype), s=x.shape[-2:])
