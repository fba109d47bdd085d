"""Attention over keys and extra rows in plain PyTorch: the definition, its gradients and its tangent.

Everywhere: query Tensor[B, H, L, E], key Tensor[B, H, S, E], value Tensor[B, H, S, Ev]; extra_key Tensor[1 or B, H, R,
E] and extra_value Tensor[1 or B, H, R, Ev] or None (R = 0); extra_bias Tensor[H, R] or None (0); prior Tensor[B, H,
L, 4] or None. `options` are (is_causal, scale, grid_width, smooth). Computed in the type of the tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Extra rows and keys as one list, and which query sees which of them (None: all)."""

    keys: Tensor
    values: Tensor
    extras: int
    visible: Tensor | None


def listed(query, key, value, extra_key, extra_value, is_causal: bool) -> Rows:
    if extra_key is None:
        extra_key, extra_value = key[:, :, :0], value[:, :, :0]
    batch, (length, size), extras = len(key), (query.shape[-2], key.shape[-2]), extra_key.shape[-2]
    keys, values = (
        torch.cat([extra.expand(batch, -1, -1, -1), own], dim=2)
        for extra, own in ((extra_key, key), (extra_value, value))
    )
    visible = None
    if is_causal:  # aligned at the lower right: the last query sees all keys, and every query the extra rows
        place = torch.arange(length, device=query.device).unsqueeze(1) + size - length
        visible = torch.arange(-extras, size, device=query.device) <= place.clamp(min=-1)
    return Rows(keys, values, extras, visible)


def log_prior(prior: Tensor, size: int, grid_width: int, smooth: float) -> Tensor:
    """g Tensor[B, H, L, S] of the spatial prior (SeqDeepFake's SECA, `-s (c - x)^2 / smooth` summed over both axes)."""
    centre, sharpness = prior[..., :2].unsqueeze(-2), prior[..., 2:].unsqueeze(-2)
    return -(sharpness * (centre - grid(size, grid_width, prior)) ** 2).sum(-1) / smooth


def grid(size: int, width: int, like: Tensor) -> Tensor:
    """Tensor[S, 2]: x and y of every key."""
    place = torch.arange(size, device=like.device)
    return torch.stack([place % width, place // width], dim=1).to(like.dtype)


def scores(query, rows: Rows, extra_bias, prior, scale: float, grid_width: int, smooth: float) -> Tensor:
    """Tensor[B, H, L, R + S], minus infinity where a query does not see a row."""
    found = scale * (query @ rows.keys.transpose(-1, -2))
    extras, size = rows.extras, rows.keys.shape[-2] - rows.extras
    if extra_bias is not None:
        found = found + torch.nn.functional.pad(extra_bias, (0, size)).unsqueeze(-2)
    if prior is not None:
        found = found + torch.nn.functional.pad(log_prior(prior, size, grid_width, smooth), (extras, 0))
    return found if rows.visible is None else found.masked_fill(~rows.visible, -torch.inf)


def weights(found: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and its log-sum-exp Tensor[B, H, L]; where nothing is seen, weights of 0 and minus infinity."""
    if found.shape[-1] == 0:
        return found, found.new_full(found.shape[:-1], -torch.inf)
    most = found.detach().amax(-1, keepdim=True)
    most = torch.where(most == -torch.inf, 0, most)
    powers = torch.exp(found - most)
    total = powers.sum(-1, keepdim=True)
    empty = total == 0
    lse = torch.where(empty, -torch.inf, most + torch.log(torch.where(empty, 1, total)))
    return powers / torch.where(empty, 1, total), lse.squeeze(-1)


def weighed(p: Tensor, rows: Tensor, visible: Tensor | None) -> Tensor:
    """p @ rows, where a row that is not finite reaches only those who see it: 0 x NaN is 0 behind a mask."""
    if visible is None:
        return p @ rows
    bad = ~rows.isfinite()
    found = p @ rows.masked_fill(bad, 0)
    return found.masked_fill(visible.to(p.dtype) @ bad.to(p.dtype) > 0, torch.nan)


def attention(query, key, value, extra_key, extra_value, extra_bias, prior, options) -> tuple[Tensor, Tensor]:
    """(out Tensor[B, H, L, Ev], lse Tensor[B, H, L])."""
    is_causal, scale, grid_width, smooth = options
    rows = listed(query, key, value, extra_key, extra_value, is_causal)
    p, lse = weights(scores(query, rows, extra_bias, prior, scale, grid_width, smooth))
    return weighed(p, rows.values, rows.visible), lse


def _seen(x: Tensor, visible: Tensor | None) -> Tensor:
    return x if visible is None else x.masked_fill(~visible, 0)


def _prior_step(step: Tensor, prior: Tensor, grid_width: int, smooth: float) -> Tensor:
    """The prior's gradient, by that of the scores of the keys: its moments about the centre."""
    away = prior[..., :2].unsqueeze(-2) - grid(step.shape[-1], grid_width, prior)  # [B, H, L, S, 2]
    step = step.unsqueeze(-1)
    return torch.cat([-2 * prior[..., 2:] * (step * away).sum(-2), -(step * away**2).sum(-2)], dim=-1) / smooth


def backward(
    grad, grad_lse, query, key, value, extra_key, extra_value, extra_bias, prior, options
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, extra_key, extra_value, extra_bias and prior; None for what is None. In plain,
    differentiable operations: their own derivative is the second order."""
    is_causal, scale, grid_width, smooth = options
    rows = listed(query, key, value, extra_key, extra_value, is_causal)
    extras, visible = rows.extras, rows.visible
    p, _ = weights(scores(query, rows, extra_bias, prior, scale, grid_width, smooth))
    out = weighed(p, rows.values, visible)
    delta = (grad * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.unsqueeze(-1)
    step = _seen(p * (grad @ rows.values.transpose(-1, -2) - delta), visible)
    turned = None if visible is None else visible.transpose(-1, -2)
    grad_query = scale * weighed(step, rows.keys, visible)
    grad_keys = scale * weighed(step.transpose(-1, -2), query, turned)
    grad_values = weighed(p.transpose(-1, -2), grad, turned)
    grad_extras = [None, None]
    if extra_key is not None:
        found = (grad_keys[:, :, :extras], grad_values[:, :, :extras])
        grad_extras = [
            g.sum(0, keepdim=True) if len(extra) == 1 else g for g, extra in zip(found, (extra_key, extra_value))
        ]
    return (
        grad_query,
        grad_keys[:, :, extras:],
        grad_values[:, :, extras:],
        *grad_extras,
        None if extra_bias is None else step[..., :extras].sum((0, 2)),
        None if prior is None else _prior_step(step[..., extras:], prior, grid_width, smooth),
    )


def tangent(tensors, tangents, options) -> tuple[Tensor, Tensor]:
    """Forward mode: the tangents of out and lse for those (None: zero) of the seven tensors."""
    query, key, value, extra_key, extra_value, extra_bias, prior = tensors
    is_causal, scale, grid_width, smooth = options
    d_query, d_key, d_value, d_extra_key, d_extra_value = (
        torch.zeros_like(t) if d is None and t is not None else d for t, d in zip(tensors[:5], tangents[:5])
    )
    d_bias, d_prior = tangents[5:]
    rows = listed(query, key, value, extra_key, extra_value, is_causal)
    d_rows = listed(d_query, d_key, d_value, d_extra_key, d_extra_value, is_causal)
    extras, size, visible = rows.extras, key.shape[-2], rows.visible
    p, _ = weights(scores(query, rows, extra_bias, prior, scale, grid_width, smooth))
    step = scale * (d_query @ rows.keys.transpose(-1, -2) + query @ d_rows.keys.transpose(-1, -2))
    if d_bias is not None:
        step = step + torch.nn.functional.pad(d_bias, (0, size)).unsqueeze(-2)
    if prior is not None and d_prior is not None:
        away = prior[..., :2].unsqueeze(-2) - grid(size, grid_width, prior)
        moved = 2 * prior[..., 2:].unsqueeze(-2) * away * d_prior[..., :2].unsqueeze(-2)
        moved = -(moved + d_prior[..., 2:].unsqueeze(-2) * away**2).sum(-1) / smooth
        step = step + torch.nn.functional.pad(moved, (extras, 0))
    step = _seen(p * step, visible)
    d_lse = step.sum(-1)
    d_out = weighed(step - p * d_lse.unsqueeze(-1), rows.values, visible) + weighed(p, d_rows.values, visible)
    return d_out, d_lse
