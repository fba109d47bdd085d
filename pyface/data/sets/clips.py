"""What the readers of video data sets have in common: records, rules for choosing frames, and views over them."""

from __future__ import annotations

import bisect
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from pyface.data.crop import FaceCrop
from pyface.data.sets.base import tally
from pyface.data.sets.folders import EmptySplit, natural, to_tensor
from pyface.data.sets.synthesis import Progress, deal, share
from pyface.data.video import VIDEO_SUFFIXES, Footage, open_video, write_video
from pyface.errors import UserError

REAL, FAKE = 0, 1
SIZES_SAMPLED = 16


@dataclass(frozen=True)
class Clip:
    """One video of a data set.

    Attributes:
        id: unique within the data set, the same in every compression, as "Deepfakes/000_003".
        path: the video file, the folder of its frames, or the archive that holds it.
        label: 0 = real, 1 = fake.
        method: how it was forged; "real" if it was not.
        identity: who the video was made of. A fake keeps the identity of its target video.
        source: whose face or expression was put in; None for real videos and where the data set does not say.
        split: "train", "val" or "test".
    """

    id: str
    path: Path
    label: int
    method: str
    identity: str
    source: str | None
    split: str


Sampling = Callable[[Footage], Sequence[int]]
"""Which frames to take of a video: positions in it."""


@dataclass(frozen=True)
class Every:
    """Frames whose number is a multiple of ``step``, the first ``limit`` of them.

    Numbers are those of the file names where frames are pictures, so a frame that was not extracted shifts nothing.
    """

    step: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.step < 1 or (self.limit is not None and self.limit < 1):
            raise UserError(f"frames: need a step and a limit of at least 1, got {self.step} and {self.limit}")

    def __call__(self, footage: Footage) -> list[int]:
        return [place for place, number in enumerate(footage.numbers) if number % self.step == 0][: self.limit]


@dataclass(frozen=True)
class Evenly:
    """``count`` frames at the middles of as many equal parts; all frames of a shorter video."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"frames: need a count of at least 1, got {self.count}")

    def __call__(self, footage: Footage) -> list[int]:
        total = len(footage)
        if total <= self.count:
            return list(range(total))
        return [(2 * part + 1) * total // (2 * self.count) for part in range(self.count)]


SAMPLING = Evenly(16)


class VideoSet(Dataset):
    """A map-style data set of videos. Lists are read at construction, videos when asked for.

    ``[i]`` is a dict: ``video`` (the id), ``label`` (0 real, 1 fake), ``method``, ``identity``, ``source`` ("" if
    unknown), ``split``, ``indices`` (Tensor[T] int64, positions in the video or in its face crop) and ``frames``
    (Tensor[T, 3, H, W] float32 in [0, 1]). Other frames are read by ``open(i).frames(indices)``.

    Attributes:
        records: one :class:`Clip` per video, in a fixed order.
        sampling: which frames ``[i]`` holds.
        crop: the face crop step, or None. With it a video is searched for faces as a whole when it is first opened,
            so give it a cache folder.
    """

    title: ClassVar[str]
    layout: ClassVar[str]

    def __init__(
        self, root: Path, split: str | None, records: Sequence[Clip], sampling: Sampling, crop: FaceCrop | None
    ) -> None:
        self.root, self.split, self.records, self.sampling, self.crop = root, split, list(records), sampling, crop
        self._opened: tuple[int, Footage] | None = None
        if not self.records:
            part = f" for the split {split!r}" if split else ""
            raise EmptySplit(f"{self.title}: {root} has no videos{part}; expected\n{self.layout}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return len(self.records)

    def footage(self, record: Clip) -> Footage:
        """The frames of a record as they are in the data set."""
        return open_video(record.path)

    def open(self, index: int) -> Footage:
        """The frames of video ``index``, or with a crop step those of its face. The one opened last is kept open."""
        opened = self._opened
        if opened is None or opened[0] != index:
            record = self.records[index]
            footage = self.footage(record)
            if self.crop is not None:
                footage = self.crop.follow(footage, record.id)
            self._opened = opened = (index, footage)
        return opened[1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        footage = self.open(index)
        indices = self.sampling(footage)
        return {
            **labels(self.records[index]),
            "indices": torch.tensor(indices, dtype=torch.int64),
            "frames": footage.frames(indices),
        }

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        """Names that ``split`` may be."""
        raise NotImplementedError

    @classmethod
    def parts(cls, root: str | os.PathLike) -> list[dict[str, str]]:
        """Settings of every reader that ``root`` can feed."""
        return [{"split": split} for split in cls.splits()]

    def summary(self) -> dict[str, Any]:
        """``name``, ``split``, ``videos``, counts by label and method, ``identities``, and of up to 16 videos, evenly
        taken, ``frames`` (fewest and most) and ``sizes`` (width x height)."""
        step = -(-len(self) // SIZES_SAMPLED)
        some = [self.footage(record) for record in self.records[::step]]
        lengths = [len(footage) for footage in some]
        return {
            "name": self.title,
            "split": self.split or "all",
            "videos": len(self),
            "labels": {name: sum(r.label == label for r in self.records) for name, label in (("real", 0), ("fake", 1))},
            "methods": tally(record.method for record in self.records),
            "identities": len({record.identity for record in self.records}),
            "frames": {"fewest": min(lengths), "most": max(lengths)},
            "sizes": dict(Counter("{1}x{0}".format(*footage.size) for footage in some).most_common()),
        }


class FrameDataset(Dataset):
    """The frames of a :class:`VideoSet` as samples of their own.

    ``[i]`` is a dict: ``image`` (Tensor[3, H, W] float32 in [0, 1]), ``frame`` (its number in the video), and
    ``video``, ``label``, ``method``, ``identity``, ``source``, ``split`` as the reader gives them. Construction counts
    the frames of every video. Frames in random order are slow to decode out of video files: extract them first
    (``source="images"``), or read in order.

    Args:
        reader: of videos.
        every: take frames whose number is a multiple of this. A pair is for real and for fake videos: ACMF trains on
            every real and every 4th fake frame, ``(1, 4)``.
        limit: at most so many frames of a video.
        crop: the face crop step; the reader's own is not used. Where a frame has no face, the sample is the nearest
            of the video's chosen frames that has one; ``frame`` says which.
    """

    def __init__(
        self,
        reader: VideoSet,
        *,
        every: int | tuple[int, int] = 1,
        limit: int | None = None,
        crop: FaceCrop | None = None,
    ) -> None:
        steps = (every, every) if isinstance(every, int) else tuple(every)
        rules = [Every(step, limit) for step in steps]
        self.reader, self.crop = reader, crop
        self._opened: tuple[int, Footage] | None = None
        self._chosen = [rules[record.label](reader.footage(record)) for record in reader.records]
        self._ends = list(accumulate(len(chosen) for chosen in self._chosen))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, index: int) -> tuple[int, int]:
        """(position of the video among the reader's records, position of the frame in the video)."""
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        video = bisect.bisect_right(self._ends, index)
        return video, self._chosen[video][index - self._ends[video]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        video, place = self.place(index)
        record = self.reader.records[video]
        if self._opened is None or self._opened[0] != video:
            self._opened = (video, self.reader.footage(record))
        footage = self._opened[1]
        if self.crop is None:
            (pixels,) = footage.pixels([place])
        else:
            nearest = sorted(self._chosen[video], key=lambda other: (abs(other - place), other))
            place, pixels = self.crop.frame(footage, nearest, record.id)
        return {"image": to_tensor(pixels), "frame": footage.numbers[place], **labels(record)}


def labels(record: Clip) -> dict[str, Any]:
    """What a sample says about the video it is from; a collate function can stack it."""
    return {
        "video": record.id,
        "label": record.label,
        "method": record.method,
        "identity": record.identity,
        "source": record.source or "",
        "split": record.split,
    }


def find_videos(folder: Path) -> dict[str, Path]:
    """Video files and folders of frames in ``folder``, by name without suffix, in natural order."""
    found: dict[str, Path] = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: natural(entry.name)):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found[entry.name] = entry
        elif entry.suffix.lower() in VIDEO_SUFFIXES:
            found[entry.stem] = entry
    return found


def check_folder(folder: Path, *, title: str, layout: str) -> dict[str, Path]:
    """The videos in ``folder``. UserError if there is no such folder, or nothing in it."""
    if not folder.is_dir():
        raise UserError(f"{title}: {folder} is missing; expected\n{layout}")
    found = find_videos(folder)
    if not found:
        raise UserError(f"{title}: {folder} holds no videos and no folders of frames; expected\n{layout}")
    return found


def by_split(records: Sequence[Clip], split: str | None) -> list[Clip]:
    """The records of one split, or all."""
    return [record for record in records if split is None or record.split == split]


def require(paths: Mapping[str, Path], wanted: Sequence[str], folder: Path, title: str) -> None:
    """UserError naming the first of the ``wanted`` videos that are not in ``folder``, and how many there are."""
    missing = [name for name in wanted if name not in paths]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{title}: {folder} lacks the video {missing[0]}{more}, which the split lists")


@dataclass(frozen=True)
class Take:
    """One video to synthesize, in all the files it becomes.

    Attributes:
        person: whose video it is; numbers of the procedural world.
        clip: number of the motion, light and background.
        files: paths relative to the data set's folder, each with what it shows ("images" or "masks") and its crf.
        method: the forgery, or None.
        source: whose face is put in.
    """

    person: int
    clip: int
    files: Mapping[str, tuple[str, int]]
    method: str | None = None
    source: int | None = None


def spread(count: int, shares: Sequence[float]) -> list[int]:
    """Like :func:`~pyface.data.sets.synthesis.deal`, but the first items fill one part each, so no part waits long."""
    parts = deal(max(count, 64), shares)
    firsts = sorted(parts.index(part) for part in range(len(shares)))
    return [*(parts[i] for i in firsts), *(part for i, part in enumerate(parts) if i not in firsts)][:count]


_POOL = 16


@lru_cache(maxsize=256)
def couple(seed: int, pair: int) -> tuple[int, int]:
    """Numbers of two procedural people who could pass for each other: of like skin, sex and age.

    Forgers choose such pairs, and so do the real data sets; among strangers every swap would show at a glance.
    """
    from pyface.data.procedural import draw_person

    one, *others = (draw_person(seed, _POOL * pair + i) for i in range(_POOL))

    def difference(other) -> float:
        skin = abs(one.skin.tone - other.skin.tone)
        return 4 * skin + 2 * abs(one.female - other.female) + abs(one.age - other.age) / 20

    return one.identity, min(others, key=difference).identity


# The head fills about half of a video's height, as in the talking-head videos of the real data sets.
FRAMING = 0.85
MASK_CRF = 10
_SHOWN = {"images": "image", "gaze": "gaze"}


def film(
    take: Take, *, seed: int, frames: int, image_size: int, framing: float = FRAMING, step: int = 1
) -> dict[str, torch.Tensor]:
    """What a take shows; depends on the arguments alone.

    Args:
        take: who, and how it is forged.
        seed: of the procedural world.
        frames: T.
        image_size: side in pixels.
        framing: size of the head, relative to a loose face crop.
        step: every so manyth frame of the clip, which has 25 per second.

    Returns:
        ``images``, Tensor[T, 3, H, W] float32 in [0, 1]; ``gaze``, Tensor[T, 2] radians (pitch, yaw) of the eyes in
        them; of a forgery ``masks`` like ``images``.
    """
    from pyface.data.forgery import forge
    from pyface.data.procedural import draw_clip, draw_person, render

    person = draw_person(seed, take.person)
    views = [
        replace(view, framing=replace(view.framing, scale=view.framing.scale * framing))
        for view in draw_clip(seed, take.clip, frames * step)[::step]
    ]
    if take.method is None:
        samples = render([person] * frames, views, image_size)
        return {name: torch.stack([torch.as_tensor(s[key]) for s in samples]) for name, key in _SHOWN.items()}
    source = draw_person(seed, take.source)
    # Every video is forged with its own random numbers, whatever the method.
    forged = forge(take.method, person, views, source, seed=(seed << 20) + take.clip, image_size=image_size)
    masks = forged.masks.float().expand(-1, 3, -1, -1)
    return {"images": forged.images, "gaze": forged.gaze, "masks": masks}


def write_takes(
    out: Path, takes: Sequence[Take], *, seed: int, frames: int, image_size: int, progress: Progress, workers: int = 1
) -> None:
    """Write the videos that are still missing; files appear whole or not at all, so the existing ones are kept."""
    total = sum(len(take.files) for take in takes)
    progress.start(total)
    missing = [
        replace(take, files={file: how for file, how in take.files.items() if not (out / file).exists()})
        for take in takes
    ]
    progress.advance(total - sum(len(take.files) for take in missing))
    work = partial(_write_take, out, seed=seed, frames=frames, image_size=image_size)
    share(work, [take for take in missing if take.files], progress, workers)


def _write_take(out: Path, take: Take, **settings: int) -> int:
    shown = film(take, **settings)
    for file, (what, crf) in take.files.items():
        write_video(out / file, shown[what], crf=crf)
    return len(take.files)
