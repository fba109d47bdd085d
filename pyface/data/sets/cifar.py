"""CIFAR-10 and CIFAR-100, from their own archives (Krizhevsky, Learning multiple layers of features, 2009)."""

from __future__ import annotations

import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from pyface.data.sets.base import ImageSet, choose, tally
from pyface.data.sets.folders import check_root, to_tensor
from pyface.errors import UserError

SIDE = 32
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Release:
    """Names in one of the two releases: of archive and folder, of the files per split, and of the labels."""

    archive: str
    folder: str
    files: dict[str, tuple[str, ...]]
    labels: bytes
    meta: str
    names: bytes


RELEASES = {
    10: Release(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        b"labels",
        "batches.meta",
        b"label_names",
    ),
    100: Release(
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        {"train": ("train",), "test": ("test",)},
        b"fine_labels",
        "meta",
        b"fine_label_names",
    ),
}


@dataclass(frozen=True)
class Record:
    """One picture: ``path`` of the batch with the row in it, ``label``, and pixels, ndarray[32, 32, 3] uint8."""

    path: str
    label: int
    pixels: np.ndarray


class CIFAR(ImageSet):
    """CIFAR-10 or CIFAR-100 (fine labels), from the downloaded archive as it is, or from its unpacked folder.

    ``[i]`` gives ``image``, Tensor[3, 32, 32] float32 in [0, 1]; ``path``; ``label``; ``name`` of the class. Unlike the
    other sets, all pixels of the split are held in memory (150 MB for training).

    The archives hold pickles, which could run anything when loaded; here they may hold arrays, numbers, strings and
    containers of them and nothing else. So no checksum is needed, as torchvision's reader does, which therefore refuses
    every repacked or shortened copy.

    Args:
        root: the folder that holds the archive or the unpacked folder, or the archive.
        classes: 10 or 100.
        split: ``"train"`` or ``"test"``.
        transform: applied to each sample.

    Raises:
        UserError: neither is there, a batch is missing, damaged or holds something else, or a label is out of range.
    """

    title = "CIFAR"

    def __init__(
        self,
        root: str | os.PathLike,
        classes: int = 10,
        split: str = "train",
        *,
        transform: Callable[[dict], Any] | None = None,
    ):
        if classes not in RELEASES:
            raise UserError(f"{self.title}: no release with {classes} classes; there are 10 and 100")
        choose(split, SPLITS, "split", self.title)
        release = RELEASES[classes]
        self.title = f"CIFAR-{classes}"
        self.layout = f"  {release.archive}\n  or {release.folder}/ with {', '.join(release.files[split])}"
        root = Path(root)
        if root.is_file():
            home = root
        else:
            root = check_root(root, [(release.folder, release.archive)], name=self.title, layout=self.layout)
            home = root / (release.folder if (root / release.folder).is_dir() else release.archive)
        batches = _read(home, release.folder, (release.meta, *release.files[split]), self.title)
        self.names = [_text(name) for name in _entry(batches[0], release.names, home, self.title)]
        records = []
        for file, batch in zip(release.files[split], batches[1:], strict=True):
            pixels, labels = _check(batch, release.labels, classes, home / file, self.title)
            records.extend(Record(f"{home / file}[{row}]", label, pixels[row]) for row, label in enumerate(labels))
        super().__init__(root, split, records, transform)

    def sample(self, record: Record) -> dict[str, Any]:
        return {"image": to_tensor(record.pixels), "path": record.path, **self.labels(record)}

    def labels(self, record: Record) -> dict[str, Any]:
        return {"label": record.label, "name": self.names[record.label]}

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return SPLITS

    @classmethod
    def parts(cls, root: str | os.PathLike) -> list[dict[str, Any]]:
        root = Path(root)
        present = [n for n, its in RELEASES.items() if (root / its.folder).exists() or (root / its.archive).exists()]
        return [{"classes": classes, "split": split} for classes in present for split in SPLITS]

    def summary(self) -> dict[str, Any]:
        return {
            "name": self.title,
            "split": self.split,
            "images": len(self),
            "labels": tally(self.names[record.label] for record in self.records),
            "sizes": {f"{SIDE}x{SIDE}": len(self)},
        }


class _OnlyArrays(pickle.Unpickler):
    """Loads containers, numbers, strings and NumPy arrays; whatever else the file names is refused."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _read(home: Path, folder: str, names: tuple[str, ...], title: str) -> list[dict]:
    """The named batches of the unpacked folder or archive ``home``."""
    if home.is_dir():
        contents = {}
        for name in names:
            try:
                contents[name] = (home / name).read_bytes()
            except FileNotFoundError:
                raise UserError(f"{title}: {home} has no {name}; unpack the whole archive again") from None
            except OSError as error:
                raise UserError(f"{title}: cannot read {home / name}: {error.strerror or error}") from error
    else:
        contents = _read_archive(home, folder, names, title)
    batches = []
    for name in names:
        try:
            batch = _OnlyArrays(BytesIO(contents[name]), encoding="bytes").load()
        except Exception as error:  # damaged pickles raise anything at all
            if isinstance(error, MemoryError):
                raise
            raise UserError(f"{title}: {home / name} is damaged or not a batch of {title} ({error})") from error
        batches.append(batch)
    return batches


def _read_archive(path: Path, folder: str, names: tuple[str, ...], title: str) -> dict[str, bytes]:
    wanted = {f"{folder}/{name}": name for name in names}
    contents = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = wanted.get(member.name.removeprefix("./"))
                if name is not None and member.isfile():
                    contents[name] = archive.extractfile(member).read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{title}: {path} is cut off or not a tar archive ({error}); download it again") from error
    absent = [name for name in names if name not in contents]
    if absent:
        raise UserError(f"{title}: {path} has no {folder}/{absent[0]}; is it the archive of the python version?")
    return contents


def _entry(batch: Any, key: bytes, path: Path, title: str) -> Any:
    batch = batch if isinstance(batch, dict) else {}
    for found in (key, key.decode()):
        if found in batch:
            return batch[found]
    raise UserError(f"{title}: {path} has no entry {key.decode()!r}; it is not a batch of {title}")


def _check(batch: Any, key: bytes, classes: int, path: Path, title: str) -> tuple[np.ndarray, list[int]]:
    data, labels = _entry(batch, b"data", path, title), _entry(batch, key, path, title)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(labels), 3 * SIDE * SIDE):
        raise UserError(f"{title}: {path} should hold one row of {3 * SIDE * SIDE} bytes per label")
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < classes]
    if wrong:
        raise UserError(f"{title}: {path} holds the label {wrong[0]}, expected 0 to {classes - 1}")
    return data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
