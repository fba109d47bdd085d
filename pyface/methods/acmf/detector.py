"""ACMF as the forgery detector of the commands; see :mod:`pyface.methods.detection`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyface.errors import UserError
from pyface.methods.acmf.convert import load
from pyface.methods.acmf.losses import fake_share
from pyface.methods.acmf.model import ACMF, scaled_maps
from pyface.methods.detection import FaceScores

BATCH = 8  # larger maps are more than malloc keeps, and fresh memory costs more than a larger batch saves
MARGIN = 1.3  # of the authors' crops, as far as they are known


class AcmfDetector:
    """Stage 1 on plain frames; see :class:`pyface.methods.detection.Detector`.

    Frames are scored one by one, and a video by its frames' mean logits. Stage 2 is left out: it needs training data at
    hand. One frame is enough.
    """

    method = "acmf"
    least_frames = 1

    def __init__(self, network: ACMF, about: dict[str, str], device: str) -> None:
        self.network, self.device = network.to(device, memory_format=torch.channels_last).eval(), device
        self.image_size = network.image_size
        self.margin = float(about.get("margin", MARGIN))
        self.training = about.get("training", "")
        self.threshold = float(about["threshold"]) if "threshold" in about else None
        self.calibration = about.get("calibration", "")

    @torch.no_grad()
    def score(self, faces: Tensor, *, maps: bool = False) -> FaceScores:
        """Scores of one face's frames, Tensor[T, 3, S, S] in [0, 1]; ``attention`` is Grad-CAM scaled to [0, 1]."""
        side = self.image_size
        if faces.dim() != 4 or tuple(faces.shape[1:]) != (3, side, side):
            raise UserError(f"acmf: faces must be Tensor[T, 3, {side}, {side}], got {tuple(faces.shape)}")
        if len(faces) == 0:
            return FaceScores(np.zeros(0), float("nan"), np.zeros((0, side, side), np.float32) if maps else None)
        logits, attention = [], []
        for part in faces.split(BATCH):
            part = part.to(self.device)
            if maps:
                some, found = self.network.attend(part)
                attention.append(scaled_maps(found, side).cpu())
            else:
                some = self.network(part).float()
            logits.append(some.cpu())
        joined = torch.cat(logits)
        return FaceScores(
            fake=fake_share(joined).numpy(),
            video=float(fake_share(joined.double().mean(0))),
            attention=torch.cat(attention).numpy() if maps else None,
            state=(joined.double().sum(0), len(joined)),
        )

    def combine(self, parts: Sequence[FaceScores]) -> float:
        """The score of a video that was scored in parts: that of the mean logits of all its frames."""
        total = sum(part.state[0] for part in parts)
        return float(fake_share(total / sum(part.state[1] for part in parts)))


def load_detector(weights: str | os.PathLike, device: str = "cpu") -> AcmfDetector:
    """The detector with weights: a run's folder, its .safetensors, or a checkpoint of the authors.

    Raises:
        UserError: unreadable weights, or weights of another method.
    """
    return AcmfDetector(*load(weights), device)
