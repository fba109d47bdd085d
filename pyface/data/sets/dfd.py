"""DeepFakeDetection (DFD): actors in scenes and face swaps between them (Google and Jigsaw, 2019)."""

from __future__ import annotations

import hashlib
import os
import re
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
    write_takes,
)
from pyface.data.sets.faceforensics import COMPRESSIONS, find_folder
from pyface.data.sets.folders import check_root
from pyface.data.sets.synthesis import Progress
from pyface.errors import UserError

ACTORS, FORGED = "original_sequences/actors", "manipulated_sequences/DeepFakeDetection"
LAYOUT = """\
  original_sequences/actors/{raw,c23,c40}/videos/AA__scene.mp4
  manipulated_sequences/DeepFakeDetection/{raw,c23,c40}/videos/TT_SS__scene__XXXXXXXX.mp4
with images/<video>/####.png in place of the videos where frames were extracted"""
SCENES = (
    "exit_phone_room", "hugging_happy", "kitchen_pan", "kitchen_still", "meeting_serious",
    "outside_talking_pan_laughing", "outside_talking_still_laughing", "podium_speech_happy", "secret_conversation",
    "talking_against_wall", "talking_angry_couch", "walk_down_hall_angry", "walking_and_outside_surprised",
    "walking_down_indoor_hall_disgust", "walking_down_street_outside_angry", "walking_outside_cafe_disgusted",
)  # fmt: skip


class DFD(VideoSet):
    """DeepFakeDetection as the download script of FaceForensics++ lays it out, which may be the same folder.

    There is no official split and no method here trains on it: all videos are "test". A fake
    ``TT_SS__scene__XXXXXXXX`` is actor TT in that scene with the face of actor SS; ``identity`` is TT, ``source`` SS.

    Args:
        root: the folder with ``original_sequences`` and ``manipulated_sequences``.
        split: "test", or None.
        compression: "raw", "c23" or "c40".
        source: "videos", "images" (extracted frames), or "auto": the videos where they are.
        sampling, crop: see :class:`~pyface.data.sets.clips.VideoSet`.

    Raises:
        UserError: the folder is laid out otherwise, or a name is not one of DFD's.
    """

    title = "DFD"
    layout = LAYOUT

    def __init__(
        self,
        root: str | os.PathLike,
        split: str | None = "test",
        *,
        compression: str = "c23",
        source: str = "auto",
        sampling: Sampling = SAMPLING,
        crop: FaceCrop | None = None,
    ) -> None:
        if split is not None:
            choose(split, self.splits(), "split", self.title)
        choose(compression, tuple(COMPRESSIONS), "compression", self.title)
        root = check_root(root, [ACTORS, FORGED], name=self.title, layout=LAYOUT)
        records = []
        for place, pattern, label in (
            (ACTORS, r"(\d+)__\w+", REAL),
            (FORGED, r"(\d+)_(\d+)__\w+__[A-Z0-9]{8}", FAKE),
        ):
            folder = find_folder([root / place / compression], source, self.title, LAYOUT)
            for name, path in check_folder(folder, title=self.title, layout=LAYOUT).items():
                match = re.fullmatch(pattern, name)
                if match is None:
                    raise UserError(f"{self.title}: {path} is not a name of {place}; expected\n{LAYOUT}")
                method, source_id = ("DeepFakeDetection", match[2]) if label == FAKE else ("real", None)
                home = "actors" if label == REAL else method
                records.append(Clip(f"{home}/{name}", path, label, method, match[1], source_id, "test"))
        super().__init__(root, split, records, sampling, crop)

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return ("test",)

    @classmethod
    def parts(cls, root: str | os.PathLike) -> list[dict[str, str]]:
        there = [name for name in COMPRESSIONS if Path(root, ACTORS, name).is_dir()]
        return [{"split": "test", "compression": name} for name in there]


# Couples and clips that no other layout has.
_FIRST = 20_000


def synthesize(
    out: Path,
    count: int,
    *,
    seed: int,
    image_size: int,
    progress: Progress,
    workers: int = 1,
    frames: int = 28,
    compression: str = "c23",
) -> None:
    """Write procedural people in the layout of DFD.

    Pairs of actors play one scene after the other and lend each other their faces (colour transfer with no seam).

    Args:
        out: the data set's folder.
        count: real videos, and fakes.
        seed, image_size, progress, workers: as everywhere in synthesis; an odd size grows by one pixel.
        frames: of each video.
        compression: one of :data:`~pyface.data.sets.faceforensics.COMPRESSIONS`.
    """
    choose(compression, tuple(COMPRESSIONS), "compression", DFD.title)
    crf = COMPRESSIONS[compression]
    takes = []
    for k in range(count):
        actor, scene = k % 2 + 2 * (k // (2 * len(SCENES))), k // 2 % len(SCENES)
        partner, clip = actor ^ 1, _FIRST + len(SCENES) * actor + scene
        people = couple(seed, _FIRST + actor // 2)
        one, other = people[actor % 2], people[partner % 2]
        real = f"{ACTORS}/{compression}/videos/{actor + 1:02d}__{SCENES[scene]}.mp4"
        takes.append(Take(one, clip, {real: ("images", crf)}))
        pair = f"{actor + 1:02d}_{partner + 1:02d}"
        # The real data set has one code of eight letters and digits per pair of actors.
        code = f"{int(hashlib.sha256(pair.encode()).hexdigest(), 16) % (1 << 32):08X}"
        video = f"{pair}__{SCENES[scene]}__{code}.mp4"
        files = {
            f"{FORGED}/{compression}/videos/{video}": ("images", crf),
            f"{FORGED}/masks/videos/{video}": ("masks", MASK_CRF),
        }
        takes.append(Take(one, clip, files, "colour_transfer", other))
    settings = {"seed": seed, "frames": frames, "image_size": image_size}
    write_takes(out, takes, **settings, progress=progress, workers=workers)
