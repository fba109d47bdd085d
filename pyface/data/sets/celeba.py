"""CelebA: aligned faces of celebrities with 40 attributes (Liu et al., ICCV 2015, arXiv:1411.7766)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyface.data.sets.base import ImageSet, choose
from pyface.data.sets.folders import check_root, read_text, to_pixels
from pyface.data.sets.synthesis import Progress, deal, fill, write_text
from pyface.errors import UserError

SPLITS = ("train", "valid", "test")
ATTRIBUTES = (
    *("5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose"),
    *("Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses"),
    *("Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache"),
    *("Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks"),
    *("Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick"),
    *("Wearing_Necklace", "Wearing_Necktie", "Young"),
)
POINTS = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
# Lists lie beside the pictures, or in the folders of the official download.
IMAGES = ("img_align_celeba", "Img/img_align_celeba")
PARTITION = ("list_eval_partition.txt", "Eval/list_eval_partition.txt")
ATTRIBUTE_LIST = ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt")
IDENTITIES = ("identity_CelebA.txt", "Anno/identity_CelebA.txt")
LANDMARKS = ("list_landmarks_align_celeba.txt", "Anno/list_landmarks_align_celeba.txt")


@dataclass(frozen=True)
class Record:
    """One picture.

    Attributes:
        path: of the picture.
        attributes: ndarray[A] bool, in the order of ``CelebA.attributes``.
        identity: number of the person, or None without the list of identities.
        landmarks: ndarray[5, 2], x and y in pixels of eyes, nose and corners of the mouth, the picture's left first; or
            None without their list.
    """

    path: Path
    attributes: np.ndarray
    identity: int | None
    landmarks: np.ndarray | None


class CelebA(ImageSet):
    """The aligned pictures of CelebA by the official split; no person is in two of them.

    ``[i]`` gives ``image``, Tensor[3, 218, 178] float32 in [0, 1]; ``path``; ``attributes``, name -> bool; and, where
    their lists are there, ``identity``, and ``landmarks``, Tensor[5, 2] float32, (x, y) in pixels.

    torchvision's reader is not used: it takes the original files only, by checksum, under a folder of a fixed name.

    Args:
        root: the folder of the official download, or one that holds its files side by side.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        transform: applied to each sample.

    Raises:
        UserError: a folder or list is missing or cut off, the lists disagree about the pictures, an attribute is not -1
            or 1, or a split not 0 to 2.
    """

    title = "CelebA"
    layout = (
        "  img_align_celeba/000001.jpg, ... (or Img/img_align_celeba)\n"
        "  list_eval_partition.txt (or Eval/...), list_attr_celeba.txt (or Anno/...)\n"
        "  optional: identity_CelebA.txt, list_landmarks_align_celeba.txt (or Anno/...)"
    )

    def __init__(
        self, root: str | os.PathLike, split: str = "train", *, transform: Callable[[dict], Any] | None = None
    ):
        choose(split, SPLITS, "split", self.title)
        root = check_root(root, [IMAGES, PARTITION, ATTRIBUTE_LIST], name=self.title, layout=self.layout)
        folder = _first(root, IMAGES)
        _, partition = _read_list(_first(root, PARTITION), "names with 0, 1 or 2", width=1, allowed=(0, 1, 2))
        names = [name for name, (part,) in partition.items() if part == SPLITS.index(split)]
        self.attributes, values = _read_list(
            _first(root, ATTRIBUTE_LIST), "names with 40 times -1 or 1", headed=True, allowed=(-1, 1)
        )
        identities = landmarks = None
        if path := _first(root, IDENTITIES):
            _, identities = _read_list(path, "names with the number of the person", width=1)
        if path := _first(root, LANDMARKS):
            _, landmarks = _read_list(path, "names with five points", headed=True, width=10)
        records = []
        for name in names:
            for found, which in ((values, ATTRIBUTE_LIST), (identities, IDENTITIES), (landmarks, LANDMARKS)):
                if found is not None and name not in found:
                    raise UserError(f"{self.title}: {name} is in {PARTITION[0]} but not in {_first(root, which)}")
            identity = None if identities is None else int(identities[name][0])
            points = None if landmarks is None else landmarks[name].reshape(5, 2)
            records.append(Record(folder / name, values[name] > 0, identity, points))
        super().__init__(root, split, records, transform)

    def labels(self, record: Record) -> dict[str, Any]:
        known = {"attributes": dict(zip(self.attributes, record.attributes.tolist(), strict=True))}
        if record.identity is not None:
            known["identity"] = record.identity
        if record.landmarks is not None:
            known["landmarks"] = torch.from_numpy(record.landmarks.astype(np.float32))
        return known

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return SPLITS

    def counts(self) -> dict[str, Any]:
        shares = np.mean([record.attributes for record in self.records], axis=0)
        frequent = sorted(zip(shares.tolist(), self.attributes, strict=True), reverse=True)
        return {
            "identities": len({record.identity for record in self.records} - {None}),
            "attributes": {name: round(share, 3) for share, name in frequent if share > 0},
        }


def _first(root: Path, choices: Sequence[str]) -> Path | None:
    return next((root / choice for choice in choices if (root / choice).exists()), None)


def _read_list(
    path: Path, what: str, *, headed: bool = False, width: int | None = None, allowed: Sequence[int] | None = None
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the columns, and the numbers of every picture, of one of CelebA's lists.

    With ``headed``, the first line counts the pictures and the second names the columns.
    """
    lines = read_text(path, name=CelebA.title, what=f"a list of {what}").splitlines()
    columns: list[str] = []
    first = 0
    if headed:
        if len(lines) < 2 or not lines[0].strip().isdecimal():
            raise UserError(f"{CelebA.title}: {path} should begin with the number of pictures and the columns' names")
        columns, first = lines[1].split(), 2
        width = width or len(columns)
    rows = {}
    for number, line in enumerate(lines[first:], first + 1):
        if not line.strip():
            continue
        name, *fields = line.split()
        try:
            values = np.array(fields, dtype=np.int64)
        except ValueError:
            values = None
        if values is None or len(values) != width:
            raise UserError(f"{CelebA.title}: {path}, line {number}: expected a name and {width} whole numbers")
        if allowed is not None and not np.isin(values, allowed).all():
            wrong = values[~np.isin(values, allowed)][0]
            raise UserError(
                f"{CelebA.title}: {path}, line {number} ({name}): {wrong} is not one of {', '.join(map(str, allowed))}"
            )
        rows[name] = values
    if headed and len(rows) != int(lines[0]):
        raise UserError(
            f"{CelebA.title}: {path} says {lines[0].strip()} pictures but lists {len(rows)}; is it cut off?"
        )
    return columns, rows


# Where CelebA's alignment puts the points of POINTS, (x, y) in a picture of 178 x 218: the means of its list, rounded.
TEMPLATE = ((69, 111), (108, 111), (88, 135), (71, 152), (105, 152))
WIDTH, HEIGHT = 178, 218
PER_PERSON, PEOPLE_PER_BLOCK = 5, 10


def synthesize(out: Path, count: int, *, seed: int, image_size: int, progress: Progress) -> None:
    """Write ``count`` aligned pictures, five of each person; ``image_size`` is their width, 178 in the real data set.

    Of the people, 80 % are for training, 10 % for validation, 10 % for testing. Attributes that the procedural faces do
    not know are -1. The boxes of ``list_bbox_celeba.txt``, which in the real data set belong to the pictures before
    alignment, are those of the head in the aligned ones.
    """
    from pyface.data.procedural import draw_person, draw_view, render

    width, height = image_size, round(image_size * HEIGHT / WIDTH)

    def draw(items: list[tuple[int, int]]) -> Iterator[tuple[list[np.ndarray], dict[str, Any]]]:
        # A larger square around the face, so that alignment finds something at every border.
        side = min(round(1.3 * height), 1024)
        people = [draw_person(seed, person) for person, _ in items]
        views = [draw_view(seed, index) for _, index in items]
        views = [
            replace(view, framing=replace(view.framing, scale=view.framing.scale * width / side)) for view in views
        ]
        for sample in render(people, views, side):
            yield _align(sample, width, height)

    plan, persons = [], []
    for index in range(count):
        block, place = divmod(index, PER_PERSON * PEOPLE_PER_BLOCK)
        persons.append(block * PEOPLE_PER_BLOCK + place % PEOPLE_PER_BLOCK)
        plan.append(((persons[-1], index), (f"img_align_celeba/{index + 1:06d}.jpg",)))
    notes = fill(out, plan, draw, progress)

    names = [f"{index + 1:06d}.jpg" for index in range(count)]
    splits = deal(max(persons) + 1, (8, 1, 1))
    attributes = [" ".join(f"{1 if name in note['attributes'] else -1:2d}" for name in ATTRIBUTES) for note in notes]
    landmarks = [" ".join(f"{value:3d}" for value in note["landmarks"]) for note in notes]
    boxes = [" ".join(f"{value:3d}" for value in note["box"]) for note in notes]
    columns = " ".join(f"{point}_{axis}" for point in POINTS for axis in "xy")
    _write_list(out / PARTITION[0], names, [splits[person] for person in persons])
    _write_list(out / IDENTITIES[0], names, [person + 1 for person in persons])
    _write_list(out / ATTRIBUTE_LIST[0], names, attributes, " ".join(ATTRIBUTES))
    _write_list(out / LANDMARKS[0], names, landmarks, columns)
    _write_list(out / "list_bbox_celeba.txt", names, boxes, "image_id x_1 y_1 width height")


def _write_list(path: Path, names: Sequence[str], values: Sequence[Any], columns: str | None = None) -> None:
    head = [] if columns is None else [str(len(names)), columns]
    write_text(path, "\n".join([*head, *(f"{name} {value}" for name, value in zip(names, values, strict=True))]) + "\n")


def _align(sample: dict[str, Any], width: int, height: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    """A procedural sample turned, scaled and shifted onto :data:`TEMPLATE`: its picture and annotations."""
    from skimage.transform import AffineTransform, warp

    scale = width / WIDTH
    marks = sample["landmarks"].numpy().astype(float)
    points = np.stack((marks[36:42].mean(0), marks[42:48].mean(0), marks[30], marks[48], marks[54]))
    onto = AffineTransform(matrix=_similarity(points, np.asarray(TEMPLATE, float) * scale))
    pixels = warp(to_pixels(sample["image"]), onto.inverse, output_shape=(height, width), order=1, mode="edge")
    moved, outline = onto(points).round().astype(int), onto(marks)
    low, high = outline.min(0).clip(0).astype(int), np.minimum(outline.max(0), (width, height)).astype(int)
    note = {
        "attributes": [name for name, has in sample["attributes"].items() if has],
        "landmarks": moved.flatten().tolist(),
        "box": [*low.tolist(), *(high - low).tolist()],
    }
    return [(pixels * 255).round().astype(np.uint8)], note


def _similarity(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """ndarray[3, 3]: the turn, scale and shift that bring ``points`` nearest to ``targets``, ndarray[N, 2] each."""
    x, y = points.T
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate((np.stack((x, -y, one, zero), 1), np.stack((y, x, zero, one), 1)))
    (a, b, right, down), *_ = np.linalg.lstsq(rows, targets.T.flatten(), rcond=None)
    return np.array(((a, -b, right), (b, a, down), (0, 0, 1)))
