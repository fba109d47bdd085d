"""Optimisers that look at the gradient in a second place: sharpness-aware training around any base optimiser."""

from pyface.optim.sharpness import (
    ASAM,
    GSAM,
    SAGM,
    SAM,
    FriendlySAM,
    GradientConstrainedSAM,
    frozen_statistics,
)

__all__ = ["ASAM", "GSAM", "SAGM", "SAM", "FriendlySAM", "GradientConstrainedSAM", "frozen_statistics"]
