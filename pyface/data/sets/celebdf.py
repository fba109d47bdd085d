"""Celeb-DF v2: celebrities' interviews and good face swaps between them (Li et al., CVPR 2020)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pyface.data.crop import FaceCrop
from pyface.data.sets.base import choose
from pyface.data.sets.clips import (
    FAKE,
    REAL,
    SAMPLING,
    Clip,
    Sampling,
    Take,
    VideoSet,
    by_split,
    check_folder,
    couple,
    write_takes,
)
from pyface.data.sets.folders import check_root, read_text
from pyface.data.sets.synthesis import Progress, write_text
from pyface.errors import UserError

FOLDERS = {"Celeb-real": REAL, "YouTube-real": REAL, "Celeb-synthesis": FAKE}
SPLITS = ("train", "test")
LIST = "List_of_testing_videos.txt"
LAYOUT = """\
  Celeb-real/id0_0000.mp4
  YouTube-real/00000.mp4
  Celeb-synthesis/id0_id1_0000.mp4
  List_of_testing_videos.txt
or frames of the test videos, as ACMF keeps them:
  {real_test,fake_test}/images/<video>/####.png"""


class CelebDF(VideoSet):
    """Celeb-DF v2 as it is downloaded, or ACMF's frames of its test videos.

    The official list names the test videos; all others are for training. **In that list 1 is real and 0 is fake**;
    ``label`` is 0 for real and 1 for fake, as everywhere in pyface. A fake ``id0_id1_0003`` is the recording
    ``id0_0003`` with the face of ``id1``. The people of YouTube-real are not known: each video counts as one.

    Nearly all celebrities are in both splits; that is how the data set is made. Even single recordings are: the list
    names id4_id1_0003 but not id4_0003, which shows the same moments. ``disjoint`` leaves those out of training.

    Args:
        root: the folder with the list, or with ``real_test`` and ``fake_test``.
        split: "train" or "test"; None for both.
        disjoint: take only training videos whose recording no test video shows.
        sampling, crop: see :class:`~pyface.data.sets.clips.VideoSet`.

    Raises:
        UserError: the folder is laid out otherwise; the list is missing or has a label other than 0 and 1, a label that
            contradicts the folder, or a video that is not there; a file's name is not one of Celeb-DF's.
    """

    title = "Celeb-DF"
    layout = LAYOUT

    def __init__(
        self,
        root: str | os.PathLike,
        split: str | None = "test",
        *,
        disjoint: bool = False,
        sampling: Sampling = SAMPLING,
        crop: FaceCrop | None = None,
    ) -> None:
        if split is not None:
            choose(split, SPLITS, "split", self.title)
        expected = [(folder, "real_test", "fake_test") for folder in (*FOLDERS, LIST)]
        root = check_root(root, expected, name=self.title, layout=LAYOUT)
        records = self._frames(root) if (root / "real_test").is_dir() else self._videos(root)
        if disjoint:
            tested = {recording(record) for record in records if record.split == "test"}
            records = [record for record in records if record.split == "test" or recording(record) not in tested]
        super().__init__(root, split, by_split(records, split), sampling, crop)

    def _videos(self, root: Path) -> list[Clip]:
        tested = _read_list(root)
        records = []
        for folder, label in FOLDERS.items():
            for name, path in check_folder(root / folder, title=self.title, layout=LAYOUT).items():
                split = "test" if (folder, name) in tested else "train"
                records.append(_clip(f"{folder}/{name}", path, label, split))
        there = {record.id for record in records}
        absent = ["/".join(video) for video in tested if "/".join(video) not in there]
        if absent:
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            raise UserError(f"{self.title}: {root} lacks {absent[0]}.mp4{more}, which {LIST} names")
        return records

    def _frames(self, root: Path) -> list[Clip]:
        records = []
        for folder, label in (("real_test", REAL), ("fake_test", FAKE)):
            for name, path in check_folder(root / folder / "images", title=self.title, layout=LAYOUT).items():
                kind = "Celeb-synthesis" if label == FAKE else "Celeb-real" if "_" in name else "YouTube-real"
                records.append(_clip(f"{kind}/{name}", path, label, "test"))
        return records

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return SPLITS

    @classmethod
    def parts(cls, root: str | os.PathLike) -> list[dict[str, str]]:
        return [{"split": split} for split in (("test",) if Path(root, "real_test").is_dir() else SPLITS)]


def recording(record: Clip) -> str:
    """The real video that a video shows: its own name, or of a fake "id0_id1_0003" the recording "id0_0003"."""
    return re.sub(r"_id\d+_", "_", record.id.partition("/")[2])


def _clip(id: str, path: Path, label: int, split: str) -> Clip:
    kind, _, name = id.partition("/")
    pattern = {
        "Celeb-real": r"(id\d+)_\d+",
        "YouTube-real": r"(\d+)",
        "Celeb-synthesis": r"(id\d+)_(id\d+)_\d+",
    }[kind]
    match = re.fullmatch(pattern, name)
    if match is None:
        raise UserError(f"{CelebDF.title}: {path} is not a name of {kind}; expected\n{LAYOUT}")
    who = f"youtube{match[1]}" if kind == "YouTube-real" else match[1]
    method, source = ("Celeb-synthesis", match[2]) if label == FAKE else ("real", None)
    return Clip(id, path, label, method, who, source, split)


def _read_list(root: Path) -> set[tuple[str, str]]:
    """(folder, name without suffix) of the test videos."""
    file = root / LIST
    what = 'the official list of test videos, lines such as "1 YouTube-real/00170.mp4" with 1 = real and 0 = fake'
    tested = set()
    for number, line in enumerate(read_text(file, name=CelebDF.title, what=what).splitlines(), 1):
        if not line.strip():
            continue
        label, _, video = line.strip().partition(" ")
        folder, _, name = video.strip().partition("/")
        if label not in ("0", "1") or folder not in FOLDERS or not name:
            raise UserError(f"{CelebDF.title}: {file}, line {number}: {line.strip()!r}; it should be {what}")
        if (label == "1") != (FOLDERS[folder] == REAL):
            truth = "real, so 1" if FOLDERS[folder] == REAL else "fake, so 0"
            raise UserError(f"{CelebDF.title}: {file}, line {number}: label {label}, but {folder} is {truth}")
        tested.add((folder, Path(name).stem))
    return tested


# Couples and clips that no other layout has, so that a test across data sets meets strangers.
_FIRST, _FIRST_STRANGER = 10_000, 15_000


def synthesize(
    out: Path, count: int, *, seed: int, image_size: int, progress: Progress, workers: int = 1, frames: int = 28
) -> None:
    """Write procedural people in the layout of Celeb-DF v2.

    Every person has four recordings; a neighbour's face is swapped into each. The second of the four is in the test
    list, with its swap, and so is every fourth of the videos from YouTube.

    Args:
        out: the data set's folder.
        count: videos in Celeb-real and in Celeb-synthesis; YouTube-real has half as many, as in the real one.
        seed, image_size, progress, workers: as everywhere in synthesis; an odd size grows by one pixel.
        frames: of each video.
    """
    takes, listed = [], []
    for k in range(count):
        # People come in pairs that lend each other their faces: 0, 1, 0, 1, 0, 1, 0, 1, 2, 3...
        person, take = k % 2 + 2 * (k // 8), k // 2 % 4
        partner = person ^ 1
        people = couple(seed, _FIRST + person // 2)
        one, other = people[person % 2], people[partner % 2]
        real, fake = f"Celeb-real/id{person}_{take:04d}.mp4", f"Celeb-synthesis/id{person}_id{partner}_{take:04d}.mp4"
        clip = _FIRST + 4 * person + take
        takes.append(Take(one, clip, {real: ("images", 23)}))
        takes.append(Take(one, clip, {fake: ("images", 23)}, "blend_swap", other))
        if take == 1:
            listed += [f"1 {real}", f"0 {fake}"]
    for k in range((count + 1) // 2):
        video = f"YouTube-real/{k:05d}.mp4"
        stranger = couple(seed, _FIRST_STRANGER + k // 2)[k % 2]
        takes.append(Take(stranger, _FIRST_STRANGER + k, {video: ("images", 23)}))
        if k % 4 == 1:
            listed.append(f"1 {video}")
    write_text(out / LIST, "".join(f"{line}\n" for line in sorted(listed, reverse=True)))
    settings = {"seed": seed, "frames": frames, "image_size": image_size}
    write_takes(out, takes, **settings, progress=progress, workers=workers)
