"""Face detectors. A detector is any callable from a photo to boxes; the default needs no network and no download."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Protocol

import numpy as np

from pyface.data.plugins import find_plugin, installed
from pyface.errors import UserError

Box = tuple[int, int, int, int]
"""Left, top, width, height in pixels."""

ENTRY_POINT_GROUP = "pyface.detectors"


class Detector(Protocol):
    """Finds faces."""

    def __call__(self, photo: np.ndarray, /) -> Iterable[Box]:
        """ndarray[H, W, 3] uint8 RGB -> boxes (x, y, width, height) in pixels, from hair to chin.

        Boxes may leave the photo; they are cut to it. A detector may also have a method ``near(photo, box)``, which
        looks for a known face only where it was, and so takes little time: following a face through a video uses it.
        """


_REGISTRY: dict[str, Callable[[], Detector]] = {}


def register_detector(name: str, make: Callable[[], Detector]) -> None:
    """Add a detector under ``name``; ``make()`` is called when it is first used. UserError if the name is taken."""
    if name in _REGISTRY:
        raise UserError(f"detector {name!r} is already registered; choose another name")
    _REGISTRY[name] = make


def list_detectors() -> list[str]:
    """Names that :func:`get_detector` knows, sorted: registered ones and installed entry points."""
    return sorted({*_REGISTRY, *installed(ENTRY_POINT_GROUP)})


def get_detector(name: str) -> Detector:
    """The detector called ``name``: a registered name, an entry point of ``pyface.detectors``, or "module:function".

    An entry point, like "module:function", names the detector itself.

    Raises:
        UserError: there is none, or it cannot be imported.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]()
    detector = find_plugin(name, ENTRY_POINT_GROUP, "detector")
    if detector is not None:
        if not callable(detector):
            raise UserError(f"detector {name!r} is not callable")
        return detector
    raise UserError(f"unknown detector {name!r}; known: {', '.join(list_detectors())}, or give module:function")


def detect_faces(photo: np.ndarray, detector: str | Detector = "cascade") -> list[Box]:
    """Boxes of all faces in ``photo``, cut to it; empty if there is none.

    Args:
        photo: ndarray[H, W, 3] uint8, RGB.
        detector: a name for :func:`get_detector`, or the detector itself.

    Raises:
        UserError: the detector is unknown, or what it returns are not boxes.
    """
    find = get_detector(detector) if isinstance(detector, str) else detector
    height, width = photo.shape[:2]
    boxes: list[Box] = []
    found = find(photo)
    if not isinstance(found, Iterable):
        raise UserError(f"detector {detector!r} must return boxes (x, y, width, height), got {found!r}")
    for box in found:
        try:
            x, y, w, h = (int(round(float(value))) for value in box)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"detector {detector!r} must return boxes (x, y, width, height), got {box!r}") from None
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if right > left and bottom > top:
            boxes.append((left, top, right - left, bottom - top))
    return boxes


class CascadeDetector:
    """scikit-image's LBP cascade for frontal faces.

    It sees upright, roughly frontal faces from about 32 pixels on; in photos above two megapixels, which are searched
    at reduced size, from about 2 % of the longer side on. Profiles and covered faces are missed: look at the result.

    Args:
        votes: overlapping hits that make a face. Four found one more of fifty faces of ``lfw_subset`` than five (45
            against 44), but began to see faces in scikit-image's other pictures, where five sees none.
        margin: growth of the box around its centre, because the cascade frames eyes to mouth, not hair and chin.
        max_megapixels: larger photos are searched at reduced size.
    """

    MIN_FACE = 32
    NEAR = 80  # pixels that a known face is brought to when it is looked for again

    def __init__(self, votes: int = 5, margin: float = 1.6, max_megapixels: float = 2.0) -> None:
        self.votes, self.margin, self.max_megapixels = votes, margin, max_megapixels

    def __call__(self, photo: np.ndarray, /) -> list[Box]:
        height, width = photo.shape[:2]
        scale = min(1.0, (self.max_megapixels * 1e6 / (width * height)) ** 0.5)
        return self._search(photo, scale, self.MIN_FACE)

    def near(self, photo: np.ndarray, box: Box) -> list[Box]:
        """Faces of about the size of ``box`` within a square of twice its side round it."""
        height, width = photo.shape[:2]
        x, y, w, h = box
        side = max(w, h)
        left, right = max(0, round(x + w / 2 - side)), min(width, round(x + w / 2 + side))
        top, bottom = max(0, round(y + h / 2 - side)), min(height, round(y + h / 2 + side))
        scale = min(1.0, self.NEAR / side)
        framed = side * scale / self.margin  # what the cascade frames of such a face
        found = self._search(photo[top:bottom, left:right], scale, round(0.6 * framed), round(1.6 * framed))
        return [(left + x, top + y, w, h) for x, y, w, h in found]

    def _search(self, photo: np.ndarray, scale: float, smallest: int, largest: int | None = None) -> list[Box]:
        """Boxes in ``photo``, searched at ``scale`` for what the cascade frames of ``smallest`` to ``largest`` pixels.

        """
        from PIL import Image

        height, width = photo.shape[:2]
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        if min(small) < self.MIN_FACE:
            return []
        grey = np.asarray(Image.fromarray(photo).convert("L").resize(small, Image.Resampling.BOX))
        largest = max(grey.shape) if largest is None else largest
        hits = _cascade().detect_multi_scale(
            img=grey,
            scale_factor=1.1,
            step_ratio=1.5,
            min_size=(smallest, smallest),
            max_size=(min(largest, grey.shape[0]), min(largest, grey.shape[1])),
            min_neighbor_number=self.votes,
            intersection_score_threshold=0.5,
        )
        boxes = []
        for hit in hits:
            w, h = hit["width"] * self.margin, hit["height"] * self.margin
            x, y = hit["c"] + (hit["width"] - w) / 2, hit["r"] + (hit["height"] - h) / 2
            boxes.append(tuple(round(value / scale) for value in (x, y, w, h)))
        return boxes


register_detector("cascade", CascadeDetector)


@lru_cache(maxsize=1)
def _cascade():
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    return Cascade(lbp_frontal_face_cascade_filename())
