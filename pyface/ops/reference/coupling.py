"""Affine coupling and the Haar wavelet, written to be read. Same signatures and conventions as `pyface.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

FREIA_ATAN = 0.636  # FrEIA's literal for 2/pi, kept for parity with models trained there


def clamped_log_scale(log_scale: Tensor, clamp: float, clamp_activation: str) -> Tensor:
    """l(s): the log-scale that is really applied, bounded by `clamp` unless the activation is "none"."""
    if clamp_activation == "sigmoid":  # = 2 clamp (sigmoid(s) - 1/2), without the cancellation near s = 0
        return clamp * torch.tanh(log_scale / 2)
    if clamp_activation == "tanh":
        return clamp * torch.tanh(log_scale)
    if clamp_activation == "atan":
        return FREIA_ATAN * clamp * torch.atan(log_scale)
    return log_scale


def log_scale_slopes(log_scale: Tensor, clamp: float, clamp_activation: str) -> tuple[Tensor, Tensor]:
    """First and second derivative of l(s)."""
    log_gain = clamped_log_scale(log_scale, clamp, clamp_activation)
    if clamp_activation in ("sigmoid", "tanh"):
        k = 1 if clamp_activation == "sigmoid" else 2
        q = torch.exp(-k * log_scale.abs())
        first = 2 * k * clamp * q / (1 + q) ** 2  # = (clamp^2 - l^2) k / (2 clamp), without its cancellation
        return first, -k * torch.tanh(k * log_scale / 2) * first
    if clamp_activation == "atan":
        first = FREIA_ATAN * clamp / (1 + log_scale**2)
        return first, -2 * log_scale * first / (1 + log_scale**2)
    return 1 + 0 * log_gain, 0 * log_gain


def affine_coupling(
    x: Tensor,
    log_scale: Tensor,
    shift: Tensor,
    *,
    clamp: float = 2.0,
    clamp_activation: str = "sigmoid",
    inverse: bool = False,
    return_log_det: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x exp(l(s)) + t, or its inverse (x - t) exp(-l(s)); see `pyface.ops.affine_coupling`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    log_gain = clamped_log_scale(log_scale.to(wide), clamp, clamp_activation)
    if inverse:
        y, log_gain = (x.to(wide) - shift.to(wide)) * torch.exp(-log_gain), -log_gain
    else:
        y = x.to(wide) * torch.exp(log_gain) + shift.to(wide)
    y = y.to(x.dtype)
    return (y, log_gain.flatten(1).sum(1) if log_gain.dim() > 1 else log_gain) if return_log_det else y


def haar_dwt2d(x: Tensor) -> Tensor:
    """Orthonormal Haar transform of Tensor[B, C, H, W] into Tensor[B, 4C, H/2, W/2], sub-band major; see
    `pyface.ops.haar_dwt2d`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x[..., 0::2, 0::2].to(wide), x[..., 0::2, 1::2].to(wide)
    c, d = x[..., 1::2, 0::2].to(wide), x[..., 1::2, 1::2].to(wide)
    bands = [a + b + c + d, -a + b - c + d, -a - b + c + d, a - b - c + d]
    return (torch.cat(bands, dim=1) / 2).to(x.dtype)


def haar_idwt2d(bands: Tensor) -> Tensor:
    """Inverse (and transpose) of `haar_dwt2d`: Tensor[B, 4C, h, w] to Tensor[B, C, 2h, 2w]."""
    ll, hl, lh, hh = bands.to(torch.promote_types(bands.dtype, torch.float32)).chunk(4, dim=1)
    top = torch.stack([ll - hl - lh + hh, ll + hl - lh - hh], dim=-1).flatten(-2)
    bottom = torch.stack([ll - hl + lh - hh, ll + hl + lh + hh], dim=-1).flatten(-2)
    return (torch.stack([top, bottom], dim=-2).flatten(-3, -2) / 2).to(bands.dtype)
