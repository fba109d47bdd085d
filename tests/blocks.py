"""Videos whose faces are coloured blocks, a detector that sees these, and a method that scores their brightness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pyface.errors import UserError
from pyface.methods.detection import FaceScores

HEIGHT, WIDTH = 96, 128
COLOURS = {"red": (0, 2), "blue": (2, 0)}


def frame(*blocks, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Blocks ("red" or "blue", left, top, side, strength 0 to 1) on grey."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    for colour, left, top, side, strength in blocks:
        own, other = COLOURS[colour]
        pixels[top : top + side, left : left + side, own] = 200
        pixels[top : top + side, left : left + side, other] = 20
        pixels[top : top + side, left : left + side, 1] = round(20 + 160 * strength)
    return pixels


def find(photo: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The detector: boxes of a red and of a blue block."""
    boxes = []
    for own, other in COLOURS.values():
        inside = photo[..., own].astype(int) - photo[..., other] > 90
        if inside.sum() > 25:
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            left, top = int(columns[0]), int(rows[0])
            boxes.append((left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1))
    return boxes


class Brightness:
    """A method: the green in the middle of a crop, frame by frame; the video's score is the mean of the logits."""

    method = "acmf"
    image_size, margin, least_frames = 32, 1.25, 1
    training, threshold, calibration = "nothing, it is a test", 0.5, "12 test videos"

    def __init__(self, batch: int = 7, **other) -> None:
        self.batch, self.asked = batch, []
        for name, value in other.items():
            setattr(self, name, value)

    def score(self, faces: Tensor, *, maps: bool = False) -> FaceScores:
        assert faces.shape[1:] == (3, self.image_size, self.image_size)
        self.asked.append(len(faces))
        if len(faces) < self.least_frames:
            raise UserError(f"{self.method} needs {self.least_frames} frames of a face, got {len(faces)}")
        fake = np.concatenate(
            [part[:, 1, 12:20, 12:20].mean((1, 2)).double().numpy() for part in faces.split(self.batch)]
        )
        fake = fake.clip(0.01, 0.99)
        logits = np.log(fake / (1 - fake))
        attention = np.stack([np.eye(4, dtype=np.float32)] * len(faces)) if maps else None
        gaze = np.stack([np.array((0.5, -0.2), np.float32)] * len(faces)) if maps else None
        return FaceScores(fake, float(1 / (1 + np.exp(-logits.mean()))), attention, gaze, list(logits))


class Combining(Brightness):
    """The same, part by part."""

    def combine(self, parts: Sequence[FaceScores]) -> float:
        logits = [value for part in parts for value in part.state]
        return float(1 / (1 + np.exp(-np.mean(logits))))
