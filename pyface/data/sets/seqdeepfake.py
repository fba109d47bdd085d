"""Seq-DeepFake: faces edited in up to five steps, in order (Shao et al., ECCV 2022, arXiv:2207.02204)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyface.data.edits import ATTRIBUTES, COMPONENTS, ORIGINAL, STEPS, edit
from pyface.data.sets.base import ImageSet, choose, tally
from pyface.data.sets.folders import check_root, read_csv, read_image, to_pixels
from pyface.data.sets.synthesis import Progress, deal, fill, write_text
from pyface.errors import UserError

SUBSETS = {"facial_components": COMPONENTS, "facial_attributes": ATTRIBUTES}
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Record:
    """One picture.

    Attributes:
        path: of the picture.
        label: ids of the edits in order, five numbers, 0 after the last.
        sequence: name of the picture's folder, such as ``nose-eye-lip`` or ``original``.
        original: the unedited picture of the same file id in the same split, or None.
    """

    path: Path
    label: tuple[int, ...]
    sequence: str
    original: Path | None


class SeqDeepFake(ImageSet):
    """Pictures of one subset and split of Seq-DeepFake.

    ``[i]`` gives ``image``, Tensor[3, H, W] float32 in [0, 1]; ``path``; ``label``, Tensor[5] int64, ids 1 to 5 of the
    edits in order (``SUBSETS[subset]`` names them), 0 after the last; ``sequence``, the folder's name. With
    ``originals`` also ``original``, Tensor[3, H, W]: the release does not promise that a file id means the same person
    under every sequence, so check that before training on these pairs. :meth:`summary` counts them.

    Args:
        root: the folder that holds ``facial_components`` and ``facial_attributes``.
        subset: ``"facial_components"`` or ``"facial_attributes"``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        originals: keep only pictures that have an original, and give it.
        transform: applied to each sample.

    Raises:
        UserError: the folder or list is missing, a column is missing, a label is not five ids of 0 to 5 with the zeros
            last, or it says something else than the folder's name.
    """

    title = "Seq-DeepFake"
    layout = (
        "  facial_components/annotations/{train,val,test}.csv, with the columns file_path and label\n"
        "  facial_components/images/{train,val,test}/SEQUENCE/ID.jpg\n"
        "  facial_attributes/, the same"
    )

    def __init__(
        self,
        root: str | os.PathLike,
        subset: str = "facial_components",
        split: str = "train",
        *,
        originals: bool = False,
        transform: Callable[[dict], Any] | None = None,
    ):
        choose(subset, tuple(SUBSETS), "subset", self.title)
        choose(split, SPLITS, "split", self.title)
        annotations = f"{subset}/annotations/{split}.csv"
        root = check_root(root, [annotations], name=self.title, layout=self.layout)
        self.subset, self.originals = subset, originals
        records = _read(root, root / annotations, SUBSETS[subset])
        if originals:
            records = [record for record in records if record.original is not None]
        super().__init__(root, split, records, transform)

    def sample(self, record: Record) -> dict[str, Any]:
        sample = super().sample(record)
        if self.originals:
            sample["original"] = read_image(record.original)
        return sample

    def labels(self, record: Record) -> dict[str, Any]:
        return {"label": torch.tensor(record.label), "sequence": record.sequence}

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return SPLITS

    @classmethod
    def parts(cls, root: str | os.PathLike) -> list[dict[str, str]]:
        present = [subset for subset in SUBSETS if (Path(root) / subset).is_dir()]
        return [{"subset": subset, "split": split} for subset in present for split in SPLITS]

    def counts(self) -> dict[str, Any]:
        return {
            "subset": self.subset,
            "steps": tally(sum(step > 0 for step in record.label) for record in self.records),
            "sequences": len({record.sequence for record in self.records}),
            "with original": sum(record.original is not None for record in self.records),
        }


def _read(root: Path, path: Path, names: Sequence[str]) -> list[Record]:
    what = "the list of a split, with the columns file_path and label"
    ids = {name.lower(): number for number, name in enumerate(names, 1)}
    originals: dict[Path, dict[str, Path]] = {}
    records = []
    for number, row in enumerate(read_csv(path, ("file_path", "label"), name=SeqDeepFake.title, what=what), 1):
        where = f"{SeqDeepFake.title}: {path}, entry {number}"
        label = _parse_label(row["label"], where)
        picture = root / row["file_path"]
        sequence = picture.parent.name
        if _from_name(sequence, ids) not in (None, label):
            raise UserError(f"{where}: the label {list(label)} disagrees with the folder's name {sequence!r}")
        folder = picture.parent.parent / ORIGINAL
        if folder not in originals:
            originals[folder] = {file.stem: file for file in folder.iterdir()} if folder.is_dir() else {}
        records.append(Record(picture, label, sequence, originals[folder].get(picture.stem)))
    return records


def _parse_label(text: str, where: str) -> tuple[int, ...]:
    try:
        label = json.loads(text)
    except ValueError:
        label = None
    if not isinstance(label, list) or len(label) != STEPS or any(type(step) is not int for step in label):
        raise UserError(f"{where}: label {text!r}, expected five numbers such as [1, 2, 4, 0, 0]")
    if not all(0 <= step <= STEPS for step in label):
        raise UserError(f"{where}: label {text!r}, expected numbers from 0 to {STEPS}")
    steps = sum(step > 0 for step in label)
    if any(label[steps:]):
        raise UserError(f"{where}: label {text!r} goes on after a 0")
    return tuple(label)


def _from_name(sequence: str, ids: dict[str, int]) -> tuple[int, ...] | None:
    """The label that a folder's name says, or None if it does not consist of known names."""
    if sequence == ORIGINAL:
        return (0,) * STEPS
    words = sequence.lower().split("-")
    if len(words) > STEPS or any(word not in ids for word in words):
        return None
    return tuple(ids[word] for word in words) + (0,) * (STEPS - len(words))


def synthesize(out: Path, count: int, *, seed: int, image_size: int, progress: Progress) -> None:
    """Write ``count`` pictures of each subset: of every person the original and edits of one to five steps.

    Unlike in the real data set, all pictures with the same file id show the same person from the same view, and any
    order of distinct edits occurs. Of the people, 80 % are for training, 10 % for validation, 10 % for testing.
    """
    from pyface.data.procedural import draw_person, draw_view

    def draw(items: list[tuple[str, int, tuple[str, ...]]]) -> Iterator[tuple[list[np.ndarray], None]]:
        for subset, person, sequence in items:
            who = 2 * person + list(SUBSETS).index(subset)
            edited = edit(
                sequence, draw_person(seed, who), draw_view(seed, who), seed=seed + who, image_size=image_size
            )
            yield [to_pixels(edited.image)], None

    plan, lists = [], {}
    people = deal(-(-count // (STEPS + 1)), (8, 1, 1))
    for subset, names in SUBSETS.items():
        lists.update({(subset, split): ["file_path,label"] for split in SPLITS})
        for index in range(count):
            person, steps = divmod(index, STEPS + 1)
            rng = np.random.default_rng((seed, list(SUBSETS).index(subset), person, steps))
            label = (rng.permutation(STEPS)[:steps] + 1).tolist()
            sequence = tuple(names[number - 1] for number in label)
            split = SPLITS[people[person]]
            file = f"{subset}/images/{split}/{'-'.join(sequence) or ORIGINAL}/{person:06d}.jpg"
            plan.append(((subset, person, sequence), (file,)))
            lists[subset, split].append(f'{file},"{label + [0] * (STEPS - steps)}"')
    fill(out, plan, draw, progress)
    for (subset, split), lines in lists.items():
        write_text(out / subset / "annotations" / f"{split}.csv", "\n".join(lines) + "\n")
