"""pyface detect on ten seconds of 720p video: decoding, finding faces, cutting them out and scoring, and all of it.

The clip is made on the spot: a procedural head that talks and moves, in a photo of a room, H.264, 25 frames per second.
It is scored by ACMF's detector with a ResNet-18 of random weights in fp32; a network's speed does not depend on its
weights. "A second passes" is the yardstick: ten times that is real time.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import OURS, Case, Options, Peer, Target
from pyface.data.crop import FaceCrop, cut
from pyface.data.detect import CascadeDetector, detect_faces
from pyface.data.follow import Follow
from pyface.data.sets.clips import Take, film
from pyface.data.sets.folders import to_pixels
from pyface.data.video import Video, write_video
from pyface.methods.acmf import ACMF
from pyface.methods.acmf.detector import AcmfDetector
from pyface.methods.detection.scan import fitted, scan

SECOND = "a second passes"
FPS = 25
_made: dict[tuple[int, int, int], tuple[tempfile.TemporaryDirectory, Path]] = {}


def cases(options: Options) -> list[Case]:
    seconds, size = (1, (180, 320)) if options.quick else (10, (720, 1280))
    target = () if options.quick else (Target(OURS, "at most", float(seconds), SECOND, threads=2),)
    pixels = f"{size[1]} x {size[0]}"
    part = max(1, seconds // 5)
    return [
        Case(
            "detection",
            "all of it",
            f"{seconds} s of {pixels}",
            lambda: _whole(seconds, size),
            SECOND,
            target,
            seconds=1,
        ),
        Case("detection", "parts", f"{part} s of {pixels}", lambda: _parts(seconds, part, size), SECOND, seconds=10),
        Case("detection", "one frame", pixels, lambda: _frame(seconds, size), "search", seconds=3),
    ]


def _whole(seconds: int, size: tuple[int, int]) -> list[Peer]:
    path, detector, count = _clip(seconds, size), AcmfDetector(ACMF("resnet18"), {}, "cpu"), seconds * FPS

    def ours():
        found = scan(Video(path), detector)
        assert [len(face.places) for face in found.faces] == [count], found
        return found

    return [Peer(OURS, ours, (SECOND, float(seconds)), required=True), _second()]


def _parts(seconds: int, part: int, size: tuple[int, int]) -> list[Peer]:
    path, detector, count = _clip(seconds, size), AcmfDetector(ACMF("resnet18"), {}, "cpu"), part * FPS
    follow, crops = fitted(Follow(), detector), torch.rand(count, 3, 224, 224)

    def read():
        footage = Video(path)
        return (footage.pixels([index])[0] for index in range(count))

    calls = {
        "decode": lambda: sum(1 for _ in read()),
        "decode, find, cut": lambda: sum(1 for _ in follow(read())),
        "score": lambda: detector.score(crops),
    }
    peers = [Peer(name, call, (SECOND, float(part)), required=True) for name, call in calls.items()]
    return [*peers, _second()]


def _second() -> Peer:
    return Peer(SECOND, lambda: time.sleep(1), required=True)


def _frame(seconds: int, size: tuple[int, int]) -> list[Peer]:
    footage = Video(_clip(seconds, size))
    (pixels,) = footage.pixels([0])
    cascade = CascadeDetector()
    (faces,) = Follow(FaceCrop())([pixels])
    left, top, side = faces[1].square
    centre, box = (left + side / 2, top + side / 2), (left + 0.115 * side, top + 0.115 * side, side / 1.3, side / 1.3)
    half = pixels[::2, ::2].copy()
    return [
        Peer(OURS + ", again near its place", lambda: cascade.near(pixels, box), required=True),
        Peer("search at half its size", lambda: detect_faces(half, cascade), required=True),
        Peer("search", lambda: detect_faces(pixels, cascade), required=True),
        Peer("cut out", lambda: cut(pixels, (*centre, side), 224), required=True),
    ]


def _clip(seconds: int, size: tuple[int, int]) -> Path:
    """A head of about half the picture's height that moves through it, once per process."""
    from PIL import Image
    from skimage.data import coffee

    key = (seconds, *size)
    if key not in _made:
        folder = tempfile.TemporaryDirectory()
        height, width = size
        room = np.asarray(Image.fromarray(coffee()).resize((width, height), Image.Resampling.BICUBIC))
        count, side = seconds * FPS, 2 * height // 3
        head = film(Take(3, 1, {}), seed=0, frames=count, image_size=side)["images"]

        def frames():
            for index, image in enumerate(head):
                pixels = room.copy()
                left = round((width - side) * (0.5 + 0.4 * np.sin(0.2 * np.pi * index / FPS)))
                pixels[height - side :, left : left + side] = to_pixels(image)
                yield pixels

        write_video(Path(folder.name, "clip.mp4"), frames(), fps=FPS)
        _made[key] = (folder, Path(folder.name, "clip.mp4"))
    return _made[key][1]
