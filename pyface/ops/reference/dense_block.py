"""The dense block of 3x3 convolutions, written to be read. Same signature and conventions as `pyface.ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_block(
    x: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    negative_slope: float = 0.01,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolutions that read x and all features before them; see `pyface.ops.dense_block`."""
    parts = [x] if isinstance(x, Tensor) else list(x)
    dtype = compute_dtype or weights[0].dtype
    batch = max(part.shape[0] for part in parts)
    features = torch.cat([part.to(dtype).expand(batch, -1, -1, -1) for part in parts], dim=1)
    with torch.autocast(features.device.type, enabled=False):  # `compute_dtype` alone decides
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            feature = F.leaky_relu(F.conv2d(features, weight.to(dtype), bias.to(dtype), padding=1), negative_slope)
            features = torch.cat([features, feature], dim=1)
        out = F.conv2d(features, weights[-1].to(dtype), biases[-1].to(dtype), padding=1)
    return out.to(parts[0].dtype)
