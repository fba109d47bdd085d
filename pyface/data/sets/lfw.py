"""Labeled Faces in the Wild: people, and pairs to verify (Huang et al., University of Massachusetts 07-49, 2007)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyface.data.sets.base import ImageSet, choose, read_cropped, shorten, tally
from pyface.data.sets.folders import check_root, read_text, to_pixels, walk
from pyface.data.sets.synthesis import Progress, fill, write_text
from pyface.errors import UserError

FOLDS = 10
FOLDERS = ("lfw", "lfw_funneled", "lfw-deepfunneled")
LAYOUT = (
    "  lfw/First_Last/First_Last_0001.jpg, ... (or lfw_funneled, lfw-deepfunneled)\n"
    "  pairs.txt, pairsDevTrain.txt, pairsDevTest.txt, people.txt, peopleDevTrain.txt, peopleDevTest.txt\n"
    "  (only the lists of the splits that are used)"
)


@dataclass(frozen=True)
class Face:
    """One picture: its ``path``, the ``name`` of the person, and the person's number in ``identity``."""

    path: Path
    name: str
    identity: int


@dataclass(frozen=True)
class Pair:
    """Two pictures, whether they show the ``same`` person, and the ``fold`` (0 to 9; 0 in the development view)."""

    path: Path
    other: Path
    same: bool
    fold: int


class LFW(ImageSet):
    """The people of LFW, for classification or recognition.

    ``[i]`` gives ``image``, Tensor[3, 250, 250] float32 in [0, 1]; ``path``; ``name``; and ``identity``, the number of
    the person among the split's in alphabetical order. The face takes up the middle: pass a ``crop``.

    Args:
        root: the folder that holds ``lfw`` and the lists.
        split: ``"all"`` (whatever is in the folder), ``"train"`` or ``"test"`` (view 1, ``peopleDev*.txt``), or
            ``"folds"`` (view 2, ``people.txt``, all ten folds).
        crop: applied to each picture, Tensor[3, H, W].
        transform: applied to each sample.

    Raises:
        UserError: a folder or list is missing or malformed, or a listed picture is not there.
    """

    title = "LFW"
    layout = LAYOUT

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "all",
        *,
        crop: Callable[[Tensor], Tensor] | None = None,
        transform: Callable[[dict], Any] | None = None,
    ):
        choose(split, self.splits(), "split", self.title)
        root, folder, lists = _open(root, PEOPLE.get(split))
        self.crop = crop
        if split == "all":
            files = [path for path in walk(folder) if path.parent != folder]
        else:
            files = []
            for name, number in _read_people(lists):
                files.extend(_file(folder, name, index) for index in range(1, number + 1))
            _check_present(files, lists)
        names = sorted({path.parent.name for path in files})
        numbers = {name: number for number, name in enumerate(names)}
        records = [Face(path, path.parent.name, numbers[path.parent.name]) for path in files]
        super().__init__(root, split, records, transform)

    def labels(self, record: Face) -> dict[str, Any]:
        return {"name": record.name, "identity": record.identity}

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return ("all", *PEOPLE)

    @classmethod
    def parts(cls, root: str | os.PathLike) -> list[dict[str, str]]:
        return [{"split": "all"}, *({"split": split} for split, file in PEOPLE.items() if (Path(root) / file).exists())]

    def counts(self) -> dict[str, Any]:
        pictures = tally(record.identity for record in self.records)
        return {"people": len(pictures), "people by pictures": tally(pictures.values())}


class LFWPairs(ImageSet):
    """The pairs of LFW, for verification.

    ``[i]`` gives ``image`` and ``other``, Tensor[3, 250, 250] float32 in [0, 1]; ``path``; ``same``, bool; ``fold``.

    The protocol of view 2: for each of the ten folds, choose the threshold on the nine others and measure accuracy on
    this one; report the mean and its standard error. :meth:`folds` gives the indices.

    Args:
        root: the folder that holds ``lfw`` and the lists.
        split: ``"train"`` or ``"test"`` (view 1, for development), or ``"folds"`` (view 2, ``pairs.txt``, to report).
        crop: applied to each picture, Tensor[3, H, W].
        transform: applied to each sample.

    Raises:
        UserError: a folder or list is missing or malformed, or a listed picture is not there.
    """

    title = "LFW pairs"
    layout = LAYOUT

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "folds",
        *,
        crop: Callable[[Tensor], Tensor] | None = None,
        transform: Callable[[dict], Any] | None = None,
    ):
        choose(split, self.splits(), "split", self.title)
        root, folder, list_file = _open(root, PAIRS[split])
        self.crop = crop
        records = [
            Pair(_file(folder, first, a), _file(folder, second, b), first == second, fold)
            for first, a, second, b, fold in _read_pairs(list_file)
        ]
        _check_present([path for pair in records for path in (pair.path, pair.other)], list_file)
        super().__init__(root, split, records, transform)

    def sample(self, record: Pair) -> dict[str, Any]:
        return {**super().sample(record), "other": read_cropped(record.other, self.crop)}

    def labels(self, record: Pair) -> dict[str, Any]:
        return {"same": record.same, "fold": record.fold}

    def folds(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(indices of the nine other folds, indices of the fold), for each fold."""
        fold = np.array([record.fold for record in self.records])
        for number in np.unique(fold):
            yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return tuple(PAIRS)

    @classmethod
    def parts(cls, root: str | os.PathLike) -> list[dict[str, str]]:
        return [{"split": split} for split, file in PAIRS.items() if (Path(root) / file).exists()]

    def counts(self) -> dict[str, Any]:
        return {
            "same": sum(record.same for record in self.records),
            "different": sum(not record.same for record in self.records),
            "folds": len({record.fold for record in self.records}),
        }


PEOPLE = {"train": "peopleDevTrain.txt", "test": "peopleDevTest.txt", "folds": "people.txt"}
PAIRS = {"train": "pairsDevTrain.txt", "test": "pairsDevTest.txt", "folds": "pairs.txt"}


def _open(root: str | os.PathLike, listed: str | None) -> tuple[Path, Path, Path | None]:
    expected = [FOLDERS] if listed is None else [FOLDERS, listed]
    root = check_root(root, expected, name=LFW.title, layout=LAYOUT)
    folder = next(root / name for name in FOLDERS if (root / name).exists())
    return root, folder, None if listed is None else root / listed


def _file(folder: Path, name: str, number: int) -> Path:
    return folder / name / f"{name}_{number:04d}.jpg"


def _check_present(files: list[Path], listed: Path) -> None:
    absent = [str(path) for path in dict.fromkeys(files) if not path.exists()]
    if absent:
        raise UserError(f"{LFW.title}: {listed} names pictures that are not there: {shorten(absent)}")


def _lines(path: Path, what: str) -> list[list[str]]:
    lines = read_text(path, name=LFW.title, what=what).splitlines()
    return [line.split("\t") if "\t" in line else line.split() for line in lines if line.strip()]


def _wrong(path: Path, fields: list[str], expected: str) -> UserError:
    return UserError(f"{LFW.title}: {path} has the line {' '.join(fields)!r}; expected {expected}")


def _read_people(path: Path) -> list[tuple[str, int]]:
    """Names with numbers of pictures. The counts of people and folds in between have no name and are checked only."""
    people, announced = [], []
    for fields in _lines(path, "a list of people with the number of their pictures"):
        if len(fields) > 2 or not fields[-1].isdecimal():
            raise _wrong(path, fields, "a name and a number, separated by a tab")
        if len(fields) == 1:
            announced.append(int(fields[0]))
        else:
            people.append((fields[0], int(fields[1])))
    expected = sum(announced[1:]) if len(announced) > 1 else sum(announced)
    if expected != len(people):
        raise UserError(f"{LFW.title}: {path} announces {expected} people but lists {len(people)}; is it cut off?")
    return people


def _read_pairs(path: Path) -> list[tuple[str, int, str, int, int]]:
    """(name, number, name, number, fold) of every pair, in file order: of each fold the matching pairs come first."""
    lines = _lines(path, "a list of pairs")
    head = lines[0] if lines else []
    if not 1 <= len(head) <= 2 or not all(field.isdecimal() for field in head):
        raise _wrong(path, head, "first the number of folds (view 2 only) and of matching pairs in each")
    folds, each = (int(head[0]), int(head[1])) if len(head) == 2 else (1, int(head[0]))
    if len(lines) - 1 != folds * 2 * each:
        raise UserError(
            f"{LFW.title}: {path} announces {folds * 2 * each} pairs but lists {len(lines) - 1}; is it cut off?"
        )
    pairs = []
    for index, fields in enumerate(lines[1:]):
        if len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal():
            first, a, second, b = fields[0], fields[1], fields[0], fields[2]
        elif len(fields) == 4 and fields[1].isdecimal() and fields[3].isdecimal():
            first, a, second, b = fields
        else:
            raise _wrong(path, fields, "a name and two numbers, or twice a name and a number, separated by tabs")
        pairs.append((first, int(a), second, int(b), index // (2 * each)))
    return pairs


# How many pictures the people of the first ten, the second ten, ... have: most of the real ones have a single picture.
PICTURES = (2, 1, 3, 1, 1, 4, 1, 2, 1, 1)
MOST_PAIRS = 300
LEAST = 30
WOMEN = "Ada Bea Carla Dora Elena Fatima Greta Hana Ines Jana Karin Lucia Mei Nora Olga Petra Rosa Sara Tess Yuki"
MEN = "Adam Boris Carlos David Emil Farid Georg Hugo Ivan Jonas Kenji Luis Marco Nils Omar Pavel Raul Sven Tom Wei"
FAMILIES = (
    "Abe Adler Baker Berg Blanc Bruno Castro Chen Costa Dahl Diaz Eder Falk Fischer Garcia Gomez Haas Hill Horn Ito "
    "Jung Kaya Keller Kim Klein Lang Lee Lind Lopez Marsh Mayer Mori Nagy Novak Okafor Olsen Park Perez Quinn Reyes "
    "Ricci Rossi Sato Silva Singh Stone Suzuki Torres Vega Vogel Wagner Walker Weiss Wong Yilmaz Young Zhang Ziegler"
)


def synthesize(out: Path, count: int, *, seed: int, image_size: int, progress: Progress) -> None:
    """Write ``count`` pictures (at least 30) with all six lists.

    Each of the ten folds has people of its own; in view 1, the people of seven folds are for training. The lists hold
    up to 300 matching and as many non-matching pairs in each fold.

    Raises:
        UserError: fewer than 30 pictures, which cannot make ten folds.
    """
    from pyface.data.procedural import draw_person, draw_view, render

    if count < LEAST:
        raise UserError(f"LFW needs at least {LEAST} pictures for pairs in ten folds, got count {count}")

    def draw(items: list[tuple[int, int]]) -> Iterator[tuple[list[np.ndarray], None]]:
        people = [draw_person(seed, person) for person, _ in items]
        views = [draw_view(seed, index) for _, index in items]
        # LFW's pictures show more around the face than CelebA's.
        views = [replace(view, framing=replace(view.framing, scale=0.75 * view.framing.scale)) for view in views]
        for sample in render(people, views, image_size):
            yield [to_pixels(sample["image"])], None

    plan, pictures, names = [], {}, []
    while len(plan) < count:
        person = len(names)
        names.append(_name(person, draw_person(seed, person).female > 0.5))
        number = min(PICTURES[person // FOLDS % len(PICTURES)], count - len(plan))
        pictures[names[-1]] = number
        for index in range(1, number + 1):
            plan.append(((person, len(plan)), (str(_file(Path("lfw"), names[-1], index)),)))
    fill(out, plan, draw, progress)

    folds = [{name: pictures[name] for name in sorted(names[fold::FOLDS])} for fold in range(FOLDS)]
    pairs = [_pair(fold, np.random.default_rng((seed, number)), MOST_PAIRS) for number, fold in enumerate(folds)]
    each = min(len(kind) for kinds in pairs for kind in kinds)
    chosen = [line for kinds in pairs for kind in kinds for line in kind[:each]]
    people = [line for fold in folds for line in _people(fold)]
    write_text(out / PAIRS["folds"], "\n".join([f"{FOLDS}\t{each}", *chosen]) + "\n")
    write_text(out / PEOPLE["folds"], "\n".join([str(FOLDS), *people]) + "\n")
    for split, some, most in (("train", folds[:7], 1100), ("test", folds[7:], 500)):
        these = {name: number for fold in some for name, number in fold.items()}
        same, different = _pair(these, np.random.default_rng((seed, FOLDS + len(some))), most)
        each = min(len(same), len(different))
        write_text(out / PAIRS[split], "\n".join([str(each), *same[:each], *different[:each]]) + "\n")
        write_text(out / PEOPLE[split], "\n".join(_people(these)) + "\n")


def _name(person: int, female: bool) -> str:
    """A name that nobody else has: First_Last, and with a middle letter once those are used up."""
    firsts, families = (WOMEN if female else MEN).split(), FAMILIES.split()
    rest, first = divmod(person, len(firsts))
    middle, family = divmod(rest, len(families))
    letters = [chr(ord("A") + (middle - 1) % 26) * (1 + (middle - 1) // 26)] if middle else []
    return "_".join((firsts[first], *letters, families[(family + 7 * first) % len(families)]))


def _people(pictures: dict[str, int]) -> list[str]:
    return [str(len(pictures)), *(f"{name}\t{number}" for name, number in sorted(pictures.items()))]


def _pair(pictures: dict[str, int], rng: np.random.Generator, most: int) -> tuple[list[str], list[str]]:
    """Lines of matching and of non-matching pairs among these people, no pair of people or pictures twice."""
    same = [f"{name}\t{a}\t{b}" for name, n in pictures.items() for a, b in combinations(range(1, n + 1), 2)]
    names = list(pictures)
    met: set[tuple[int, int]] = set()
    different: list[str] = []
    while len(different) < min(most, len(names) * (len(names) - 1) // 2):
        a, b = sorted(rng.choice(len(names), 2, replace=False).tolist())
        if (a, b) not in met:
            met.add((a, b))
            shown = [f"{name}\t{rng.integers(pictures[name]) + 1}" for name in (names[a], names[b])]
            different.append("\t".join(shown))
    return [same[index] for index in rng.permutation(len(same))[:most]], different
