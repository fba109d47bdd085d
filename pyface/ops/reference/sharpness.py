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


def _not_finite(tensors: Sequence[Tensor] | None) -> list[Tensor]:
    return [(~t.isfinite()).any() for t in tensors or ()]


def _rows(
    xs: Sequence[Tensor] | None, ys: Sequence[Tensor], weights: Sequence[Tensor] | None, eta: float
) -> Tensor:
    """Tensor[T + 1, 3] float64: sums of x², y², xy of each tensor and of all."""
    rows = []
    for p, y in enumerate(ys):
        y64 = y.double()
        x64 = None if xs is None else xs[p].double()
        if weights is not None:
            y64 = y64 * (weights[p].double().abs() + eta)
        b = (y64 * y64).sum()
        zero = torch.zeros_like(b)
        rows.append(torch.stack([zero, b, zero] if x64 is None else [(x64 * x64).sum(), b, (x64 * y64).sum()]))
    table = torch.stack(rows)
    return torch.cat([table, table.sum(0, keepdim=True)])


def sums(
    xs: Sequence[Tensor] | None, ys: Sequence[Tensor], weights: Sequence[Tensor] | None, eta: float
) -> tuple[Tensor, Tensor]:
    """Tensor[T + 1, 3] float64: sums of x², y², xy of each tensor and of all; Tensor[2] float32: x, y not finite.

    With weights, y times |w| + eta is what must be finite.
    """
    flags = [torch.stack(_not_finite(t)).any() if t else None for t in (xs, [*ys, *(weights or ())])]
    flags[0] = torch.zeros_like(flags[1]) if flags[0] is None else flags[0]
    return _rows(xs, ys, weights, eta), torch.stack(flags).float()


def moved(
    weights: Sequence[Tensor],
    ys: Sequence[Tensor],
    b: Tensor,
    moves: Tensor,
    rho: Sequence[float | Tensor],
    eps: float,
    shrink: float | Tensor,
    eta: float | None,
) -> list[Tensor]:
    """w + (rho / (sqrt(b) + eps) - shrink) y where `moves`, else w; with eta, y times (|w| + eta)²."""
    over_norm = 1 / (torch.where(moves, b, 1.0).sqrt() + eps)
    result = []
    for w, y, r in zip(weights, ys, rho, strict=True):
        wide = _wide(w)
        e = _wide(y) * (r * over_norm - shrink).to(wide.dtype)
        if eta is not None:
            e = e * _stretch(w, eta).square()
        result.append(torch.where(moves, (wide + e).to(w.dtype), w))
    return result


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
    """Saves the weights and moves them, where b > 0 and all is finite."""
    b = sums[-1, 1]
    found = moved(weights, ys, b, (nonfinite[1] == 0) & (b > 0), rho, eps, shrink, eta)
    for w, kept, new, r in zip(weights, saved, found, rho, strict=True):
        kept.copy_(w)
        if r or shrink:
            w.copy_(new)


def coefficients(sums: Tensor, rule: str, p0: float, p1: float, per_tensor: bool) -> tuple[Tensor, Tensor]:
    """u and v of G = u x + v y, Tensor[T] float64 each. No case divides by 0, taken or not: autograd sees them all."""
    rows = sums[:-1] if per_tensor else sums[-1:].expand(len(sums) - 1, 3)
    a, b, k = rows.unbind(1)
    if rule == "given":
        return a, b
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    if rule == "second":
        return one, zero
    if rule == "mix":
        return one * p0, one * (1 - p0)
    undefined = (a == 0) | (b == 0)
    a, b = torch.where(undefined, one, a), torch.where(undefined, one, b)
    if rule == "gsam":
        u, v = 1 + p0 * k / a, -p0 * one
    elif rule == "gsam_first":
        u, v = p0 * one, 1 - p0 * k / b
    elif rule == "surgery":
        u, v = one, torch.where(k < 0, -k / b, zero)
    else:
        c, z = k / (a.sqrt() * b.sqrt()), a + 2 * k + b
        opposed = (c <= p0) | (z <= 1e-14 * (a + b))
        s = (a + k) / torch.where(opposed, one, z)
        u = torch.where(c >= p1, one, torch.where(opposed, zero, s))
        v = torch.where(c >= p1, zero, torch.where(opposed, one, s))
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


# ---- out of place, for autograd -------------------------------------------------------------------------------------
#
# What is not finite is replaced before anything is computed of it, not only left out of the result: the zero that
# flows back to it would become NaN.


def perturbed(
    weights: Sequence[Tensor],
    ys: Sequence[Tensor],
    rho: Sequence[float | Tensor],
    eps: float,
    shrink: float | Tensor,
    eta: float | None,
) -> list[Tensor]:
    """The weights as :func:`perturb_` leaves them."""
    adaptive = eta is not None
    finite = ~torch.stack(_not_finite([*ys, *(weights if adaptive else ())])).any()
    ys = [torch.where(finite, y, 0.0) for y in ys]
    clean = [torch.where(finite, w, 0.0) for w in weights] if adaptive else weights
    b = _rows(None, ys, clean if adaptive else None, eta or 0.0)[-1, 1]
    found = moved(clean, ys, b, finite & (b > 0), rho, eps, shrink, eta)
    return [torch.where(finite, new, w) for w, new in zip(weights, found, strict=True)] if adaptive else found


def combination(
    xs: Sequence[Tensor], ys: Sequence[Tensor], rule: str, p0: float | Tensor, p1: float, per_tensor: bool
) -> list[Tensor]:
    """G of a rule by its own sums, in the types of xs; x where anything is not finite."""
    finite = ~torch.stack(_not_finite([*xs, *ys])).any()
    clean_xs, clean_ys = ([torch.where(finite, t, 0.0) for t in tensors] for tensors in (xs, ys))
    u, v = coefficients(_rows(clean_xs, clean_ys, None, 0.0), rule, p0, p1, per_tensor)
    result = []
    for p, (x, clean_x, clean_y) in enumerate(zip(xs, clean_xs, clean_ys, strict=True)):
        clean_x, clean_y = _wide(clean_x), _wide(clean_y)
        g = clean_x * u[p].to(clean_x.dtype) + clean_y * v[p].to(clean_x.dtype)
        result.append(torch.where(finite, g.to(x.dtype), x))
    return result
