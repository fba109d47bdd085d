"""WildDeepfake: face crops of videos found on the internet, real and fake (Zi et al., ACM Multimedia 2020)."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from pyface.data.crop import FaceCrop
from pyface.data.images import FORMATS, SUFFIXES, replacing
from pyface.data.sets.base import choose
from pyface.data.sets.clips import FAKE, REAL, SAMPLING, Clip, Sampling, Take, VideoSet, couple, film, spread
from pyface.data.sets.folders import check_root, natural, read_json, to_pixels
from pyface.data.sets.synthesis import Progress, share
from pyface.data.video import Footage, FrameFolder, Pictures
from pyface.errors import UserError

KINDS = {"real": REAL, "fake": FAKE}
SPLITS = ("train", "test")
SUFFIX = ".tar.gz"
LAYOUT = """\
  {real,fake}_{train,test}/K.tar.gz, each with K/{real|fake}/<sequence>/<frame>.png in it,
  or the same unpacked: {real,fake}_{train,test}/K/{real|fake}/<sequence>/<frame>.png"""

Member = tuple[str, int, int]
"""Name of a frame, where its bytes begin in the unzipped archive, how many they are."""


class WildDeepfake(VideoSet):
    """WildDeepfake as it is downloaded, in archives that are read without unpacking them, or unpacked.

    A record is a sequence of face crops. Which person or method is behind it is not known: ``identity`` is the number K
    of the video, ``source`` is None. Construction lists every archive, which decompresses it once; give an ``index``
    to do so only once. Frames of an archive are found by decompressing what is before them: read sequences in order,
    or unpack the archives.

    Args:
        root: the folder with ``real_train``, ``fake_train``, ``real_test``, ``fake_test``; only those asked for are
            needed, and folders and archives may be mixed.
        split: "train" or "test"; None for both.
        containing: take only sequences whose name contains this; ACMF uses its own crops, named "new".
        index: a JSON file of your run, not of the data set, for the lists of the archives. A changed archive is
            listed anew.
        sampling, crop: see :class:`~pyface.data.sets.clips.VideoSet`. The frames are face crops already.

    Raises:
        UserError: the folder is laid out otherwise, an archive is damaged, or a folder's label is not its parent's.
    """

    title = "WildDeepfake"
    layout = LAYOUT

    def __init__(
        self,
        root: str | os.PathLike,
        split: str | None = "test",
        *,
        containing: str = "",
        index: str | os.PathLike | None = None,
        sampling: Sampling = SAMPLING,
        crop: FaceCrop | None = None,
    ) -> None:
        if split is not None:
            choose(split, SPLITS, "split", self.title)
        wanted = SPLITS if split is None else (split,)
        root = check_root(root, [f"{kind}_{s}" for s in wanted for kind in KINDS], name=self.title, layout=LAYOUT)
        self._members: dict[str, list[Member]] = {}
        lists = _Lists(root, index)
        records = []
        for part in wanted:
            for kind, label in KINDS.items():
                folder = root / f"{kind}_{part}"
                for video, path in _videos(folder):
                    inside = {} if path.is_dir() else lists.of(path)
                    for sequence, place in self._sequences(video, path, kind, inside):
                        if containing not in sequence:
                            continue
                        id = f"{folder.name}/{video}/{sequence}"
                        method = "unknown" if label == FAKE else "real"
                        records.append(Clip(id, place, label, method, f"{folder.name}/{video}", None, part))
                        if place == path:
                            self._members[id] = inside[f"{video}/{kind}/{sequence}"]
        lists.save()
        super().__init__(root, split, records, sampling, crop)

    def _sequences(self, video: str, path: Path, kind: str, inside: Mapping[str, Any]) -> list[tuple[str, Path]]:
        """(name, folder or archive) of each sequence of video K; ``inside`` is what an archive holds."""
        if path.is_dir():
            labels = {entry.name for entry in path.iterdir() if entry.is_dir()}
            found = [(e.name, e) for e in (path / kind).iterdir() if e.is_dir()] if kind in labels else []
        else:
            parts = [name.split("/") for name in inside]
            labels = {label for _, label, _ in parts}
            found = [(sequence, path) for number, label, sequence in parts if (number, label) == (video, kind)]
        if not found:
            there = ", ".join(sorted(labels)) or "nothing"
            raise UserError(f"{self.title}: {path} holds {there}, expected {video}/{kind}/<sequence>/<frame>.png")
        return sorted(found, key=lambda pair: natural(pair[0]))

    def footage(self, record: Clip) -> Footage:
        if record.id in self._members:
            return ArchivedFrames(record.path, self._members[record.id], record.id)
        return FrameFolder(record.path)

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return SPLITS

    @classmethod
    def parts(cls, root: str | os.PathLike) -> list[dict[str, str]]:
        return [{"split": s} for s in SPLITS if all(Path(root, f"{kind}_{s}").is_dir() for kind in KINDS)]


def _videos(folder: Path) -> list[tuple[str, Path]]:
    """(K, folder or archive) in natural order. UserError if there is none."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: natural(entry.name)):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found.append((entry.name, entry))
        elif entry.name.endswith(SUFFIX) and not (folder / entry.name.removesuffix(SUFFIX)).is_dir():
            found.append((entry.name.removesuffix(SUFFIX), entry))
    if not found:
        raise UserError(f"{WildDeepfake.title}: {folder} holds no archives and no folders; expected\n{LAYOUT}")
    return found


class _Lists:
    """What is in each archive, looked up in the index file or else listed now."""

    WHAT = "the index that WildDeepfake wrote; delete it to have it written anew"

    def __init__(self, root: Path, index: str | os.PathLike | None) -> None:
        self.root, self.file = root, None if index is None else Path(index)
        self.saved: dict[str, dict] = {}
        self.changed = False
        if self.file is not None and self.file.exists():
            self.saved = read_json(self.file, name=WildDeepfake.title, what=self.WHAT)

    def of(self, path: Path) -> dict[str, list[Member]]:
        """The frames of each sequence, by "K/real/sequence"."""
        key, about = path.relative_to(self.root).as_posix(), path.stat()
        stamp = [about.st_size, about.st_mtime_ns]
        try:
            if key not in self.saved or self.saved[key]["stamp"] != stamp:
                self.saved[key] = {"stamp": stamp, "sequences": _list_archive(path)}
                self.changed = True
            return {
                name: [(frame, int(offset), int(size)) for frame, offset, size in frames]
                for name, frames in self.saved[key]["sequences"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{WildDeepfake.title}: {self.file} is damaged; it should be {self.WHAT}") from error

    def save(self) -> None:
        if self.file is not None and self.changed:
            with replacing(self.file, overwrite=True) as temporary:
                temporary.write_text(json.dumps(self.saved), encoding="utf-8")


def _list_archive(path: Path) -> dict[str, list[Member]]:
    sequences: dict[str, list[Member]] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if member.isfile() and len(parts) == 4 and Path(parts[3]).suffix.lower() in SUFFIXES:
                    if not parts[3].startswith("."):
                        frames = sequences.setdefault("/".join(parts[:3]), [])
                        frames.append((parts[3], member.offset_data, member.size))
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{WildDeepfake.title}: {path} is cut off or damaged ({error}); download it again") from error
    return {name: sorted(frames, key=lambda frame: natural(frame[0])) for name, frames in sequences.items()}


class ArchivedFrames(Pictures):
    """The frames of one sequence in a ``.tar.gz``, read in place."""

    def __init__(self, archive: Path, members: Sequence[Member], name: str) -> None:
        super().__init__(f"{archive} ({name})", [member[0] for member in members])
        self.archive, self.members = archive, members

    def _read(self, order: Sequence[int]) -> Iterable[np.ndarray]:
        from PIL import Image

        for index in order:
            _, offset, size = self.members[index]
            try:
                file, lock = _unzip(self.archive, os.getpid())
                with lock:
                    file.seek(offset)
                    content = file.read(size)
                with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
            except Exception as error:  # a parser fed with hostile bytes may raise anything at all
                if isinstance(error, MemoryError):
                    raise
                reason = f"{self.names[index]} is missing or damaged ({error})"
                raise UserError(f"frame {index} of {self.name}: {reason}") from error
            yield pixels


@lru_cache(maxsize=1)
def _unzip(path: Path, process: int) -> tuple[gzip.GzipFile, threading.Lock]:
    """An archive as an unzipped stream, which only goes forward cheaply. One is kept open by each process."""
    return gzip.open(path), threading.Lock()


# Couples and clips that no other layout has.
_FIRST = 30_000
_SEQUENCES = 2


def synthesize(
    out: Path, count: int, *, seed: int, image_size: int, progress: Progress, workers: int = 1, frames: int = 28
) -> None:
    """Write procedural people in the layout of WildDeepfake: archives of face crops, of which a fifth are for testing.

    Every family of forgeries is among the fakes, in turn.

    Args:
        out: the data set's folder.
        count: sequences of each class. An archive holds two: an odd count grows by one.
        seed, image_size, progress, workers: as everywhere in synthesis.
        frames: of each sequence.
    """
    from pyface.data.forgery import FORGERIES

    families = list(FORGERIES)
    parts = spread((count + 1) // 2, (4, 1))
    progress.start(2 * len(parts))
    missing = []
    for number, part in enumerate(parts):
        for kind, label in KINDS.items():
            archive = out / f"{kind}_{SPLITS[part]}" / f"{number}{SUFFIX}"
            if not archive.exists():
                takes = []
                person, source = couple(seed, _FIRST + number * 2 + label)
                for sequence in range(_SEQUENCES):
                    clip = _FIRST + (number * 2 + label) * _SEQUENCES + sequence
                    method = families[(number * _SEQUENCES + sequence) % len(families)] if label == FAKE else None
                    takes.append(Take(person, clip, {}, method, source))
                missing.append((archive, f"{number}/{kind}", takes))
            else:
                progress.advance()
    share(partial(_write_archive, seed=seed, frames=frames, image_size=image_size), missing, progress, workers)


def _write_archive(job: tuple[Path, str, list[Take]], **settings: int) -> int:
    from PIL import Image

    path, inside, takes = job
    sequences = (film(take, framing=1.0, **settings)["images"] for take in takes)
    # No times and no name in the headers: the same frames give the same bytes.
    with replacing(path) as temporary, open(temporary, "wb") as file:
        with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as zipped:
            with tarfile.open(fileobj=zipped, mode="w") as archive:
                for number, images in enumerate(sequences):
                    for frame, image in enumerate(images):
                        content = io.BytesIO()
                        Image.fromarray(to_pixels(image)).save(content, format="PNG")
                        member = tarfile.TarInfo(f"{inside}/{number}/{frame}.png")
                        member.size = content.tell()
                        content.seek(0)
                        archive.addfile(member, content)
    return 1
