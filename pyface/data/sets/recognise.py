"""Which data set a folder holds, and what is in it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyface.data.sets.clips import VideoSet
from pyface.data.sets.folders import EmptySplit, walk
from pyface.errors import UserError


@dataclass(frozen=True)
class Known:
    """A data set's readers as ``module:class``, and paths by which its folder is known: any one of each group."""

    readers: tuple[str, ...]
    marks: tuple[tuple[str, ...], ...]


KNOWN = {
    "ffpp": Known(
        ("faceforensics:FaceForensics",),
        (
            ("original_sequences",),
            tuple(f"manipulated_sequences/{m}" for m in ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")),
        ),
    ),
    "celebdf": Known(("celebdf:CelebDF",), (("Celeb-synthesis", "real_test/images"),)),
    "dfd": Known(("dfd:DFD",), (("original_sequences/actors",), ("manipulated_sequences/DeepFakeDetection",))),
    "wilddeepfake": Known(("wilddeepfake:WildDeepfake",), (("real_train", "real_test"), ("fake_train", "fake_test"))),
    "seqdeepfake": Known(
        ("seqdeepfake:SeqDeepFake",), (("facial_components/annotations", "facial_attributes/annotations"),)
    ),
    "fs2k": Known(("fs2k:FS2K",), (("photo",), ("sketch",), ("anno_train.json", "anno_test.json"))),
    "celeba": Known(
        ("celeba:CelebA",),
        (
            ("img_align_celeba", "Img/img_align_celeba"),
            ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt", "list_eval_partition.txt"),
        ),
    ),
    "lfw": Known(
        ("lfw:LFW", "lfw:LFWPairs"),
        (
            ("lfw", "lfw_funneled", "lfw-deepfunneled"),
            ("pairs.txt", "pairsDevTrain.txt", "pairsDevTest.txt", "people.txt", "peopleDevTrain.txt"),
        ),
    ),
    "cifar": Known(
        ("cifar:CIFAR",),
        (("cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar-100-python", "cifar-100-python.tar.gz"),),
    ),
    "imagefolder": Known(("folder:FolderOfFaces",), ()),
}


def recognise(root: str | os.PathLike) -> list[str]:
    """Names in :data:`KNOWN` of the data sets in ``root``; FaceForensics++ and DFD may share a folder.

    A folder of pictures that is none of the others is ``"imagefolder"``.

    Raises:
        UserError: no such folder, the folder above or one inside is a data set's, or there are no pictures.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} {'is a file' if root.exists() else 'does not exist'}; give the folder of a data set")
    if found := _marked(root):
        return found
    above = root.resolve().parent
    if found := _marked(above):
        raise UserError(f"{root} is inside of the data set {found[0]}, one level too low; give {above}")
    inside = sorted(child for child in root.iterdir() if child.is_dir() and _marked(child))
    if inside:
        raise UserError(f"{root} is one level too high; give {' or '.join(map(str, inside))}")
    if next(walk(root), None) is None:
        raise UserError(f"{root} holds neither pictures nor one of the layouts {', '.join(KNOWN)}")
    return ["imagefolder"]


def _marked(root: Path) -> list[str]:
    return [
        name
        for name, known in KNOWN.items()
        if known.marks and all(any((root / mark).exists() for mark in group) for group in known.marks)
    ]


def summaries(root: str | os.PathLike, layouts: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The ``summary()`` of every reader that ``root`` can feed, each with ``part``, the settings it was made with.

    A part that cannot be read has ``problem``, what its reader said, instead of numbers; an empty split has no images.

    Args:
        root: the folder.
        layouts: names in :data:`KNOWN`; default what :func:`recognise` says.

    Raises:
        UserError: an unknown layout, none is recognised, or no part holds anything that can be read.
    """
    found = []
    problems: list[UserError] = []
    empty: list[UserError] = []
    for layout in recognise(root) if layouts is None else layouts:
        if layout not in KNOWN:
            raise UserError(f"no layout {layout!r}; there are {', '.join(KNOWN)}")
        for address in KNOWN[layout].readers:
            module, name = address.split(":")
            reader = getattr(importlib.import_module(f"pyface.data.sets.{module}"), name)
            # With nothing there, the reader's own error says what is missing.
            for part in reader.parts(root) or [{}]:
                try:
                    found.append({"part": part, **reader(root, **part).summary()})
                except EmptySplit as error:
                    empty.append(error)
                    counted = "videos" if issubclass(reader, VideoSet) else "images"
                    found.append({"part": part, "name": reader.title, counted: 0})
                except UserError as error:
                    problems.append(error)
                    found.append({"part": part, "name": reader.title, "problem": str(error).partition("; expected")[0]})
    if len(problems) + len(empty) == len(found):
        raise [*problems, *empty][0]
    return found
