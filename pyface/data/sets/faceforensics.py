"""FaceForensics++: 1000 real videos and four forgeries of each (Rössler et al., ICCV 2019)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pyface.data.crop import FaceCrop
from pyface.data.sets.base import choose
from pyface.data.sets.clips import (
    FAKE,
    MASK_CRF,
    REAL,
    SAMPLING,
    Clip,
    Sampling,
    Take,
    VideoSet,
    check_folder,
    couple,
    require,
    spread,
    write_takes,
)
from pyface.data.sets.folders import check_root, read_json
from pyface.data.sets.synthesis import Progress, write_json
from pyface.data.video import Footage, open_video
from pyface.errors import UserError

METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
COMPRESSIONS = {"raw": 0, "c23": 23, "c40": 40}
SPLITS = ("train", "val", "test")
SOURCES = ("auto", "videos", "images")
LAYOUT = """\
  original_sequences/youtube/{raw,c23,c40}/videos/NNN.mp4
  manipulated_sequences/{Deepfakes,Face2Face,FaceSwap,NeuralTextures}/{raw,c23,c40}/videos/TTT_SSS.mp4
  manipulated_sequences/.../masks/videos/TTT_SSS.mp4   (only where masks are used)
  splits/{train,val,test}.json
with images/NNN/####.png and images/TTT_SSS/####.png in place of the videos where frames were extracted"""
# What stands in for each of the four; they leave the traces of its family.
FORGERIES = {
    "Deepfakes": "blend_swap",
    "Face2Face": "reenactment",
    "FaceSwap": "splice",
    "NeuralTextures": "texture",
}
# 720, 140 and 140 of 1000 videos.
SHARES = (36, 7, 7)


class FaceForensics(VideoSet):
    """FaceForensics++ as its download script lays it out, or with frames extracted as its repository's script does.

    A fake ``TTT_SSS`` is video TTT with the face or the expression of video SSS; ``identity`` is TTT, ``source`` SSS.
    The official splits are lists of pairs; both orders of a pair are forged. ACMF's frames, which lack the folder
    ``youtube``, are read as well.

    Args:
        root: the folder with ``original_sequences`` and ``manipulated_sequences``.
        split: "train", "val" or "test"; None for all.
        methods: of :data:`METHODS`, or "FaceShifter", which came later.
        compression: "raw", "c23" or "c40".
        source: "videos", "images" (extracted frames), or "auto": the videos where they are.
        splits: the folder of the split files if it is not ``root/splits``; the download script does not bring them.
        first_only: take only the first order of each pair and its target video, as ACMF does: half of the videos.
        partial: leave out videos that the split lists and the folder lacks, instead of refusing.
        sampling, crop: see :class:`~pyface.data.sets.clips.VideoSet`.

    Raises:
        UserError: the folder is laid out otherwise, a split file is missing or damaged, listed videos are missing.
    """

    title = "FaceForensics++"
    layout = LAYOUT

    def __init__(
        self,
        root: str | os.PathLike,
        split: str | None = "train",
        *,
        methods: Sequence[str] = METHODS,
        compression: str = "c23",
        source: str = "auto",
        splits: str | os.PathLike | None = None,
        first_only: bool = False,
        partial: bool = False,
        sampling: Sampling = SAMPLING,
        crop: FaceCrop | None = None,
    ) -> None:
        if split is not None:
            choose(split, SPLITS, "split", self.title)
        choose(compression, tuple(COMPRESSIONS), "compression", self.title)
        for method in methods:
            choose(method, (*METHODS, "FaceShifter"), "method", self.title)
        root = check_root(root, ["original_sequences", "manipulated_sequences"], name=self.title, layout=LAYOUT)
        pairs = _read_pairs(Path(root / "splits" if splits is None else splits), split)
        if not first_only:
            pairs = [(name, order) for name, (a, b) in pairs for order in ((a, b), (b, a))]
        originals = find_folder(
            [root / "original_sequences/youtube" / compression, root / "original_sequences" / compression],
            source, self.title, LAYOUT,
        )  # fmt: skip
        videos = check_folder(originals, title=self.title, layout=LAYOUT)
        wanted = {target: name for name, (target, _) in pairs}
        if not partial:
            require(videos, list(wanted), originals, self.title)
        records = [
            Clip(f"original/{target}", videos[target], REAL, "real", target, None, name)
            for target, name in wanted.items()
            if target in videos
        ]
        self._masks: dict[str, Path] = {}
        for method in methods:
            sequences = root / "manipulated_sequences" / method
            folder = find_folder([sequences / compression], source, self.title, LAYOUT)
            videos = check_folder(folder, title=self.title, layout=LAYOUT)
            if not partial:
                require(videos, [f"{target}_{source}" for _, (target, source) in pairs], folder, self.title)
            for name, (target, source_id) in pairs:
                video = f"{target}_{source_id}"
                if video in videos:
                    records.append(Clip(f"{method}/{video}", videos[video], FAKE, method, target, source_id, name))
                    self._masks[f"{method}/{video}"] = sequences / "masks/videos" / f"{video}.mp4"
        super().__init__(root, split, records, sampling, crop)

    def mask(self, index: int) -> Footage:
        """White where video ``index`` was forged. UserError for a real video, or if there is no mask video."""
        record = self.records[index]
        if record.label == REAL:
            raise UserError(f"{self.title}: {record.id} is real and has no mask")
        if not self._masks[record.id].is_file():
            raise UserError(f"{self.title}: {self._masks[record.id]} is missing; download the masks of {record.method}")
        return open_video(self._masks[record.id])

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return SPLITS

    @classmethod
    def parts(cls, root: str | os.PathLike) -> list[dict[str, str]]:
        folders = [Path(root, "original_sequences/youtube"), Path(root, "original_sequences")]
        there = [name for name in COMPRESSIONS if any((folder / name).is_dir() for folder in folders)]
        return [{"split": split, "compression": name} for name in there for split in SPLITS]


def find_folder(places: Sequence[Path], source: str, title: str, layout: str) -> Path:
    """The folder of videos or of extracted frames in the first of ``places`` that has one.

    Raises:
        UserError: there is none, or ``source`` is not one of :data:`SOURCES`.
    """
    choose(source, SOURCES, "source", title)
    kinds = SOURCES[1:] if source == "auto" else (source,)
    for place in places:
        for kind in kinds:
            if (place / kind).is_dir():
                return place / kind
    raise UserError(f"{title}: {places[0] / kinds[0]} is missing; expected\n{layout}")


def _read_pairs(folder: Path, split: str | None) -> list[tuple[str, tuple[str, str]]]:
    """(split, (target, source)) of each line of the official lists."""
    what = (
        'an official list of pairs, [["071", "054"], ...]; the download script does not bring it: copy dataset/splits '
        "from https://github.com/ondyari/FaceForensics"
    )
    pairs = []
    for name in SPLITS if split is None else (split,):
        content = read_json(folder / f"{name}.json", name=FaceForensics.title, what=what)
        try:
            for pair in content:
                a, b = pair
                if not (isinstance(a, str) and isinstance(b, str) and a and b):
                    raise TypeError
                pairs.append((name, (a, b)))
        except (TypeError, ValueError):
            raise UserError(f"{FaceForensics.title}: {folder / name}.json is damaged; it should be {what}") from None
    return pairs


def synthesize(
    out: Path,
    count: int,
    *,
    seed: int,
    image_size: int,
    progress: Progress,
    workers: int = 1,
    frames: int = 28,
    compressions: Sequence[str] = ("c23", "c40"),
) -> None:
    """Write procedural people in the layout of FaceForensics++.

    Args:
        out: the data set's folder.
        count: real videos, and fakes of each method. They come in pairs: an odd count grows by one.
        seed, image_size, progress, workers: as everywhere in synthesis; an odd size grows by one pixel.
        frames: of each video; the default makes two clips of 14.
        compressions: of :data:`COMPRESSIONS`; "raw" takes a megabyte per video.
    """
    for name in compressions:
        choose(name, tuple(COMPRESSIONS), "compression", FaceForensics.title)
    pairs = [(f"{2 * k:03d}", f"{2 * k + 1:03d}") for k in range((count + 1) // 2)]
    parts = spread(len(pairs), SHARES)
    for part, name in enumerate(SPLITS):
        chosen = [list(pair) for pair, place in zip(pairs, parts) if place == part]
        write_json(out / "splits" / f"{name}.json", chosen)
    takes = []
    for target, source in [order for a, b in pairs for order in ((a, b), (b, a))]:
        people = couple(seed, int(target) // 2)
        person, other = people[int(target) % 2], people[int(source) % 2]
        folders = {name: f"{name}/videos" for name in compressions}
        files = {
            f"original_sequences/youtube/{folder}/{target}.mp4": ("images", COMPRESSIONS[name])
            for name, folder in folders.items()
        }
        takes.append(Take(person, int(target), files))
        for method, forgery in FORGERIES.items():
            sequences, video = f"manipulated_sequences/{method}", f"{target}_{source}.mp4"
            files = {
                f"{sequences}/{folder}/{video}": ("images", COMPRESSIONS[name]) for name, folder in folders.items()
            }
            files[f"{sequences}/masks/videos/{video}"] = ("masks", MASK_CRF)
            takes.append(Take(person, int(target), files, forgery, other))
    settings = {"seed": seed, "frames": frames, "image_size": image_size}
    write_takes(out, takes, **settings, progress=progress, workers=workers)
