"""scikit-learn's handwritten digits as pictures: real data on every machine, with nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from pyface.data.sets.base import ImageSet, choose, tally
from pyface.errors import UserError

SPLITS = ("train", "test")
TEST_EVERY = 5


@dataclass(frozen=True)
class Record:
    """One digit: the ``index`` in scikit-learn's set, its ``label``, and ``pixels``, ndarray[8, 8] in [0, 1]."""

    index: int
    label: int
    pixels: np.ndarray


class DigitsAsImages(ImageSet):
    """The 1797 digits of ``sklearn.datasets.load_digits`` as RGB pictures.

    ``[i]`` gives ``image``, Tensor[3, size, size] float32 in [0, 1], white on black, bilinear from 8 x 8; ``path``,
    ``"digits[index]"``; ``label``, 0 to 9. Of every class, each fifth digit is for testing: 1442 train, 355 test.
    The same people wrote both parts.

    Args:
        split: ``"train"`` or ``"test"``.
        size: of the pictures, at least 8 pixels.
        transform: applied to each sample.
    """

    title = "digits"
    layout = "  nothing; it ships with scikit-learn"

    def __init__(self, split: str = "train", size: int = 32, *, transform: Callable[[dict], Any] | None = None):
        from sklearn.datasets import load_digits

        choose(split, SPLITS, "split", self.title)
        if size < 8:
            raise UserError(f"{self.title}: size is {size}, expected 8 or more pixels")
        self.size = size
        digits = load_digits()
        seen = np.zeros(10, int)
        records = []
        for index, (pixels, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
            is_test = seen[label] % TEST_EVERY == TEST_EVERY - 1
            seen[label] += 1
            if is_test == (split == "test"):
                records.append(Record(index, label, (pixels / 16).astype(np.float32)))
        super().__init__("scikit-learn", split, records, transform)

    def sample(self, record: Record) -> dict[str, Any]:
        small = torch.from_numpy(record.pixels)[None, None]
        image = interpolate(small, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return {"image": image[0].repeat(3, 1, 1), "path": f"digits[{record.index}]", **self.labels(record)}

    def labels(self, record: Record) -> dict[str, Any]:
        return {"label": record.label}

    @classmethod
    def splits(cls) -> tuple[str, ...]:
        return SPLITS

    def summary(self) -> dict[str, Any]:
        return {
            "name": self.title,
            "split": self.split,
            "images": len(self),
            "labels": tally(record.label for record in self.records),
            "sizes": {f"{self.size}x{self.size}": len(self)},
        }
