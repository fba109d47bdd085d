"""What the readers of picture data sets have in common."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import Dataset

from pyface.data.images import FORMATS
from pyface.data.sets.folders import EmptySplit, read_image
from pyface.errors import UserError

SIZES_SAMPLED = 64


class ImageSet(Dataset):
    """A map-style data set of pictures in files. Lists are read at construction, pictures when asked for.

    Attributes:
        records: one per sample, in a fixed order; each has at least ``path``.
        split: the name of the split.
        transform: applied to each finished sample, a dict; what it returns is what ``[i]`` gives.
    """

    title: ClassVar[str]
    layout: ClassVar[str]
    records: Sequence[Any]
    # Only sets without labels that lie at pixels take a crop step.
    crop: Callable[[Tensor], Tensor] | None = None

    def __init__(self, root: Path, split: str, records: Sequence[Any], transform: Callable[[dict], Any] | None):
        self.root, self.split, self.records, self.transform = root, split, records, transform
        if not records:
            raise EmptySplit(f"{self.title}: {root} has no pictures for the split {split!r}; expected\n{self.layout}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        sample = self.sample(self.records[index])
        return sample if self.transform is None else self.transform(sample)

    def sample(self, record: Any) -> dict[str, Any]:
        """``image``, Tensor[3, H, W] float32 in [0, 1], ``path``, and the labels of the record."""
        image = read_cropped(record.path, self.crop)
        return {"image": image, "path": str(record.path), **self.labels(record)}

    def labels(self, record: Any) -> dict[str, Any]:
        """What a sample holds beside the picture."""
        raise NotImplementedError

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        """Names that ``split`` may be."""
        raise NotImplementedError

    @classmethod
    def parts(cls, root: str | os.PathLike) -> list[dict[str, str]]:
        """Settings of every reader that ``root`` can feed."""
        return [{"split": split} for split in cls.splits()]

    def counts(self) -> dict[str, Any]:
        """Numbers of samples by label, for :meth:`summary`."""
        return {}

    def summary(self) -> dict[str, Any]:
        """``name``, ``split``, ``images``, counts by label, and ``sizes``: width x height of up to 64 pictures."""
        return {
            "name": self.title,
            "split": self.split,
            "images": len(self),
            **self.counts(),
            "sizes": image_sizes([record.path for record in self.records]),
        }


def read_cropped(path: str | os.PathLike, crop: Callable[[Tensor], Tensor] | None) -> Tensor:
    """A picture after the crop step, if there is one. UserErrors of either name the file."""
    image = read_image(path)
    if crop is None:
        return image
    try:
        return crop(image)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def choose(value: str, known: Sequence[str], what: str, title: str) -> str:
    """``value`` if it is ``known``, else a UserError."""
    if value not in known:
        raise UserError(f"{title}: no {what} {value!r}; there are {', '.join(known)}")
    return value


def tally(values: Iterable[Any]) -> dict[str, int]:
    """How often each value occurs, sorted by value; JSON-ready."""
    return {str(value): number for value, number in sorted(Counter(values).items())}


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) of a picture file as it is shown (EXIF orientation applied), from its header.

    Raises:
        UserError: missing, or not a picture.
    """
    from PIL import Image

    Image.init()  # Pillow only knows the parsers that something has loaded
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception as error:  # a parser fed with hostile bytes may raise anything at all
        if isinstance(error, MemoryError):
            raise
        strange = "not a picture that pyface reads, or damaged"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else strange
        raise UserError(f"cannot read {path}: {reason}") from error


def image_sizes(paths: Sequence[Path]) -> dict[str, int]:
    """Sizes as ``"178x218": 64`` of up to 64 of the pictures, evenly taken, the most frequent first."""
    step = max(1, -(-len(paths) // SIZES_SAMPLED))
    found = Counter("{}x{}".format(*image_size(path)) for path in paths[::step])
    return dict(found.most_common())
