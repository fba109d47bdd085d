"""What every data set reader does with a folder: check its layout, walk it, read its lists, and say what is wrong."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyface.data.images import SUFFIXES, read_photo
from pyface.errors import UserError


class EmptySplit(UserError):
    """The data set is there, but nothing in it belongs to the split that was asked for."""


def check_root(root: str | os.PathLike, expected: Sequence[str | Sequence[str]], *, name: str, layout: str) -> Path:
    """The folder, if it is laid out as ``name`` is; otherwise an error that says what to change.

    Args:
        root: what the user gave.
        expected: paths relative to ``root`` that must exist; a sequence of paths means at least one of them.
        name: of the data set, for the message.
        layout: the expected tree, a few lines, for the message.

    Raises:
        UserError: missing or not a folder, an expected entry is missing, or the folder above or one of the folders
            inside is the data set's (one level too low or too high).
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"{name}: {root} {what}; give the folder that holds\n{layout}")
    missing = _missing(root, expected)
    if not missing:
        return root
    above = root.resolve().parent
    if not _missing(above, expected):
        raise UserError(f"{name}: {root} is one level too low; give {above}, which holds\n{layout}")
    inside = sorted(child for child in root.iterdir() if child.is_dir() and not _missing(child, expected))
    if inside:
        raise UserError(f"{name}: {root} is one level too high; give {inside[0]}, which holds\n{layout}")
    raise UserError(f"{name}: {root} has no {missing[0]}; expected\n{layout}")


def _missing(root: Path, expected: Sequence[str | Sequence[str]]) -> list[str]:
    choices = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in expected]
    return [" or ".join(choice) for choice in choices if not any((root / entry).exists() for entry in choice)]


def walk(root: str | os.PathLike, suffixes: frozenset[str] | set[str] = SUFFIXES) -> Iterator[Path]:
    """All files below ``root`` with one of the ``suffixes`` (lower case, with dot), in a fixed order.

    Symbolic links to folders are followed, each folder once, so a loop of links ends. Hidden entries are left out.
    """
    seen: set[tuple[int, int]] = set()

    def enter(folder: Path) -> Iterator[Path]:
        about = folder.stat()
        if (about.st_dev, about.st_ino) in seen:
            return
        seen.add((about.st_dev, about.st_ino))
        for entry in sorted(folder.iterdir(), key=lambda entry: natural(entry.name)):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from enter(entry)
            elif entry.suffix.lower() in suffixes and entry.is_file():
                yield entry

    yield from enter(Path(root))


def natural(name: str) -> tuple:
    """Sorting key that puts ``frame10`` after ``frame9``."""
    parts, digits = [], ""
    for character in name + "\0":
        if character.isdecimal():
            digits += character
            continue
        if digits:
            parts.append((0, int(digits), digits))
            digits = ""
        parts.append((1, ord(character), character))
    return tuple(parts)


def read_text(path: Path, *, name: str, what: str) -> str:
    """A list or annotation file as text. UserError if it is missing or not UTF-8; ``what`` says what it is."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{name}: {path} is missing; it is {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: {path} cannot be read as text ({error}); it should be {what}") from error


def read_json(path: Path, *, name: str, what: str) -> Any:
    """A JSON file. UserError if it is missing or damaged."""
    try:
        return json.loads(read_text(path, name=name, what=what))
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: {path} is not valid JSON ({error}); it should be {what}") from error


def read_csv(path: Path, columns: Sequence[str], *, name: str, what: str) -> list[dict[str, str]]:
    """Rows of a CSV file with a header, in file order.

    Raises:
        UserError: missing file, a missing column (the ones found are named), or a row with too few fields (its line
            number is named).
    """
    reader = csv.DictReader(read_text(path, name=name, what=what).splitlines())
    found = reader.fieldnames or []
    absent = [column for column in columns if column not in found]
    if absent:
        raise UserError(f"{name}: {path} has no column {absent[0]!r}; its columns are {', '.join(found) or 'none'}")
    rows = []
    for row in reader:
        if any(row[column] is None for column in columns):
            raise UserError(f"{name}: {path}, line {reader.line_num}: too few fields; expected {', '.join(found)}")
        rows.append(row)
    return rows


def read_image(path: str | os.PathLike) -> Tensor:
    """A picture file as Tensor[3, H, W], float32 in [0, 1]. UserError if it is missing or damaged."""
    return to_tensor(read_photo(path).pixels)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """ndarray[H, W, 3] uint8 -> Tensor[3, H, W], float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)


def to_pixels(image: Tensor) -> np.ndarray:
    """Tensor[3, H, W] in [0, 1] -> ndarray[H, W, 3] uint8, rounded."""
    return image.detach().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
