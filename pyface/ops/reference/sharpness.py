"""Sharpness-aware gradient work over tensor lists in plain PyTorch: the readable twin of core `sharpness`.

Nothing here waits for the device: a decision is a `torch.where` on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    """Where arithmetic happens: float64 for float64, float32 for all others."""
    return t if t.dtype == torch.float64 else t.float()


def _stretch(weight: Tensor, eta: float) -> Tensor:
    return _wide(weight).abs() + eta


def sums(
    xs: Sequence[Tensor] | None, ys: Sequence[Tensor], weights: Sequence[Tensor] | None, eta: float
) -> tuple[Tensor, Tensor]:
    """Tensor[T + 1, 3] float64: sums of x², y², xy of each tensor and of all; Tensor[2] float32: x, y not finite."""
    device = ys[0].device if ys else None
    rows, bad = [], [torch.zeros(2, device=device)]
    zero = torch.zeros((), dtype=torch.float64, device=device)
    for p, y in enumerate(ys):
        y64 = y.double()
        x64 = None if xs is None else xs[p].double()
        not_finite = [zero if t is None else (~t.isfinite()).any().double() for t in (x64, y64)]
        bad.append(torch.stack(not_finite).float())
        if weights is not None:
            y64 = y64 * (weights[p].double().abs() + eta)
        b = (y64 * y64).sum()
        rows.append(torch.stack([zero, b, zero] if x64 is None else [(x64 * x64).sum(), b, (x64 * y64).sum()]))
    table = torch.stack(rows) if rows else zero.new_zeros(0, 3)
    return torch.cat([table, table.sum(0, keepdim=True)]), torch.stack(bad).amax(0)


def perturb_(
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    ys: Sequence[Tensor],
    sums: Tensor,
    nonfinite: Tensor,
    rho: Sequence[float],
    eps: float,
    shrink: float,
    eta: float | None,
) -> None:
    """w += (rho / (sqrt(b) + eps) - shrink) y, where b > 0 and y is finite; with eta, y times (|w| + eta)²."""
    b = sums[-1, 1]
    moves = (nonfinite[1] == 0) & (b > 0)
    over_norm = 1 / (b.sqrt() + eps)
    for w, kept, y, r in zip(weights, saved, ys, rho, strict=True):
        kept.copy_(w)
        wide = _wide(w)
        e = _wide(y) * (r * over_norm - shrink).to(wide.dtype)
        if eta is not None:
            e = e * _stretch(w, eta).square()
        if r or shrink:
            w.copy_(torch.where(moves, (wide + e).to(w.dtype), w))


def coefficients(sums: Tensor, rule: str, p0: float, p1: float, per_tensor: bool) -> tuple[Tensor, Tensor]:
    """u and v of G = u x + v y, Tensor[T] float64 each."""
    rows = sums[:-1] if per_tensor else sums[-1:].expand(len(sums) - 1, 3)
    a, b, k = rows.unbind(1)
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    if rule == "second":
        return one, zero
    if rule == "mix":
        return one * p0, one * (1 - p0)
    if rule == "gsam":
        u, v = 1 + p0 * k / a, -p0 * one
    elif rule == "gsam_first":
        u, v = p0 * one, 1 - p0 * k / b
    elif rule == "surgery":
        u, v = one, torch.where(k < 0, -k / b, zero)
    else:
        c, z = k / (a.sqrt() * b.sqrt()), a + 2 * k + b
        s = (a + k) / z
        opposed = (c <= p0) | (z <= 1e-14 * (a + b))
        u = torch.where(c >= p1, one, torch.where(opposed, zero, s))
        v = torch.where(c >= p1, zero, torch.where(opposed, one, s))
    undefined = (a == 0) | (b == 0)
    return torch.where(undefined, one, u), torch.where(undefined, zero, v)


def combined(xs: Sequence[Tensor], ys: Sequence[Tensor], u: Tensor, v: Tensor) -> list[Tensor]:
    """G = u x + v y in the type of the arithmetic. A gradient with the coefficient 0 does not count, were it NaN."""
    result = []
    for p, (x, y) in enumerate(zip(xs, ys, strict=True)):
        x, y = _wide(x), _wide(y)
        first, second = u[p].to(x.dtype), v[p].to(x.dtype)
        mixed = x * first + y * second
        result.append(torch.where((u[p] == 1) & (v[p] == 0), x, torch.where((u[p] == 0) & (v[p] == 1), y, mixed)))
    return result


def step_(
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    skip: Tensor,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """w = saved, then a step of SGD with `gradients`; only w = saved where `skip`."""
    for p, (w, kept, g) in enumerate(zip(weights, saved, gradients, strict=True)):
        old = _wide(kept)
        g = (-g if maximize else g) + old * weight_decay
        if momenta:
            m = momenta[p]
            new = g if first else _wide(m) * momentum + g * (1 - dampening)
            m.copy_(torch.where(skip, m, new.to(m.dtype)))
            g = g + new * momentum if nesterov else new
        w.copy_(torch.where(skip, kept, (old - g * lr).to(w.dtype)))
