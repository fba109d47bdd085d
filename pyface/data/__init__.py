"""Pictures: procedural faces, readers of the real data sets, and what is done to faces; loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOMES = {
    "CIFAR": "pyface.data.sets.cifar",
    "CelebA": "pyface.data.sets.celeba",
    "CelebDF": "pyface.data.sets.celebdf",
    "DFD": "pyface.data.sets.dfd",
    "DigitsAsImages": "pyface.data.sets.digits",
    "Evenly": "pyface.data.sets.clips",
    "Every": "pyface.data.sets.clips",
    "FS2K": "pyface.data.sets.fs2k",
    "FaceCrop": "pyface.data.crop",
    "FaceForensics": "pyface.data.sets.faceforensics",
    "FolderOfFaces": "pyface.data.sets.folder",
    "FrameDataset": "pyface.data.sets.clips",
    "LFW": "pyface.data.sets.lfw",
    "LFWPairs": "pyface.data.sets.lfw",
    "ProceduralFaces": "pyface.data.procedural",
    "SeqDeepFake": "pyface.data.sets.seqdeepfake",
    "WildDeepfake": "pyface.data.sets.wilddeepfake",
    "edit": "pyface.data.edits",
    "forge": "pyface.data.forgery",
    "open_video": "pyface.data.video",
    "write_video": "pyface.data.video",
}

__all__ = [
    "CIFAR",
    "CelebA",
    "CelebDF",
    "DFD",
    "DigitsAsImages",
    "Evenly",
    "Every",
    "FS2K",
    "FaceCrop",
    "FaceForensics",
    "FolderOfFaces",
    "FrameDataset",
    "LFW",
    "LFWPairs",
    "ProceduralFaces",
    "SeqDeepFake",
    "WildDeepfake",
    "edit",
    "forge",
    "open_video",
    "write_video",
]

if TYPE_CHECKING:
    from pyface.data.crop import FaceCrop
    from pyface.data.edits import edit
    from pyface.data.forgery import forge
    from pyface.data.procedural import ProceduralFaces
    from pyface.data.sets.celeba import CelebA
    from pyface.data.sets.celebdf import CelebDF
    from pyface.data.sets.cifar import CIFAR
    from pyface.data.sets.clips import Evenly, Every, FrameDataset
    from pyface.data.sets.dfd import DFD
    from pyface.data.sets.digits import DigitsAsImages
    from pyface.data.sets.faceforensics import FaceForensics
    from pyface.data.sets.folder import FolderOfFaces
    from pyface.data.sets.fs2k import FS2K
    from pyface.data.sets.lfw import LFW, LFWPairs
    from pyface.data.sets.seqdeepfake import SeqDeepFake
    from pyface.data.sets.wilddeepfake import WildDeepfake
    from pyface.data.video import open_video, write_video


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pyface.data' has no attribute {name!r}")


def __dir__():
    return __all__
