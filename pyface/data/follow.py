"""Every face of a video, each under its own number, cut out frame by frame while the video is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pyface.data.crop import WINDOW, FaceCrop, Square, cut, overlap, place, steadied
from pyface.data.detect import Detector, detect_faces, get_detector
from pyface.errors import UserError

Placed = tuple[float, float, float, float]
"""Left, top, width, height in pixels; between two detections they are no whole numbers."""

SAME, TWICE = 0.2, 0.5
# A frame between two looks is believed to show a face if its crop, so many pixels wide, is on average within so many of
# 255 levels of that in either look. A head that turns changes by less; a title, a flash or a hand changes by more.
TINY, ALIKE = 16, 20.0


@dataclass(frozen=True)
class Face:
    """A face in one frame: where its crop is from (left, top, side in pixels), and ndarray[S, S, 3] uint8."""

    square: tuple[int, int, int]
    crop: np.ndarray


@dataclass(frozen=True)
class Follow:
    """Follows all faces of a video, though only some of its frames are searched.

    Every ``stride``-th frame, and the last, is looked at. There, each known face is looked for near its last box where
    the detector can do that (see :class:`pyface.data.detect.Detector`). The whole picture is searched, at reduced size,
    every ``search`` frames, whenever a known face was not found again, and as long as none is known: so a further face
    may appear ``search`` frames before it is noticed. A detection belongs to the face with which it overlaps most, by
    0.2 at least (intersection over union). A face that was found in two looks is on a straight line between them, and
    is looked for in those frames whose crop differs from both looks'; one that was found in only one look is looked for
    in each frame between. A face that has been gone for ``patience`` frames
    and returns is a new one. So is, after a cut, one elsewhere in the picture; one in the same place is not told apart.

    Squares are averaged over neighbouring frames as those of :meth:`pyface.data.crop.FaceCrop.follow`, which looks at
    every frame and keeps one face.

    Args:
        crop: how a square is made of a box, the size of the result, and the detector.
        stride: frames from one look to the next; 1 looks at all.
        search: frames from one search of the whole picture to the next.
        longest: the picture is brought to this longer side for the search, in pixels; None leaves it as it is.
        patience: frames that a face may be gone.
        most: faces that are followed at a time; the largest of those that appear together.
    """

    crop: FaceCrop = field(default_factory=FaceCrop)
    stride: int = 5
    search: int = 50
    longest: int | None = 640
    patience: int = 25
    most: int = 8

    def __post_init__(self) -> None:
        if min(self.stride, self.search, self.patience, self.most) < 1 or (self.longest or 64) < 64:
            raise UserError(
                f"following faces: need a stride, search, patience and number of at least 1 and a longer side of at "
                f"least 64 pixels, got {self.stride}, {self.search}, {self.patience}, {self.most} and {self.longest}"
            )

    def __call__(self, frames: Iterable[np.ndarray]) -> Iterator[dict[int, Face]]:
        """The faces in each of the frames, ndarray[H, W, 3] uint8 of one size, in order.

        Faces have numbers from 1, in order of appearance and then of size. At most ``stride`` + 4 frames are held.
        """
        window: deque[tuple[np.ndarray, dict[int, Square]]] = deque(maxlen=2 * WINDOW + 1)
        ahead = 0  # frames in the window that are still to be given
        for pixels, boxes in _Chase(self).run(frames):
            window.append((pixels, {number: self.crop.square(box) for number, box in boxes.items()}))
            ahead += 1
            if ahead > WINDOW:
                yield self._cut(window, len(window) - ahead)
                ahead -= 1
        for rest in range(ahead, 0, -1):
            yield self._cut(window, len(window) - rest)

    def _cut(self, window: Sequence[tuple[np.ndarray, dict[int, Square]]], at: int) -> dict[int, Face]:
        pixels, squares = window[at]
        near = [window[i][1] for i in range(max(0, at - WINDOW), min(len(window), at + WINDOW + 1))]
        faces = {}
        for number, own in sorted(squares.items()):
            square = steadied(own, [others[number] for others in near if number in others])
            faces[number] = Face(place(square, *pixels.shape[:2]), cut(pixels, square, self.crop.size))
        return faces


@dataclass
class _Known:
    box: Placed
    seen: int  # the frame


@dataclass(frozen=True)
class _Seen:
    box: Placed
    tiny: np.ndarray  # the crop, tiny


class _Chase:
    """The state of following one video."""

    def __init__(self, settings: Follow) -> None:
        self.settings = settings
        detector = settings.crop.detector
        self.detector: Detector = get_detector(detector) if isinstance(detector, str) else detector
        self.near = getattr(self.detector, "near", None)
        self.known: dict[int, _Known] = {}
        self.current: set[int] = set()  # found in the last look
        self.searched: int | None = None
        self.numbers = 0

    def run(self, frames: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[int, Placed]]]:
        between: list[np.ndarray] = []
        before: dict[int, _Seen] = {}
        frame = -1
        for frame, pixels in enumerate(frames):
            if frame % self.settings.stride:
                between.append(pixels)
                continue
            now = self._look(frame, pixels)
            yield from zip(between, self._between(between, before, now))
            yield pixels, {number: seen.box for number, seen in now.items()}
            between, before = [], now
        if between:
            pixels = between.pop()
            now = self._look(frame, pixels)
            yield from zip(between, self._between(between, before, now))
            yield pixels, {number: seen.box for number, seen in now.items()}

    def _look(self, frame: int, pixels: np.ndarray) -> dict[int, _Seen]:
        """The faces in a frame, known and new ones."""
        patience = self.settings.patience
        self.known = {number: face for number, face in self.known.items() if frame - face.seen <= patience}
        found: dict[int, Placed] = {}
        if self.near is not None:
            for number, face in self.known.items():
                box = self._again(pixels, face.box)
                if box is not None and not _taken(box, found):
                    found[number] = box
        lost = self.current - found.keys()
        due = self.searched is None or frame - self.searched >= self.settings.search
        if self.near is None or due or lost or not found:
            self.searched = frame
            self._assign(pixels, self._find(pixels), found)
        for number, box in found.items():
            self.known[number] = _Known(box, frame)
        self.current = set(found)
        return {number: _Seen(box, self._tiny(pixels, box)) for number, box in sorted(found.items())}

    def _tiny(self, pixels: np.ndarray, box: Placed) -> np.ndarray:
        return cut(pixels, self.settings.crop.square(box), TINY).astype(np.int16)

    def _assign(self, pixels: np.ndarray, boxes: list[Placed], found: dict[int, Placed]) -> None:
        """Give detections to known faces, the best fitting first, and new numbers to the rest, the largest first."""
        boxes = [box for box in boxes if not _taken(box, found)]
        pairs = [
            (overlap(box, face.box), -number, -index)
            for number, face in self.known.items()
            if number not in found
            for index, box in enumerate(boxes)
        ]
        used = set()
        for value, number, index in sorted(pairs, reverse=True):
            if value >= SAME and -number not in found and -index not in used:
                found[-number] = self._refined(pixels, boxes[-index])
                used.add(-index)
        new = sorted((box for index, box in enumerate(boxes) if index not in used), key=lambda box: -box[2] * box[3])
        for box in new[: max(0, self.settings.most - len(found))]:
            box = self._refined(pixels, box)
            if not _taken(box, found):
                self.numbers += 1
                found[self.numbers] = box

    def _refined(self, pixels: np.ndarray, box: Placed) -> Placed:
        """The box as :meth:`_again` would find it, so that how a face was found does not show in its crop."""
        return box if self.near is None else self._again(pixels, box) or box

    def _again(self, pixels: np.ndarray, box: Placed) -> Placed | None:
        """A known face, found near its box."""
        return _best(detect_faces(pixels, lambda photo: self.near(photo, box)), box)

    def _find(self, pixels: np.ndarray) -> list[Placed]:
        """All faces of a frame."""
        height, width = pixels.shape[:2]
        longest = self.settings.longest
        if longest is None or longest >= max(height, width):
            return detect_faces(pixels, self.detector)
        from PIL import Image

        scale = longest / max(height, width)
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        reduced = np.asarray(Image.fromarray(pixels).resize(small, Image.Resampling.BOX))
        across, down = width / small[0], height / small[1]
        return [(x * across, y * down, w * across, h * down) for x, y, w, h in detect_faces(reduced, self.detector)]

    def _between(
        self, frames: Sequence[np.ndarray], before: dict[int, _Seen], now: dict[int, _Seen]
    ) -> list[dict[int, Placed]]:
        """The faces in the frames between two looks."""
        there: list[dict[int, Placed]] = [{} for _ in frames]
        wholes: dict[int, list[Placed]] = {}

        def search(step: int, number: int, box: Placed) -> Placed:
            """Put in what is found about ``box``, and say where to search next."""
            if self.near is None and step not in wholes:
                wholes[step] = self._find(frames[step])
            hit = self._again(frames[step], box) if self.near is not None else _best(wholes[step], box)
            if hit is None or _taken(hit, there[step]):
                return box
            there[step][number] = hit
            return hit

        for number in sorted(before.keys() & now.keys()):
            one, other = before[number], now[number]
            for step, pixels in enumerate(frames):
                share = (step + 1) / (len(frames) + 1)
                box = tuple((1 - share) * a + share * b for a, b in zip(one.box, other.box))
                tiny = self._tiny(pixels, box)
                if min(np.abs(tiny - one.tiny).mean(), np.abs(tiny - other.tiny).mean()) <= ALIKE:
                    there[step][number] = box
                else:
                    search(step, number, box)
        for number in sorted(before.keys() ^ now.keys()):
            box = (before.get(number) or now[number]).box
            for step in range(len(frames)) if number in before else reversed(range(len(frames))):
                box = search(step, number, box)
        return there


def _best(hits: Sequence[Placed], box: Placed) -> Placed | None:
    """The hit that overlaps most with ``box``, if it can be the same face."""
    best = max(hits, key=lambda hit: overlap(hit, box), default=None)
    return best if best is not None and overlap(best, box) >= SAME else None


def _taken(box: Placed, found: dict[int, Placed]) -> bool:
    return any(overlap(box, other) >= TWICE for other in found.values())
