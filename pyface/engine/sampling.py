"""The order of training data: a pure function of (seed, epoch, step), whatever the number of processes and workers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pyface.engine.recipe import Recipe
from pyface.errors import UserError

if TYPE_CHECKING:
    from pyface.engine.run import Run

_ORDER, _SAMPLE, _STEP = range(3)


def seed_everything(seed: int, step: int, rank: int, device: torch.device | None = None) -> None:
    """Seed torch, NumPy and Python for one step, so that there is no generator state to save."""
    number = int(np.random.SeedSequence((seed, step, rank, _STEP)).generate_state(1, np.uint64)[0])
    # Not torch.manual_seed, which formats a traceback for each kind of device that is not in use: a millisecond.
    torch.default_generator.manual_seed(number)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


class Order:
    """Which samples each step of each epoch takes.

    The last incomplete batch of an epoch is left out; a data set smaller than one batch is repeated to fill it.
    """

    def __init__(self, recipe: Recipe, data: Dataset) -> None:
        self.recipe, self.length = recipe, len(data)  # type: ignore[arg-type]
        if self.length == 0:
            raise UserError("the data set is empty; there is nothing to train on")
        self.per_epoch = len(self.epoch(0)) // recipe.config.batch_size

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of all samples of one epoch, int64 [steps * batch_size]."""
        config = self.recipe.config
        rng = np.random.default_rng((config.seed, epoch, _ORDER))
        order = np.asarray(self.recipe.order(epoch, self.length, rng), dtype=np.int64)
        if len(order) == 0:
            raise UserError(f"epoch {epoch} has no samples; there is nothing to train on")
        if len(order) < config.batch_size:
            return np.resize(order, config.batch_size)
        return order[: len(order) // config.batch_size * config.batch_size]

    def parts(self, run: Run, first: int) -> Iterator[list[tuple[int, int, int]]]:
        """From step ``first`` on without end: (epoch, place in the epoch, index) of each sample of this process."""
        size = self.recipe.config.batch_size
        step = first
        while True:
            epoch = step // self.per_epoch
            order = self.epoch(epoch)
            if len(order) != self.per_epoch * size:
                raise UserError(
                    f"epoch {epoch} has {len(order) // size} batches and epoch 0 has {self.per_epoch}; "
                    f"a recipe's order() must always give equally many samples"
                )
            for place in range(step % self.per_epoch, self.per_epoch):
                for part in range(run.config.accumulate):
                    share = run.share(size, part)
                    places = range(place * size + share.start, place * size + share.stop)
                    yield [(epoch, p, int(order[p])) for p in places]
            step = (epoch + 1) * self.per_epoch


class _Samples(Dataset):
    """A data set that is asked for (epoch, place, index), and augments with what only those and the seed decide."""

    def __init__(self, recipe: Recipe, data: Dataset) -> None:
        self.recipe, self.data = recipe, data
        self.augments = type(recipe).augment is not Recipe.augment

    def __getitems__(self, keys: Sequence[tuple[int, int, int]]) -> list[Any]:
        indices = [index for _, _, index in keys]
        many = getattr(self.data, "__getitems__", None)
        samples = many(indices) if many else [self.data[index] for index in indices]
        if not self.augments:
            return samples
        # torchvision's transforms draw from torch's generator, which belongs to the step outside of workers.
        before = torch.get_rng_state()
        augmented = []
        for (epoch, place, _), sample in zip(keys, samples, strict=True):
            rng = np.random.default_rng((self.recipe.config.seed, epoch, _SAMPLE, place // self.recipe.alike))
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            augmented.append(self.recipe.augment(sample, rng))
        torch.set_rng_state(before)
        return augmented


def batches(run: Run, order: Order, data: Dataset) -> Iterator[Any]:
    """This process's parts of the batches from the run's step on, collated, still on the CPU."""
    workers = run.config.workers
    return iter(
        DataLoader(
            _Samples(run.recipe, data),
            batch_sampler=order.parts(run, run.step),
            collate_fn=run.recipe.collate,
            num_workers=workers,
            pin_memory=run.device.type == "cuda",
            # A generator of its own: the loader would otherwise draw its workers' seeds from the step's.
            generator=torch.Generator().manual_seed(run.config.seed),
        )
    )
