"""Cross-forgery protocols: videos chosen by forgery family and split, as clips of face crops.

Detectors that only know what they were trained on are of little use, so they are trained on some families of forgeries
and tested on others. Here stands the data side, the same for procedural people and for the folders of FaceForensics++,
DFD, Celeb-DF and WildDeepfake::

    train = face_clips(Part("procedural", ("blend_swap", "texture")), "train", videos=40, size=96)
    (part,) = parse_parts("splice", "procedural")
    test = face_clips(part, "test", videos=20, size=96)

Real videos belong to every family: each part brings them along, so what is compared differs in the fakes alone. Where a
data set has no validation split, every fifth identity of the training videos makes one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyface.data.crop import FaceCrop, cut
from pyface.data.forgery import FORGERIES
from pyface.data.images import replacing
from pyface.data.sets.base import choose
from pyface.data.sets.clips import FAKE, REAL, Clip, Evenly, Every, Take, VideoSet, couple, film
from pyface.data.sets.folders import EmptySplit
from pyface.errors import UserError

PROCEDURAL = "procedural"
SPLITS = ("train", "val", "test")
# The face's box fills this part of a procedural clip's side at framing 1.
_BOX = 0.72
# Couples of the procedural world that no layout of pyface synthesize has; the splits share nobody.
_COUPLES = {"train": 100_000, "val": 200_000, "test": 300_000}


@dataclass(frozen=True)
class Part:
    """Some forgery families of one data set.

    Attributes:
        data: "procedural", or the folder of a data set.
        families: names as :func:`families` gives them; None for all.
    """

    data: str
    families: tuple[str, ...] | None = None

    def __str__(self) -> str:
        names = "all" if self.families is None else ",".join(self.families)
        return f"{self.data if self.data == PROCEDURAL else Path(self.data).name}: {names}"


@dataclass(frozen=True, eq=False)
class FaceClip:
    """Face crops of one video, and what is known about it.

    Attributes:
        id: unique within its data set.
        label: 0 = real, 1 = fake.
        family: how it was forged; "real" if it was not.
        identity, source: who is seen, and whose face or expression was put in ("" if unknown or real).
        faces: ndarray[T, S, S, 3] uint8 RGB, T at least 1; may be a memory map.
        gaze: ndarray[T, 2] float32 radians (pitch, yaw) in camera coordinates, what the eyes in ``faces`` show; None
            where it is not known, that is, for every data set but the procedural one.
    """

    id: str
    label: int
    family: str
    identity: str
    source: str
    faces: np.ndarray
    gaze: np.ndarray | None = None


def families(data: str | os.PathLike) -> tuple[str, ...]:
    """Names of the forgery families of a data set: of "procedural", or of a folder.

    Raises:
        UserError: the folder holds no data set of videos.
    """
    if data == PROCEDURAL:
        return FORGERIES
    found = [record.method for _, record in _records(data, None) if record.label == FAKE]
    return tuple(dict.fromkeys(found))


def parse_parts(text: str, data: str) -> list[Part]:
    """What ``--train-on`` and ``--test-on`` say.

    Args:
        text: items separated by commas. An item is "all" (of ``data``), a family of ``data``, a data set ("procedural"
            or a folder) with all its families, or DATASET:FAMILY.
        data: "procedural" or a folder, which families are looked for in.

    Returns:
        One part per data set, in the order of first mention.

    Raises:
        UserError: nothing is named, or something that is neither a family nor a data set.
    """
    chosen: dict[str, list[str] | None] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        home, family = _parse_item(item, data)
        if family is None:
            chosen[home] = None
        else:
            before = chosen.setdefault(home, [])
            if before is not None and family not in before:
                before.append(family)
    if not chosen:
        raise UserError("name at least one forgery family or data set, such as 'all', 'splice' or the path of a folder")
    return [Part(home, None if names is None else tuple(names)) for home, names in chosen.items()]


def test_parts(train_on: str, test_on: str, data: str) -> list[Part]:
    """What ``--test-on`` says where it may also be "seen" or "unseen": families of ``data`` that are, or are not, in
    ``train_on``. Otherwise, and for the errors, see :func:`parse_parts`.
    """
    if test_on not in ("seen", "unseen"):
        return parse_parts(test_on, data)
    trained = [part for part in parse_parts(train_on, data) if part.data == data]
    seen = {name for part in trained for name in part.families or families(data)}
    wanted = tuple(name for name in families(data) if (name in seen) == (test_on == "seen"))
    if not wanted:
        names = ", ".join(families(data)) or "none"
        raise UserError(f"no family of {data} is {test_on}: train_on is {train_on!r}, the families are {names}")
    return [Part(data, wanted)]


test_parts.__test__ = False  # not a test, whatever its name


def _parse_item(item: str, data: str) -> tuple[str, str | None]:
    if item == "all":
        return data, None
    if item == PROCEDURAL:
        return PROCEDURAL, None
    if Path(item).is_dir():
        return str(Path(item).resolve()), None
    home, colon, family = item.rpartition(":")
    if colon:
        if home != PROCEDURAL and not Path(home).is_dir():
            raise UserError(f"{item!r}: {home} is neither {PROCEDURAL!r} nor a folder; expected DATASET:FAMILY")
        home = home if home == PROCEDURAL else str(Path(home).resolve())
    else:
        home = data
    known = families(home)
    if family not in known:
        raise UserError(
            f"{family!r} is no forgery family of {home} and no folder; its families are {', '.join(known) or 'none'}"
        )
    return home, family


def face_clips(
    part: Part,
    split: str,
    *,
    size: int,
    margin: float = 1.3,
    frames: int = 16,
    step: int | None = None,
    videos: int | None = None,
    seed: int = 0,
    detector: str = "cascade",
    cache: str | os.PathLike | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] | None = None,
) -> list[FaceClip]:
    """The videos of a part as face crops: the real ones, and the fakes of its families.

    Args:
        part: what to take.
        split: "train", "val" or "test"; nobody is in two of them, as far as the data set allows.
        size: side S of the crops in pixels.
        margin: side of the crop in sides of the detected face box. Frames of WildDeepfake are crops already and taken
            whole; procedural clips are rendered at ``size``, framed accordingly.
        frames: T, of each video; fewer where it has fewer, or a face in fewer.
        step: take every so manyth frame from the first on; None spreads them evenly over the whole video (procedural
            clips: over 8 T frames at 25 per second). 1 gives consecutive frames.
        videos: at most so many real ones and so many fakes of each family, the same ones each time; None for all
            (procedural: 40).
        seed: of the procedural people, and of the choice of ``videos``.
        detector: of faces, see :func:`pyface.data.detect.get_detector`.
        cache: a folder of your run to keep the crops in; they are memory maps then, and an interrupted call goes on.
            Without it everything is held in memory.
        progress: wraps what is iterated over, to draw a bar.

    Raises:
        UserError: unknown split or family, a bad number, no such videos, or none of them shows a face. Single videos
            that cannot be read or show no face are left out, with one warning that counts them.
    """
    choose(split, SPLITS, "split", "face clips")
    if size < 16 or frames < 1 or margin <= 0 or (step is not None and step < 1) or (videos is not None and videos < 1):
        raise UserError(
            f"face clips: need size >= 16, frames, step and videos >= 1 and margin > 0; "
            f"got {size}, {frames}, {step}, {videos} and {margin}"
        )
    if part.families is not None:
        known = families(part.data)
        for name in part.families:
            choose(name, known, "forgery family", part.data)
    settings = {
        "data": part.data, "split": split, "size": size, "margin": margin, "frames": frames, "step": step, "seed": seed,
        "detector": detector,
    }  # fmt: skip
    folder = None
    if cache is not None:
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
        folder = Path(cache) / f"{split}-{digest}"
    if part.data == PROCEDURAL:
        jobs = _procedural(part.families or FORGERIES, split, 40 if videos is None else videos, seed)
        read = _Renderer(settings)
    else:
        jobs = _chosen(_records(part.data, split), part, videos, seed)
        read = _Reader(settings, folder)
    found, problems = [], []
    for job in (progress or (lambda items: items))(jobs):
        try:
            found.append(_kept(folder, job, read))
        except UserError as error:
            problems.append(str(error))
    if problems:
        message = f"{len(problems)} of {len(jobs)} videos of {part} ({split}) cannot be used; the first: {problems[0]}"
        if not found:
            raise UserError(message)
        warnings.warn(f"{message}; left out", stacklevel=2)
    return found


def describe(clips: Sequence[FaceClip]) -> str:
    """In words how many videos these are, as "40 real, 40 splice"."""
    counts: dict[str, int] = {}
    for clip in sorted(clips, key=lambda clip: (clip.label, clip.family)):
        counts[clip.family] = counts.get(clip.family, 0) + 1
    return ", ".join(f"{number} {family}" for family, number in counts.items())


# ---------------------------------------------------------------------------------------------------- videos of a part


@dataclass(frozen=True)
class _Job:
    """One video to be read: what the clip says of it, and where it comes from."""

    id: str
    label: int
    family: str
    identity: str
    source: str
    origin: Any


def _procedural(names: Sequence[str], split: str, videos: int, seed: int) -> list[_Job]:
    """Jobs of the procedural world: the fakes of a couple show what its real video shows, as in FaceForensics++."""
    jobs = []
    for number in range(videos):
        clip = _COUPLES[split] + number
        person, source = couple(seed, clip)
        for method in (None, *names):
            take = Take(person, clip, {}, method, source)
            family, label, other = (method, FAKE, str(source)) if method else ("real", REAL, "")
            jobs.append(_Job(f"{family}/{split}-{number:04d}", label, family, str(person), other, take))
    return jobs


def _records(data: str | os.PathLike, split: str | None) -> list[tuple[VideoSet, Clip]]:
    """(reader, record) of the videos of one split of a folder, or of all."""
    from pyface.data.sets.recognise import KNOWN, recognise

    found, problems, readers = [], [], 0
    for name in recognise(data):
        for address in KNOWN[name].readers:
            module, title = address.split(":")
            reader = getattr(importlib.import_module(f"pyface.data.sets.{module}"), title)
            if not issubclass(reader, VideoSet):
                continue
            readers += 1
            try:
                found += _split_of(reader, data, split)
            except EmptySplit as error:
                problems.append(error)
    if not readers:
        raise UserError(f"{data} holds no data set of real and forged videos that pyface knows")
    if not found:
        raise problems[0]
    return found


def _split_of(reader: type[VideoSet], data: str | os.PathLike, split: str | None) -> list[tuple[VideoSet, Clip]]:
    own = reader.splits()
    if split is None or split in own:
        within = split
    elif split == "val" and "train" in own:
        within = "train"
    else:
        raise EmptySplit(f"{reader.title}: {data} has videos for {' and '.join(own)} only, none for {split}")
    made = reader(data, within, **_options(reader, data, within))
    records = made.records
    if split in ("train", "val") and "val" not in own:
        records = [record for record in records if (zlib.crc32(record.identity.encode()) % 5 == 0) == (split == "val")]
    return [(made, record) for record in records]


def _options(reader: type[VideoSet], data: str | os.PathLike, split: str | None) -> dict[str, Any]:
    """What a reader must be told: the compression and the families that are there, training without test people."""
    from pyface.data.sets.celebdf import CelebDF
    from pyface.data.sets.faceforensics import METHODS, FaceForensics

    options: dict[str, Any] = {}
    there = list(dict.fromkeys(part["compression"] for part in reader.parts(data) if "compression" in part))
    if there:
        options["compression"] = "c23" if "c23" in there else there[0]
    if reader is FaceForensics:
        forged = Path(data) / "manipulated_sequences"
        options["methods"] = [name for name in (*METHODS, "FaceShifter") if (forged / name).is_dir()]
    if reader is CelebDF and split == "train":
        options["disjoint"] = True
    return options


def _chosen(records: Sequence[tuple[VideoSet, Clip]], part: Part, videos: int | None, seed: int) -> list[_Job]:
    groups: dict[str, list[tuple[VideoSet, Clip]]] = {}
    for reader, record in records:
        if record.label == REAL or part.families is None or record.method in part.families:
            groups.setdefault(record.method, []).append((reader, record))
    jobs = []
    for family, group in groups.items():
        if videos is not None and len(group) > videos:
            rng = np.random.default_rng((seed, zlib.crc32(family.encode())))
            group = [group[index] for index in sorted(rng.permutation(len(group))[:videos])]
        jobs += [_Job(r.id, r.label, r.method, r.identity, r.source or "", (reader, r)) for reader, r in group]
    return jobs


# ------------------------------------------------------------------------------------------------------- their pictures


@dataclass(frozen=True)
class _Renderer:
    """Renders the videos of procedural people."""

    settings: dict[str, Any]

    def __call__(self, job: _Job) -> tuple[np.ndarray, np.ndarray | None]:
        about = self.settings
        framing = 1 / (_BOX * about["margin"])
        shown = film(
            job.origin, seed=about["seed"], frames=about["frames"], image_size=about["size"], framing=framing,
            step=8 if about["step"] is None else about["step"],
        )  # fmt: skip
        pixels = (shown["images"] * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        return pixels, shown["gaze"].float().numpy()


class _Reader:
    """Reads videos of a folder and cuts out their faces."""

    def __init__(self, settings: dict[str, Any], folder: Path | None) -> None:
        self.settings = settings
        boxes = None if folder is None else folder / "boxes"
        self.crop = FaceCrop(settings["margin"], settings["size"], settings["detector"], cache=boxes)
        frames, step = settings["frames"], settings["step"]
        self.choose = Evenly(frames) if step is None else Every(step, frames)

    def __call__(self, job: _Job) -> tuple[np.ndarray, np.ndarray | None]:
        from pyface.data.sets.wilddeepfake import WildDeepfake

        reader, record = job.origin
        footage = reader.footage(record)
        indices = self.choose(footage)
        if not indices:
            raise UserError(f"{footage.name} has none of the frames that are asked for")
        if isinstance(reader, WildDeepfake):
            height, width = footage.size
            whole = (width / 2, height / 2, min(height, width))
            frames = footage.pixels(indices)
            return np.stack([cut(frame, whole, self.settings["size"]) for frame in frames]), None
        faces = self.crop.follow(footage, record.id, indices)
        return faces.pixels(range(len(faces))), None


def _kept(folder: Path | None, job: _Job, read: Callable[[_Job], tuple[np.ndarray, np.ndarray | None]]) -> FaceClip:
    """A clip out of the folder, put there first if it is missing."""
    about = {name: getattr(job, name) for name in ("id", "label", "family", "identity", "source")}
    if folder is None:
        return FaceClip(**about, **dict(zip(("faces", "gaze"), read(job))))
    file, gaze_file = (folder / f"{job.id}{suffix}" for suffix in (".npy", ".gaze.npy"))
    if not file.exists():
        faces, gaze = read(job)
        for path, values in ((gaze_file, gaze), (file, faces)):
            if values is not None:
                with replacing(path, overwrite=True) as temporary, open(temporary, "wb") as stream:
                    np.save(stream, values)
    try:
        gaze = np.load(gaze_file) if gaze_file.exists() else None
        return FaceClip(**about, faces=np.load(file, mmap_mode="r"), gaze=gaze)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it") from error
