"""Any folder of pictures, with labels from the folders' names, from a CSV list, or without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from pyface.data.images import SUFFIXES
from pyface.data.sets.base import ImageSet, image_size, tally
from pyface.data.sets.folders import read_csv, to_pixels, walk
from pyface.data.sets.synthesis import Progress, fill
from pyface.errors import UserError


@dataclass(frozen=True)
class Record:
    """One picture: its ``path``, and the number of its class in ``label``, or None."""

    path: Path
    label: int | None


class FolderOfFaces(ImageSet):
    """The pictures below a folder, in the natural order of their names.

    ``[i]`` gives ``image``, Tensor[3, H, W] float32 in [0, 1], upright as EXIF says; ``path``; and with labels
    ``label``, the number of the class, and ``name``, its name. Links to folders are followed, each folder once.

    Args:
        root: the folder.
        labels: None; ``"folders"``, where a picture's class is the folder right below ``root`` that it is in; or a CSV
            file with the columns ``file`` (relative to ``root``) and ``label``, which then also says which pictures.
            Classes are numbered in the order of their names, numbers in numerical order.
        size: pictures are resized to ``size`` x ``size`` pixels (bilinear, antialiased), after ``crop``.
        crop: applied to each picture, Tensor[3, H, W] -> Tensor[3, H', W'].
        transform: applied to each sample.

    Raises:
        UserError: no such folder, no pictures in it, a picture outside of the class folders, a wrong list, and when it
            is read: an unreadable picture, or one of another size than the first, unless ``size``, ``crop`` or
            ``transform`` may settle that.
    """

    title = "folder"
    layout = "  pictures: " + ", ".join(sorted(SUFFIXES))

    def __init__(
        self,
        root: str | os.PathLike,
        labels: str | os.PathLike | None = None,
        *,
        size: int | None = None,
        crop: Callable[[Tensor], Tensor] | None = None,
        transform: Callable[[dict], Any] | None = None,
    ):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"{root} {'is a file' if root.exists() else 'does not exist'}; give a folder of pictures")
        if size is not None and size < 1:
            raise UserError(f"size is {size}, expected 1 or more pixels")
        if labels is None:
            named = [(path, None) for path in walk(root)]
        elif labels == "folders":
            named = [(path, _class_folder(path, root)) for path in walk(root)]
        else:
            named = _read_labels(Path(labels), root)
        names = {name for _, name in named if name is not None}
        numeric = all(name.isdecimal() for name in names)
        self.names = sorted(names, key=(lambda name: (int(name), name)) if numeric else None)
        numbers = {name: number for number, name in enumerate(self.names)}
        super().__init__(root, "all", [Record(path, numbers.get(name)) for path, name in named], transform)
        self.size, self.crop = size, crop
        self._common = None if size or crop or transform else image_size(self.records[0].path)

    def sample(self, record: Record) -> dict[str, Any]:
        sample = super().sample(record)
        image = sample["image"]
        if self._common is not None and (image.shape[2], image.shape[1]) != self._common:
            raise UserError(
                f"{record.path} has {image.shape[2]} x {image.shape[1]} pixels but {self.records[0].path} "
                f"{self._common[0]} x {self._common[1]}; give size=, or a crop or transform that makes them equal"
            )
        if self.size is not None and image.shape[1:] != (self.size, self.size):
            image = interpolate(image[None], (self.size, self.size), mode="bilinear", antialias=True)[0].clamp(0, 1)
        return {**sample, "image": image}

    def labels(self, record: Record) -> dict[str, Any]:
        return {} if record.label is None else {"label": record.label, "name": self.names[record.label]}

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return ("all",)

    @classmethod
    def parts(cls, root: str | os.PathLike) -> list[dict[str, str]]:
        flat = any(path.parent == Path(root) for path in walk(root))
        return [{}] if flat else [{"labels": "folders"}]

    def counts(self) -> dict[str, Any]:
        return {"classes": tally(self.names[record.label] for record in self.records if record.label is not None)}


def _class_folder(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    if len(parts) < 2:
        raise UserError(f"{path} is not in a class folder; expected {root}/CLASS/{path.name}, or labels=None")
    return parts[0]


def _read_labels(path: Path, root: Path) -> list[tuple[Path, str]]:
    what = "a list with the columns file and label"
    rows = read_csv(path, ("file", "label"), name="folder", what=what)
    absent = [row["file"] for row in rows if not (root / row["file"]).is_file()]
    if absent:
        raise UserError(f"{path} names {absent[0]}, which is not in {root} ({len(absent)} such files)")
    return [(root / row["file"], row["label"].strip()) for row in rows]


PER_PERSON = 5


def synthesize(out: Path, count: int, *, seed: int, image_size: int, progress: Progress) -> None:
    """Write ``count`` pictures, five of each person, in a folder per person: ``person_0001/0001.jpg``, ..."""
    from pyface.data.procedural import draw_person, draw_view, render

    def draw(items: list[int]) -> Iterator[tuple[list[np.ndarray], None]]:
        people = [draw_person(seed, index // PER_PERSON) for index in items]
        for sample in render(people, [draw_view(seed, index) for index in items], image_size):
            yield [to_pixels(sample["image"])], None

    names = [f"person_{index // PER_PERSON + 1:04d}/{index % PER_PERSON + 1:04d}.jpg" for index in range(count)]
    fill(out, [(index, (name,)) for index, name in enumerate(names)], draw, progress)
