"""The objectives of student and teacher (sheet, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyface.methods.gazeforensics.model import BIN_DEGREES, BINS, FIRST_DEGREE, REAL, expected_degrees


def classification_loss(logits: Tensor, labels: Tensor, smooth: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Equation (5), mean over clips; equal to the code's binary cross-entropy of both softmax outputs.

    Args:
        logits: Tensor[B, 2] (fake, real).
        labels: Tensor[B], 1 = fake, 0 = real, as the data sets have it.
        smooth: (alpha, beta) of equation (7): targets move by alpha + beta U[0, 1), drawn per entry; off by default.
    """
    target = F.one_hot(labels.long(), 2).flip(1).float()  # the network's order is fake, real
    if any(smooth):
        # Entries move one by one, so they need not sum to 1: the two-sided form, as the code has it.
        target = (target - (smooth[0] + smooth[1] * torch.rand_like(target))).abs()
        # log p of one entry is log(1 - p) of the other.
        log = F.log_softmax(logits.float(), 1)
        return -(target * log + (1 - target) * log.flip(1)).mean()
    return F.cross_entropy(logits.float(), target)


def gaze_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Equation (2): mean squared difference over batch, frames and dimensions, in float32."""
    return F.mse_loss(student.float(), teacher.float())


def gaze_weight(start: float, end: float, gone: float) -> float:
    """mu of equation (6): ``start`` at the beginning, falling exponentially to ``start * end``.

    Args:
        start: mu_0, 4 as published.
        end: 0.01 as published.
        gone: e / E, share of the run's epochs that is over.
    """
    return start * end**gone


def angle_loss(logits: Tensor, degrees: Tensor, alpha: float = 1.0) -> Tensor:
    """Equation (8) for one angle: cross-entropy of its bin plus alpha times the squared error of the expectation.

    Args:
        logits: Tensor[N, 90].
        degrees: Tensor[N] in [-180, 180).
    """
    bins = ((degrees - FIRST_DEGREE) / BIN_DEGREES).floor().long().clamp(0, BINS - 1)
    error = expected_degrees(logits) - degrees.float()
    return F.cross_entropy(logits.float(), bins) + alpha * error.square().mean()


def fake_probability(logits: Tensor) -> Tensor:
    """Tensor[B, 2] (fake, real) -> Tensor[B], higher = more likely fake."""
    return 1 - logits.float().softmax(1)[:, REAL]
