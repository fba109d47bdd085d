"""Procedural faces per second, and every data set's reader against a bare decoder of the very same files.

One call makes 32 faces, or reads 16 samples: pictures, or videos with 16 frames each. Samples per second are that
number over the time in the table.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Options, Peer
from pyface import data
from pyface.data.sets.synthesis import synthesize

FACES = 32
READS = 16
PICTURE_SETS: dict[str, Callable[[Path], Any]] = {
    "celeba": data.CelebA,
    "fs2k": data.FS2K,
    "imagefolder": data.FolderOfFaces,
    "lfw": data.LFW,
    "seqdeepfake": data.SeqDeepFake,
}
VIDEO_SETS: dict[str, Callable[[Path], Any]] = {
    "ffpp": data.FaceForensics,
    "celebdf": data.CelebDF,
    "dfd": data.DFD,
    "wilddeepfake": data.WildDeepfake,
}


def cases(options: Options) -> list[Case]:
    sizes, layouts = (64, 128, 256), (*PICTURE_SETS, *VIDEO_SETS)
    if options.quick:
        sizes, layouts = (32,), ("celeba", "celebdf")
    made = [
        Case("procedural faces", f"{FACES} samples", f"{size} x {size}", lambda size=size: _faces(size), seconds=10)
        for size in sizes
    ]
    for layout in layouts:
        kind = "pictures" if layout in PICTURE_SETS else "videos"
        made.append(
            Case(
                f"reading {kind}",
                f"{READS} samples",
                layout,
                lambda layout=layout: _reader(layout, options.quick),
                seconds=5,
            )
        )
    return made


def _faces(size: int) -> list[Peer]:
    faces = data.ProceduralFaces(FACES, image_size=size)
    return [
        Peer(OURS, lambda: faces.__getitems__(list(range(FACES))), required=True),
        Peer("pyface, one by one", lambda: [faces[index] for index in range(FACES)], required=True),
    ]


def _reader(layout: str, quick: bool) -> list[Peer]:
    folder = tempfile.TemporaryDirectory()
    count = 4 if quick or layout in VIDEO_SETS else 64
    root = synthesize(layout, folder.name, count, image_size=64 if quick else None)
    reader = (PICTURE_SETS | VIDEO_SETS)[layout](root)

    def turns() -> Iterator[int]:
        return itertools.cycle(range(len(reader)))

    ours, theirs = turns(), turns()

    def read() -> list[dict]:
        return [reader[next(ours)] for _ in range(READS)]

    if layout in PICTURE_SETS:
        name, bare = "bare Pillow", _picture
        # The pictures that a sample holds besides its main one cost as much.
        files = [_files_of(record) for record in reader.records]
    elif layout == "wilddeepfake":
        name, bare = "bare Pillow", _picture
        files = [sorted(record.path.iterdir())[:16] for record in reader.records]
    else:
        name, bare = "bare PyAV, all frames", _video
        files = [[record.path] for record in reader.records]

    def decode() -> list[Tensor]:
        return [bare(file) for _ in range(READS) for file in files[next(theirs)]]

    # The folder lives as long as the call.
    return [
        Peer(OURS, lambda: (read(), folder), required=True),
        Peer(name, decode, required=True),
    ]


def _files_of(record: Any) -> list[Path]:
    return [value for value in vars(record).values() if isinstance(value, Path) and value.is_file()]


def _picture(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float().div_(255)


def _video(path: Path) -> Tensor:
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float().div_(255)
