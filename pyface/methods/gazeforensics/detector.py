"""GazeForensics for :mod:`pyface.methods.detection`: clips scored, spread to frames, with attention and gaze."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyface.errors import UserError
from pyface.methods.detection import FaceScores
from pyface.methods.gazeforensics.clips import evaluation_clips
from pyface.methods.gazeforensics.convert import load
from pyface.methods.gazeforensics.losses import fake_probability
from pyface.methods.gazeforensics.model import FAKE, FRAMES, REAL, GazeForensics, prepared

BATCH = 64


class GazeDetector:
    """See :class:`pyface.methods.detection.Detector`.

    ``least_frames`` is 14, a clip: a shorter video is refused, because repeating frames would make up what the
    attention over frames compares. A video's clips are those it is tested on in the paper's code (section 5.3 of the
    method's doc page), long and short strides mixed; its score is their mean.
    """

    method = "gazeforensics"
    least_frames = FRAMES

    def __init__(self, network: GazeForensics, about: dict[str, Any], device: str = "cpu") -> None:
        self.network = network.eval().to(device)
        self.device = device
        self.image_size: int = about["image_size"]
        self.margin: float = about["margin"]
        self.crop: str = about["crop"]
        self.training: str = about.get("training", "")
        self.threshold: float | None = about.get("threshold")
        self.calibration: str = about.get("calibration", "")

    def score(self, faces: Tensor, *, maps: bool = False) -> FaceScores:
        """Scores of one face's frames in order.

        Args:
            faces: Tensor[T, 3, S, S] float32 RGB in [0, 1], S = image_size, T at least 14.
            maps: also ``attention``, the class activation map of the fake class of every frame that is in a clip (0
                for the others), and ``gaze``, if the weights carry the teacher's heads: those heads applied to the
                student's gaze part, NaN for frames in no clip.

        Returns:
            ``fake`` of a frame is the mean over the clips whose stretch it lies in, NaN at the ends that none covers.

        Raises:
            UserError: fewer than 14 frames.
        """
        count = len(faces)
        if count < FRAMES:
            raise UserError(
                f"gazeforensics compares {FRAMES} frames of a face, and there are {count}; give a longer video, or use "
                f"a method that scores single frames (--method acmf)"
            )
        clips = evaluation_clips(count)
        wanted = sorted({place for clip in clips for place in clip})
        where = {place: index for index, place in enumerate(wanted)}
        places = torch.tensor([[where[place] for place in clip] for clip in clips], device=self.device)
        z, seen = self._frames(faces, wanted, maps)
        with torch.no_grad():
            scores = fake_probability(self.network.classify(z[places])).double().cpu().numpy()
        fake = spread(clips, scores, count)
        attention = gaze = None
        if maps:
            attention = self._attention(z, seen, places, wanted, count)
            gaze = self._gaze(z, wanted, count)
        return FaceScores(fake, float(scores.mean()), attention, gaze)

    @torch.no_grad()
    def _frames(self, faces: Tensor, wanted: list[int], maps: bool) -> tuple[Tensor, list[Tensor]]:
        """z of these frames, and with ``maps`` the trunk's last feature maps and the images."""
        network, z, seen = self.network, [], []
        for start in range(0, len(wanted), BATCH):
            images = prepared(faces[wanted[start : start + BATCH]].to(self.device), self.image_size, self.crop)
            trunk = network.trunk
            if trunk is None:
                features = pooled = None
            else:
                features = trunk.forward_features(images)
                pooled = trunk.forward_head(features)
            z.append(network.project(pooled, images))
            if maps and features is not None:
                seen.append(features)
        return torch.cat(z), seen

    def _attention(
        self, z: Tensor, seen: list[Tensor], places: Tensor, wanted: list[int], count: int
    ) -> np.ndarray | None:
        """Grad-CAM of the fake logit over the real one, at the trunk's last feature map.

        The pooled feature is a mean over places, so the gradient at the map is the same everywhere, and no pass back
        through the trunk is needed.
        """
        if not seen:
            return None
        network = self.network
        features = torch.cat(seen)
        with torch.enable_grad():
            below = features.detach().requires_grad_()
            pooled = network.trunk.forward_head(below)
            gaze = z[:, : network.gaze].detach() if network.teacher is not None else None
            own = network.project(pooled, features, gaze)
            logits = network.classify(own[places])
            (slope,) = torch.autograd.grad((logits[:, FAKE] - logits[:, REAL]).sum(), below)
        with torch.no_grad():
            maps = (slope.mean((2, 3), keepdim=True) * features).sum(1).clamp(min=0).float()
            largest = maps.amax()
            maps = (maps / largest if largest > 0 else maps).cpu().numpy()
        out = np.zeros((count, *maps.shape[1:]), np.float32)
        out[wanted] = maps
        return out

    @torch.no_grad()
    def _gaze(self, z: Tensor, wanted: list[int], count: int) -> np.ndarray | None:
        angles = self.network.angles
        if angles is None or not bool(angles.known):
            return None
        pitch, yaw = angles.degrees(z[:, : self.network.gaze]).deg2rad().cpu().numpy().T
        out = np.full((count, 2), np.nan, np.float32)
        # The convention of Gaze360 has positive yaw to the picture's left, that of FaceScores to its right.
        out[wanted] = np.stack((-yaw, pitch), 1)
        return out


def spread(clips: list[list[int]], scores: np.ndarray, count: int) -> np.ndarray:
    """ndarray[count]: for every frame the mean over the clips whose stretch it lies in; NaN where there is none."""
    total, number = np.zeros(count), np.zeros(count)
    for clip, score in zip(clips, scores, strict=True):
        total[clip[0] : clip[-1] + 1] += score
        number[clip[0] : clip[-1] + 1] += 1
    return np.divide(total, number, out=np.full(count, np.nan), where=number > 0)


def load_detector(weights: str | os.PathLike, device: str = "cpu") -> GazeDetector:
    """A detector with the weights of a run (folder or ``.safetensors``) or of a released checkpoint.

    Raises:
        UserError: unreadable weights, or weights of another method.
    """
    network, about = load(weights)
    return GazeDetector(network, about, device)
