"""What a forgery detector is to the commands that use one; ``methods/<method>/detector.py`` loads it."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from pyface.errors import UserError

DETECTORS = ("acmf", "gazeforensics")


@dataclass(frozen=True)
class FaceScores:
    """What a detector says of one face followed through one video, or of one picture.

    Attributes:
        fake: ndarray[T] float64 in [0, 1], the higher the more likely forged; NaN for a frame that was not scored.
        video: the score of the whole, in [0, 1], by the method's own rule (mean of logits, mean over clips); NaN if no
            frame was scored.
        attention: ndarray[T, h, w] float32 in [0, 1], where the network looked, or None if not asked for.
        gaze: ndarray[T, 2] float32, yaw and pitch in radians (to the viewer's right and up), or None if the method has
            no estimate of it or it was not asked for.
        state: what :meth:`Detector.combine` needs of these frames, if the method has it.
    """

    fake: np.ndarray
    video: float
    attention: np.ndarray | None = None
    gaze: np.ndarray | None = None
    state: Any = None


class Detector(Protocol):
    """A network with its weights, ready to score.

    A method that scores every frame by itself may have a further method, ``combine(parts: Sequence[FaceScores]) ->
    float``: the ``video`` score of all the frames that `score` was given part by part. Then a video is scored while it
    is still being read. Without it, all frames of a face are given at once, or long stretches of a long video.

    Attributes:
        method: the method's name.
        image_size: faces come as squares of this side, in pixels.
        margin: side of the face's square crop, in sides of the detected box.
        least_frames: a shorter video cannot be scored as it is; `score` says what it does then.
        training: what the weights were trained on, in words, as far as their file says it; "" if it does not.
        threshold: the calibrated score from which on a face is called forged, or None if the weights bring none.
        calibration: the data that the threshold comes from, in words; "" without a threshold.
    """

    method: str
    image_size: int
    margin: float
    least_frames: int
    training: str
    threshold: float | None
    calibration: str

    def score(self, faces: Tensor, *, maps: bool = False) -> FaceScores:
        """Scores of one face's frames in order.

        Args:
            faces: Tensor[T, 3, S, S] float32 RGB in [0, 1], S = image_size.
            maps: also `attention`, and `gaze` where the method has it.

        Raises:
            UserError: too few frames for this method.
        """
        ...


def load_detector(method: str, weights: str | os.PathLike, device: str = "cpu") -> Detector:
    """A detector with weights: a run's folder, its .safetensors, or a checkpoint of the authors.

    Raises:
        UserError: unknown method, unreadable weights, or weights of another method (the message says whose they are).
    """
    if method not in DETECTORS:
        raise UserError(f"{method!r} detects no forgeries; the methods that do are {', '.join(DETECTORS)}")
    return importlib.import_module(f"pyface.methods.{method}.detector").load_detector(weights, device)
