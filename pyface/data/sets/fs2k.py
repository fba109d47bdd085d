"""FS2K: photos with sketches by three artists (Fan et al., Machine Intelligence Research 2022, arXiv:2112.15439)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyface.data.sets.base import ImageSet, choose, shorten, tally
from pyface.data.sets.folders import check_root, read_image, read_json, to_pixels
from pyface.data.sets.synthesis import Progress, deal, fill, write_json
from pyface.errors import UserError

SPLITS = ("train", "test")
STYLES = 3
SUFFIXES = (".jpg", ".png")
# Pairs of the release: by split and style, and by the folder, which says where the photos come from.
BY_SPLIT_AND_STYLE = {
    ("train", 0): 357,
    ("train", 1): 351,
    ("train", 2): 350,
    ("test", 0): 619,
    ("test", 1): 381,
    ("test", 2): 46,
}
BY_FOLDER = {1: 1529, 2: 98, 3: 477}
# Ids of the parsing that the annotations are measured on.
LEFT_EYE, RIGHT_EYE, UPPER_LIP, LOWER_LIP, HAIR = 4, 5, 11, 12, 13
_NAME = re.compile(r"photo(\d+)/image(\d+)")


@dataclass(frozen=True)
class Record:
    """One photo with its sketch.

    Attributes:
        name: as annotated, such as ``photo1/image0110``.
        path: of the photo.
        sketch: of the sketch.
        depth: of the depth map, or None.
        style: 0, 1 or 2.
        attributes: the other annotations by their official keys.
    """

    name: str
    path: Path
    sketch: Path
    depth: Path | None
    style: int
    attributes: dict[str, Any]


class FS2K(ImageSet):
    """Photo-sketch pairs of FS2K, matched by name.

    ``[i]`` gives ``image``, Tensor[3, H, W]; ``sketch``, Tensor[1, H, W], white paper = 1; ``depth``, Tensor[1, H, W],
    nearer = brighter, background 0, where the folder ``depth`` has one of the same name (HIDA needs it; it is not part
    of the release); all float32 in [0, 1]; ``path``; ``name``; ``style``, 0 to 2; ``attributes``: ``hair``,
    ``earring``, ``smile`` (0 yes, 1 no), ``hair_color`` (0 brown, 1 black, 2 red, 3 no hair, 4 golden), ``gender``
    (0 male, 1 female), ``frontal_face`` (0 turned by less than 30 degrees, 1 more). The test split holds next to
    nothing of style 2: report results per style.

    Args:
        root: the folder that holds ``photo`` and ``sketch``.
        split: ``"train"`` or ``"test"``.
        style: only pairs of this style.
        drop_incomplete: leave annotated pairs out whose photo or sketch is missing; ``dropped`` names them.
        transform: applied to each sample.

    Raises:
        UserError: a folder or annotation file is missing, an entry is malformed, its style is not 0 to 2, or pictures
            are missing and ``drop_incomplete`` is not set.
    """

    title = "FS2K"
    layout = (
        "  anno_train.json, anno_test.json\n"
        "  photo/photo1..3/imageNNNN.jpg (or .png)\n"
        "  sketch/sketch1..3/sketchNNNN.jpg (or .png)\n"
        "  optional: depth/photo1..3/imageNNNN.png"
    )

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        style: int | None = None,
        *,
        drop_incomplete: bool = False,
        transform: Callable[[dict], Any] | None = None,
    ):
        choose(split, SPLITS, "split", self.title)
        if style is not None and style not in range(STYLES):
            raise UserError(f"{self.title}: no style {style}; there are 0, 1 and 2")
        annotations = f"anno_{split}.json"
        root = check_root(root, ["photo", "sketch", annotations], name=self.title, layout=self.layout)
        records, self.dropped = _read(root, root / annotations)
        if self.dropped and not drop_incomplete:
            raise UserError(
                f"{self.title}: {len(self.dropped)} entries of {root / annotations} lack a photo or sketch: "
                f"{shorten(self.dropped)}; complete the folders, or pass drop_incomplete=True"
            )
        if style is not None:
            records = [record for record in records if record.style == style]
        super().__init__(root, split, records, transform)

    def labels(self, record: Record) -> dict[str, Any]:
        maps = {"sketch": _grey(record.sketch)}
        if record.depth is not None:
            maps["depth"] = _grey(record.depth)
        attributes = {key: value for key, value in record.attributes.items() if type(value) is int}
        return {**maps, "name": record.name, "style": record.style, "attributes": attributes}

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return SPLITS

    def counts(self) -> dict[str, Any]:
        return {
            "styles": tally(record.style for record in self.records),
            "folders": tally(record.name.split("/")[0] for record in self.records),
            "with depth": sum(record.depth is not None for record in self.records),
            "dropped": len(self.dropped),
        }


def _grey(path: Path) -> Tensor:
    return read_image(path).mean(0, keepdim=True)


def _read(root: Path, path: Path) -> tuple[list[Record], list[str]]:
    what = 'a list of {"image_name": "photo1/image0110", "style": 0, ...}'
    entries = read_json(path, name=FS2K.title, what=what)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{FS2K.title}: {path} should be {what}")
    records, incomplete = [], []
    for number, entry in enumerate(entries, 1):
        where = f"{FS2K.title}: {path}, entry {number}"
        attributes = dict(entry)
        name, style = attributes.pop("image_name", None), attributes.pop("style", None)
        parts = _NAME.fullmatch(name) if isinstance(name, str) else None
        if parts is None:
            raise UserError(f"{where}: image_name is {name!r}, expected a name such as 'photo1/image0110'")
        if type(style) is not int or style not in range(STYLES):
            raise UserError(f"{where} ({name}): style is {style!r}, expected 0, 1 or 2")
        photo = _present(root / "photo" / name)
        sketch = _present(root / "sketch" / f"sketch{parts[1]}" / f"sketch{parts[2]}")
        if photo is None or sketch is None:
            incomplete.append(name)
        else:
            records.append(Record(name, photo, sketch, _present(root / "depth" / name), style, attributes))
    return records, incomplete


def _present(stem: Path) -> Path | None:
    """The picture of this name with one of the suffixes that occur in the release."""
    return next((path for path in (stem.with_name(stem.name + suffix) for suffix in SUFFIXES) if path.exists()), None)


def synthesize(out: Path, count: int, *, seed: int, image_size: int, progress: Progress) -> None:
    """Write ``count`` pairs with depth, with the release's proportions of splits, styles and folders."""
    from pyface.data.procedural import draw_person, draw_view, render
    from pyface.data.sketch import sketch

    def draw(items: list[tuple[int, int]]) -> Iterator[tuple[list[np.ndarray], dict[str, Any]]]:
        people, views = zip(*((draw_person(seed, index), draw_view(seed, index)) for index, _ in items), strict=True)
        for sample, (index, style) in zip(render(people, views, image_size), items, strict=True):
            drawn = sketch(sample, style + 1, seed=seed + index)
            images = (sample["image"], drawn, sample["depth"])
            yield [to_pixels(image.expand(3, -1, -1)) for image in images], _annotate(sample)

    cells = list(BY_SPLIT_AND_STYLE)
    numbers = dict.fromkeys(BY_FOLDER, 0)
    plan, names, splits = [], [], []
    for index, (cell, source) in enumerate(
        zip(deal(count, list(BY_SPLIT_AND_STYLE.values())), deal(count, list(BY_FOLDER.values())), strict=True)
    ):
        split, style = cells[cell]
        folder = list(BY_FOLDER)[source]
        numbers[folder] += 1
        name = f"photo{folder}/image{numbers[folder]:04d}"
        drawn = f"sketch/sketch{folder}/sketch{numbers[folder]:04d}" + (".png" if folder == 2 else ".jpg")
        plan.append(((index, style), (f"photo/{name}.jpg", drawn, f"depth/{name}.png")))
        names.append((name, style))
        splits.append(split)
    notes = fill(out, plan, draw, progress)
    entries = [{"image_name": name, **note, "style": style} for (name, style), note in zip(names, notes, strict=True)]
    for split in SPLITS:
        chosen = [entry for entry, of in zip(entries, splits, strict=True) if of == split]
        write_json(out / f"anno_{split}.json", chosen)


def _annotate(sample: dict[str, Any]) -> dict[str, Any]:
    """The official annotations of a procedural sample, except its name and style."""
    image, parsing, has = sample["image"].mul(255), sample["parsing"], sample["attributes"]

    def colour(*parts: int) -> list[float]:
        where = sum(parsing == part for part in parts).bool()
        return [round(float(value), 2) for value in image[:, where].mean(1)] if where.any() else []

    nose = sample["landmarks"][30].round().int().tolist()
    pitch, yaw = (float(angle) for angle in sample["head_pose"][:2])
    turned = math.acos(math.cos(pitch) * math.cos(yaw)) > math.radians(30)
    hair = 3 if has["Bald"] else _hair_colour(has, colour(HAIR))
    return {
        "skin_patch": nose,
        "lip_color": colour(UPPER_LIP, LOWER_LIP),
        "eye_color": colour(LEFT_EYE, RIGHT_EYE),
        "hair": int(has["Bald"]),
        "hair_color": hair,
        "gender": int(not has["Male"]),
        "earring": int(not has.get("Wearing_Earrings", False)),
        "smile": int(not has["Smiling"]),
        "frontal_face": int(turned),
    }


def _hair_colour(has: dict[str, bool], mean: list[float]) -> int:
    for name, number in (("Brown_Hair", 0), ("Black_Hair", 1), ("Blond_Hair", 4)):
        if has[name]:
            return number
    if mean and mean[0] > 1.5 * mean[2]:
        return 2
    # Grey has no number in FS2K: dark grey is nearest to black, light grey to golden.
    return 1 if sum(mean) < 300 else 4
