"""The face crop step: square boxes round detected faces, steady through a clip, and found only once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pyface.data.detect import Box, Detector, detect_faces
from pyface.data.images import replacing
from pyface.data.sets.folders import read_json, to_pixels, to_tensor
from pyface.data.video import Footage
from pyface.errors import UserError

Square = tuple[float, float, float]
"""Centre x, centre y, side in pixels."""

WINDOW, OVERLAP = 2, 0.5


@dataclass(frozen=True)
class FaceCrop:
    """Cuts faces out of pictures and videos as squares.

    A square's side is the longer side of the detected box times ``scale``, plus ``padding`` on either side. It is moved
    into the picture where it leaves it, and shrinks to the picture's shorter side at most, so nothing is made up.

    Args:
        scale: growth of the box round its centre. 1.3 is usual on FaceForensics++.
        size: side of the result in pixels; None keeps the cut-out's own (in a video: its largest square's).
        detector: a name for :func:`pyface.data.detect.get_detector`, or the detector itself.
        padding: pixels. GazeForensics crops with ``scale=1, padding=18``.
        cache: a folder of your run, not of the data set, for what was detected: one JSON file per video, named by its
            id. Boxes in it are used instead of the detector, so boxes of your own can be given this way, and the
            c40 videos of FaceForensics++ get the boxes of c23 if both are given the same folder.
    """

    scale: float = 1.3
    size: int | None = 224
    detector: str | Detector = "cascade"
    padding: int = 0
    cache: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        if not self.scale > 0 or self.padding < 0 or (self.size is not None and self.size < 1):
            raise UserError(
                f"face crop: need scale > 0, padding >= 0 and size >= 1, got {self.scale}, {self.padding}, {self.size}"
            )

    def __call__(self, image: Tensor) -> Tensor:
        """The largest face of ``image``, Tensor[3, H, W] float32 in [0, 1], as Tensor[3, S, S].

        Raises:
            UserError: no face was found.
        """
        pixels = to_pixels(image)
        boxes = detect_faces(pixels, self.detector)
        if not boxes:
            raise UserError(f"no face was found in a picture of {pixels.shape[1]} x {pixels.shape[0]} pixels")
        return to_tensor(cut(pixels, self.square(_largest(boxes)), self.size))

    def faces(self, footage: Footage, indices: Iterable[int], key: str | None = None) -> dict[int, list[Box]]:
        """Boxes (x, y, width, height) detected in each of these frames; an empty list where there is no face.

        Args:
            footage: the video.
            indices: positions of frames.
            key: the video's id, which names its file in ``cache``. Without it nothing is cached.
        """
        file = None if key is None or self.cache is None else Path(self.cache) / f"{key}.json"
        known = {} if file is None else self._load(file)
        wanted = sorted(set(indices))
        missing = [index for index in wanted if index not in known]
        for start in range(0, len(missing), 32):
            some = missing[start : start + 32]
            for index, pixels in zip(some, footage.pixels(some)):
                known[index] = detect_faces(pixels, self.detector)
        if file is not None and missing:
            frames = {str(index): known[index] for index in sorted(known)}
            with replacing(file, overwrite=True) as temporary:
                temporary.write_text(json.dumps({"detector": self._detector_name(), "frames": frames}))
        return {index: known[index] for index in wanted}

    def follow(self, footage: Footage, key: str | None = None, indices: Iterable[int] | None = None) -> FaceFootage:
        """The face of a video, as a video of its own; frames with no face are left out.

        ``indices`` are the positions of the frames to look at, by default all. A square is averaged with those of
        neighbouring frames only, so frames far apart are cut out by their own boxes.

        Where there are several faces, the one is kept that overlaps most with the mean box of the video. Squares are
        averaged over the two frames before and after, as far as they overlap by half (intersection over union), so a
        cut does not pull the square along. Follows the crop of GazeForensics' code (sheet, section 5.4).

        Raises:
            UserError: no face in any frame.
        """
        looked = range(len(footage)) if indices is None else sorted(set(indices))
        squares = self._steady(self.faces(footage, looked, key))
        if not squares:
            raise UserError(
                f"no face was found in any of the {len(looked)} frames of {footage.name}; "
                f"give another detector, or boxes of your own in the cache folder"
            )
        return FaceFootage(footage, squares, self.size)

    def frame(self, footage: Footage, indices: Sequence[int], key: str | None = None) -> tuple[int, np.ndarray]:
        """The first of these frames in which a face is found, and its largest face.

        Returns:
            the frame's position in the video, ndarray[S, S, 3] uint8.

        Raises:
            UserError: no face in any of them.
        """
        for index in indices:
            boxes = self.faces(footage, [index], key)[index]
            if boxes:
                return index, cut(footage.pixels([index])[0], self.square(_largest(boxes)), self.size)
        raise UserError(f"no face was found in any of {len(indices)} frames of {footage.name}; give another detector")

    def square(self, box: Box) -> Square:
        """What is cut out round a box, before it is moved into the picture."""
        x, y, w, h = box
        return x + w / 2, y + h / 2, max(w, h) * self.scale + 2 * self.padding

    def _steady(self, found: Mapping[int, Sequence[Box]]) -> dict[int, Square]:
        found = {index: boxes for index, boxes in found.items() if boxes}
        if not found:
            return {}
        alone = [boxes[0] for boxes in found.values() if len(boxes) == 1] or [_largest(b) for b in found.values()]
        mean = tuple(np.mean(alone, 0))
        squares = {
            index: self.square(max(boxes, key=lambda box: (overlap(box, mean), box[2] * box[3])))
            for index, boxes in found.items()
        }
        return {
            index: steadied(own, [squares[i] for i in range(index - WINDOW, index + WINDOW + 1) if i in squares])
            for index, own in squares.items()
        }

    def _detector_name(self) -> str:
        if isinstance(self.detector, str):
            return self.detector
        return getattr(self.detector, "__qualname__", type(self.detector).__qualname__)

    def _load(self, file: Path) -> dict[int, list[Box]]:
        if not file.exists():
            return {}
        what = '{"detector": name, "frames": {"0": [[x, y, width, height], ...], ...}}'
        content = read_json(file, name="face boxes", what=what)
        try:
            frames = {
                int(index): [(int(x), int(y), int(w), int(h)) for x, y, w, h in boxes]
                for index, boxes in content["frames"].items()
            }
            before = content.get("detector", self._detector_name())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"face boxes: {file} does not read {what}; delete it, or give another folder") from error
        if before != self._detector_name():
            raise UserError(
                f"face boxes: {file} holds what the detector {before!r} found, not {self._detector_name()!r}; "
                f"give another cache folder"
            )
        return frames


class FaceFootage(Footage):
    """The frames of a video that show a face, cut to it. ``positions`` says which frames of the video they are."""

    def __init__(self, footage: Footage, squares: Mapping[int, Square], size: int | None) -> None:
        self.name, self.footage = footage.name, footage
        self.positions, self.squares = list(squares), list(squares.values())
        height, width = footage.size
        side = size if size is not None else max(place(square, height, width)[2] for square in self.squares)
        self._size = (side, side)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def fps(self) -> float:
        return self.footage.fps

    @property
    def size(self) -> tuple[int, int]:
        return self._size

    @property
    def numbers(self) -> Sequence[int]:
        numbers = self.footage.numbers
        return [numbers[position] for position in self.positions]

    def _read(self, order: Sequence[int]) -> Iterable[np.ndarray]:
        for index in order:
            (frame,) = self.footage.pixels([self.positions[index]])
            yield cut(frame, self.squares[index], self._size[0])


def steadied(own: Square, near: Sequence[Square]) -> Square:
    """The mean of those of the squares ``near`` in time, itself among them, that overlap with it by half."""
    near = [square for square in near if overlap(_box(square), _box(own)) >= OVERLAP]
    return tuple(float(value) for value in np.mean(near, 0))


def _largest(boxes: Sequence[Box]) -> Box:
    return max(boxes, key=lambda box: box[2] * box[3])


def _box(square: Square) -> tuple[float, float, float, float]:
    x, y, side = square
    return x - side / 2, y - side / 2, side, side


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x, y, width, height)."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def place(square: Square, height: int, width: int) -> tuple[int, int, int]:
    """Left, top, side of the square, moved into the picture."""
    x, y, side = square
    side = max(1, min(round(side), height, width))
    left, top = round(x - side / 2), round(y - side / 2)
    return min(max(left, 0), width - side), min(max(top, 0), height - side), side


def cut(pixels: np.ndarray, square: Square, size: int | None) -> np.ndarray:
    """ndarray[H, W, 3] uint8 -> ndarray[S, S, 3] uint8."""
    left, top, side = place(square, *pixels.shape[:2])
    own = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    if size is None or size == side:
        return own
    batch = torch.from_numpy(own).permute(2, 0, 1)[None]
    small = interpolate(batch, (size, size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(small[0].permute(1, 2, 0).numpy())
