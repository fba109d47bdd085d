"""From a video, a folder of frames or a picture to the scores of every face in it, as a stream."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from pyface.data.crop import FaceCrop
from pyface.data.follow import Face, Follow
from pyface.data.images import SUFFIXES, read_photo
from pyface.data.sets.folders import natural, walk
from pyface.data.video import VIDEO_SUFFIXES, Footage, FrameFolder, Pictures, Video, ahead
from pyface.errors import UserError
from pyface.methods.detection import Detector, FaceScores

# Frames of one face that are scored together. A longer video is scored in stretches, so that memory is bounded; the
# videos of the usual data sets are shorter. The last stretch has at least REST frames, enough for every method.
STRETCH, REST = 512, 64
# The same for methods that can combine parts: small ones, so that scoring begins early.
PART, PART_REST = 48, 16
# What is seen in less of a video, or in less than half of a shorter one, is most likely no face: in frames of the
# video, and in frames examined.
GLIMPSE, FEW = 15, 3
READ_AHEAD = 48 << 20  # bytes of decoded frames that wait to be searched
KINDS = ("auto", "video", "pictures")
_FRAME = re.compile(r"(frame|f)?[-_ ]?\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """Something to scan. ``kind`` is "video" (a file), "frames" (a folder, one video) or "picture"."""

    path: Path
    kind: str

    def open(self, fps: float = 25.0) -> Footage:
        """Its frames; ``fps`` is for folders, which do not say it."""
        if self.kind == "video":
            return Video(self.path)
        return FrameFolder(self.path, fps, reduce=True) if self.kind == "frames" else Picture(self.path)


class Picture(Pictures):
    """A picture as a video of one frame."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(str(path), [path.name])
        self._photo = read_photo(path, reduce=True)
        # What happens to metadata concerns who writes pictures.
        self.notes = [note for note in self._photo.notes if not note.startswith("EXIF")]

    def _read(self, order: Sequence[int]) -> Iterable[np.ndarray]:
        return [self._photo.pixels for _ in order]


def find_sources(paths: Iterable[str | os.PathLike], kind: str = "auto") -> list[Source]:
    """What a user named, folders with all that is below them, each once and in order.

    The pictures of one folder are the frames of a video if their names are numbers, alone or behind "frame" or "f";
    ``kind`` "video" or "pictures" says so whatever their names.

    Raises:
        UserError: a path does not exist or is neither video, picture nor folder, or a folder holds nothing of use.
    """
    if kind not in KINDS:
        raise UserError(f"pictures in a folder are {kind!r}; expected one of {', '.join(KINDS)}")
    found: dict[Path, Source] = {}
    for path in map(Path, paths):
        if path.is_dir():
            below = _below(path, kind)
            if not below:
                raise UserError(f"{path} holds no videos and no pictures that pyface reads")
        elif not path.exists():
            raise UserError(f"{path} does not exist")
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            below = [Source(path, "video")]
        elif path.suffix.lower() in SUFFIXES:
            below = [Source(path, "picture")]
        else:
            endings = ", ".join(sorted(VIDEO_SUFFIXES | SUFFIXES))
            raise UserError(f"{path} is neither a folder nor a file that ends in one of {endings}")
        for source in below:
            found.setdefault(source.path, source)
    return list(found.values())


def _below(root: Path, kind: str) -> list[Source]:
    folders: dict[Path, list[Path]] = {}
    for file in walk(root, VIDEO_SUFFIXES | SUFFIXES):
        folders.setdefault(file.parent, []).append(file)
    sources = []
    for folder, files in folders.items():
        pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
        numbered = all(_FRAME.fullmatch(file.stem) for file in pictures)
        is_video = kind == "video" or (kind == "auto" and numbered and len(pictures) > 1)
        if is_video and pictures:
            sources.append(Source(folder, "frames"))
        for file in files:
            if file.suffix.lower() in VIDEO_SUFFIXES:
                sources.append(Source(file, "video"))
            elif not is_video:
                sources.append(Source(file, "picture"))
    return sorted(sources, key=lambda source: [natural(part) for part in source.path.parts])


@dataclass(frozen=True)
class Evidence:
    """A frame that scored high: its crop ndarray[S, S, 3] uint8, and what the network says of it."""

    place: int
    score: float
    square: tuple[int, int, int]
    crop: np.ndarray
    attention: np.ndarray | None
    gaze: np.ndarray | None


@dataclass(frozen=True)
class FaceResult:
    """One face through a video.

    Attributes:
        number: of the face, from 1.
        places: ndarray[T] int, positions of its frames in the video.
        squares: ndarray[T, 3] int, where its crops are from: left, top, side in pixels.
        scores: of its T frames; without attention, which only ``evidence`` keeps. ``video`` is NaN if not scored.
        evidence: frames with the highest scores, apart in time, the highest first.
        problem: why it could not be scored, or "".
    """

    number: int
    places: np.ndarray
    squares: np.ndarray
    scores: FaceScores
    evidence: list[Evidence] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class Scan:
    """What was found in a video or picture.

    Attributes:
        size: (height, width) in pixels.
        fps: frames per second, on average.
        places: positions of the frames that were examined.
        numbers: of all frames of the video, as files of frames are numbered; else from 0.
        times: ndarray[frames of the video], seconds from the first frame to each.
        faces: in order of appearance.
        without: examined frames, as positions, that show no face.
        glimpses: further detections that were too brief to be taken for a face, each with its number of frames.
        notes: what was done to the frames.
    """

    size: tuple[int, int]
    fps: float
    places: Sequence[int]
    numbers: Sequence[int]
    times: np.ndarray
    faces: list[FaceResult]
    without: list[int]
    glimpses: list[int]
    notes: list[str]

    @property
    def score(self) -> float:
        """The highest score of its faces, because one forged face makes a forgery; NaN if none was scored."""
        scores = [face.scores.video for face in self.faces if not np.isnan(face.scores.video)]
        return max(scores, default=float("nan"))


def scan(
    footage: Footage,
    detector: Detector,
    *,
    places: Sequence[int] | None = None,
    follow: Follow | None = None,
    maps: bool = False,
    evidence: int = 0,
    progress: Callable[[int], None] = lambda frames: None,
) -> Scan:
    """Score every face of a video.

    A thread decodes, a second one searches, follows and cuts out faces, this one scores. At most STRETCH + REST crops
    of each face that is in the picture are held, and as many of one that is being scored. The score of a face with
    more frames is the mean over its stretches, weighted by their scored frames, or what the method makes of them.

    Args:
        footage: the video.
        detector: a method with its weights.
        places: rising positions of the frames to examine; None for all.
        follow: how faces are found; its numbers of frames are of the video, whatever ``places`` leaves out, and its
            crop's size and scale are set to what ``detector`` needs.
        maps: ask for attention and gaze, too.
        evidence: frames to keep of each face.
        progress: called with the number of frames that were examined since the last call, from another thread.

    Raises:
        UserError: the video is damaged, or no face is in any of the frames.
    """
    places = range(len(footage)) if places is None else places
    if not places:
        raise UserError(f"none of the {len(footage)} frames of {footage.name} is to be examined; examine more of them")
    # Faces move from frame to frame of the video, however many of its frames are examined.
    step = max(1, round((places[-1] - places[0]) / max(1, len(places) - 1)))
    follow = fitted(follow or Follow(), detector, step)
    least = min(max(FEW, GLIMPSE // step), (len(places) + 1) // 2)
    stretch = (PART, PART_REST) if hasattr(detector, "combine") else (STRETCH, REST)
    reader = _Reader(footage, places, follow, least, stretch, progress)
    faces: dict[int, _Scored] = {}
    for part in ahead(reader.stretches(), 1):
        faces.setdefault(part.number, _Scored(part.number, detector, maps, evidence)).add(part)
    if not faces:
        frames = f" ({len(places)} frames were examined)" if len(places) > 1 else ""
        brief = f"; {len(reader.glimpses)} detections were too brief to be taken for one" if reader.glimpses else ""
        raise UserError(f"no face was found in {footage.name}{frames}{brief}")
    results = [faces[number].result() for number in sorted(faces)]
    times = np.asarray(footage.times, float)
    notes = [*getattr(footage, "notes", ())]
    numbers, without, glimpses = footage.numbers, reader.without, reader.glimpses
    return Scan(footage.size, footage.fps, places, numbers, times, results, without, glimpses, notes)


def fitted(follow: Follow, detector: Detector, step: int = 1) -> Follow:
    """The same, with crops as ``detector`` takes them, and for every ``step``-th frame of a video."""
    crop = FaceCrop(detector.margin, detector.image_size, follow.crop.detector)
    frames = {name: max(1, getattr(follow, name) // step) for name in ("stride", "search", "patience")}
    return replace(follow, crop=crop, **frames)


@dataclass
class _Stretch:
    number: int
    places: list[int] = field(default_factory=list)
    faces: list[Face] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.places)

    def cut_off(self, count: int) -> _Stretch:
        """The first ``count`` frames; the rest stays."""
        first = _Stretch(self.number, self.places[:count], self.faces[:count])
        del self.places[:count], self.faces[:count]
        return first


class _Reader:
    """Decodes, follows, cuts, and gives faces in stretches."""

    def __init__(
        self,
        footage: Footage,
        places: Sequence[int],
        follow: Follow,
        least: int,
        stretch: tuple[int, int],
        progress: Callable[[int], None],
    ) -> None:
        self.footage, self.places, self.follow, self.progress = footage, places, follow, progress
        self.least = least
        self.stretch, self.rest = stretch
        self.without: list[int] = []
        self.glimpses: list[int] = []

    def stretches(self) -> Iterator[_Stretch]:
        held: dict[int, _Stretch] = {}
        last: dict[int, int] = {}
        begun: set[int] = set()
        gone = self.follow.patience + 2 * self.follow.stride  # frames after which a face cannot return
        for count, (place, faces) in enumerate(zip(self.places, self.follow(self._frames()))):
            if not faces:
                self.without.append(place)
            for number, face in faces.items():
                own = held.setdefault(number, _Stretch(number))
                own.places.append(place)
                own.faces.append(face)
                last[number] = count
                if len(own) >= self.stretch + self.rest:
                    begun.add(number)
                    yield own.cut_off(self.stretch)
            for number in [number for number in held if count - last[number] > gone]:
                yield from self._finished(held.pop(number), number in begun)
            self.progress(1)
        for number in sorted(held):
            yield from self._finished(held[number], number in begun)

    def _frames(self) -> Iterator[np.ndarray]:
        height, width = self.footage.size
        waiting = max(1, min(16, READ_AHEAD // (3 * height * width)))
        return ahead((self.footage.pixels([place])[0] for place in self.places), waiting)

    def _finished(self, stretch: _Stretch, is_begun: bool) -> Iterator[_Stretch]:
        if is_begun or len(stretch) >= self.least:
            yield stretch
        else:
            self.glimpses.append(len(stretch))


class _Scored:
    """What is known of a face so far."""

    def __init__(self, number: int, detector: Detector, maps: bool, evidence: int) -> None:
        self.number, self.detector, self.maps, self.most = number, detector, maps, evidence
        self.places: list[int] = []
        self.squares: list[tuple[int, int, int]] = []
        self.fake: list[np.ndarray] = []
        self.gaze: list[np.ndarray] = []
        self.parts: list[FaceScores] = []
        self.evidence: list[Evidence] = []
        self.problem = ""

    def add(self, stretch: _Stretch) -> None:
        count = len(stretch)
        crops = torch.from_numpy(np.stack([face.crop for face in stretch.faces]))
        faces = crops.permute(0, 3, 1, 2).contiguous().float().div_(255)
        try:
            scores = self.detector.score(faces, maps=self.maps)
        except UserError as error:
            self.problem = str(error)
            scores = FaceScores(np.full(count, np.nan), float("nan"))
        self.places += stretch.places
        self.squares += [face.square for face in stretch.faces]
        self.fake.append(scores.fake)
        self.gaze.append(np.full((count, 2), np.nan, np.float32) if scores.gaze is None else scores.gaze)
        if not np.isnan(scores.video):
            self.parts.append(replace(scores, attention=None))
        seen = None if scores.attention is None else scores.attention.any((1, 2))
        shown = [
            Evidence(
                stretch.places[i],
                float(scores.fake[i]),
                stretch.faces[i].square,
                stretch.faces[i].crop,
                None if scores.attention is None else scores.attention[i],
                None if scores.gaze is None else scores.gaze[i],
            )
            for i in _apart(scores.fake, stretch.places, self.most, seen)
        ]
        both = self.evidence + shown
        chosen = _apart(np.array([one.score for one in both]), [one.place for one in both], self.most)
        self.evidence = [both[i] for i in chosen]

    def result(self) -> FaceResult:
        video = self._whole() if self.parts else float("nan")
        gaze = np.concatenate(self.gaze)
        scores = FaceScores(np.concatenate(self.fake), video, None, None if np.isnan(gaze).all() else gaze)
        squares = np.array(self.squares, int)
        return FaceResult(self.number, np.array(self.places), squares, scores, self.evidence, self.problem)

    def _whole(self) -> float:
        if hasattr(self.detector, "combine"):
            return float(self.detector.combine(self.parts))
        known = [int(np.isfinite(part.fake).sum()) for part in self.parts]
        return float(np.average([part.video for part in self.parts], weights=known))


def _apart(scores: np.ndarray, places: Sequence[int], most: int, first: np.ndarray | None = None) -> list[int]:
    """Indices of the highest scores, the highest first, that lie apart by a part of the whole, fewer if need be.

    Of equal scores, as all frames of a clip may have, those marked in ``first`` are taken before others.
    """
    if most < 1 or not len(scores):
        return []
    span = (max(places) - min(places)) / (3 * most)
    chosen: list[int] = []
    later = np.zeros(len(scores), bool) if first is None else ~first
    for index in np.lexsort((later, -np.nan_to_num(scores, nan=-1.0))):
        if np.isnan(scores[index]) or len(chosen) == most:
            break
        if all(abs(places[index] - places[other]) >= span for other in chosen):
            chosen.append(int(index))
    return chosen
