"""Objectives and scores of ACMF."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def flooded(loss: Tensor, level: float) -> Tensor:
    """``|loss - b| + b``: below b the loss is climbed again (Ishida et al., 2020); eq. (15) of the project's notes."""
    return (loss - level).abs() + level


def consistency_loss(test: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference of two mean attention maps Tensor[S, S], a scalar."""
    return F.mse_loss(test, reference)


def fake_share(logits: Tensor) -> Tensor:
    """The authors' score, of logits Tensor[..., 2] (real, fake): sigmoid(z1) / (sigmoid(z0) + sigmoid(z1)).

    It is no softmax. Of a video it is taken of the frames' mean logits. Returns Tensor[...] in [0, 1], higher = fake.
    """
    real, fake = F.logsigmoid(logits.double()).unbind(-1)
    return (fake - real).sigmoid()  # without a quotient of numbers that may both round to 0
