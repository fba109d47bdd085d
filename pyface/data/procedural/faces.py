"""A data set of people who do not exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from pyface.data.procedural.parameters import Person, View, draw_person, draw_view
from pyface.data.procedural.photo import check_size, render
from pyface.errors import UserError

PHOTOS_PER_PERSON = 4


class ProceduralFaces(Dataset):
    """Pictures of procedural people with everything known about them; sample ``i`` depends on (seed, i) alone.

    Args:
        length: number of samples, at least 1.
        image_size: side in pixels, 16 to 1024.
        seed: number of the world. People and views of different seeds have nothing in common.
        identities: how many people there are; sample ``i`` then shows person ``i % identities``. None: person
            ``i // 4``, so everybody has four photos in a row.
        occluders: False leaves hands, masks, paper and microphones away.

    A sample is the dict of :func:`~pyface.data.procedural.photo.render` and ``index``. Works with a DataLoader's
    workers; ``__getitems__`` takes whole batches.

    Raises:
        UserError: a number out of its range, also for a negative index.
        IndexError: an index past the end.
    """

    def __init__(
        self,
        length: int,
        image_size: int = 128,
        seed: int = 0,
        identities: int | None = None,
        *,
        occluders: bool = True,
    ):
        for name, value, least in (("length", length, 1), ("seed", seed, 0), ("identities", identities, 1)):
            if name == "identities" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"ProceduralFaces: {name} must be an integer of at least {least}, got {value!r}")
        self.length, self.image_size, self.seed, self.identities = length, check_size(image_size), seed, identities
        self.occluders = occluders

    def __len__(self) -> int:
        return self.length

    def identity(self, index: int) -> int:
        """Number of the person in sample ``index``."""
        return index // PHOTOS_PER_PERSON if self.identities is None else index % self.identities

    def parameters(self, index: int) -> tuple[Person, View]:
        """Who is in sample ``index``, and under which circumstances."""
        index = self._checked(index)
        view = draw_view(self.seed, index)
        if not self.occluders:
            view = replace(view, occluder=None)
        return draw_person(self.seed, self.identity(index)), view

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        people, views = zip(*[self.parameters(index) for index in indices])
        samples = render(people, views, self.image_size)
        return [{**sample, "index": int(index)} for sample, index in zip(samples, indices)]

    def sketch(self, index: int, style: int = 1):
        """Sample ``index`` as drawn by one of three artists, Tensor[1, H, W]; see :func:`pyface.data.sketch.sketch`."""
        from pyface.data.sketch import sketch

        return sketch(self[index], style, seed=self.seed)

    def forge(self, index: int, method: str, frames: int = 1):
        """A forgery of the clip that starts as sample ``index``; see :func:`pyface.data.forgery.forge`.

        The source is the person after this one. ``frames`` above 1 draws a clip by :func:`draw_clip`.
        """
        from pyface.data.forgery import forge
        from pyface.data.procedural.parameters import draw_clip

        person, view = self.parameters(index)
        views = [view] if frames == 1 else draw_clip(self.seed, index, frames)
        following = person.identity + 1 if self.identities is None else (person.identity + 1) % self.identities
        source = draw_person(self.seed, following)
        return forge(method, person, views, source, seed=self.seed + index, image_size=self.image_size)

    def edit(self, index: int, sequence: Sequence[str]):
        """Sample ``index`` after component or attribute edits; see :func:`pyface.data.edits.edit`."""
        from pyface.data.edits import edit

        person, view = self.parameters(index)
        return edit(sequence, person, view, seed=self.seed, image_size=self.image_size)

    def _checked(self, index: int) -> int:
        if index < 0:
            raise UserError(f"ProceduralFaces: samples are numbered from 0 to {self.length - 1}, got {index}")
        if index >= self.length:  # an IndexError ends a for loop
            raise IndexError(f"sample {index} of ProceduralFaces with {self.length} samples")
        return int(index)
