"""What a method says about its training; everything else is the engine's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, default_collate

from pyface.engine.config import TrainConfig

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from pyface.engine.run import Run

Row = dict[str, Any]


class Recipe(ABC):
    """One method's training and evaluation; its module names it ``Recipe``.

    Everything random draws either from the generator that is handed in, or, inside :meth:`model`, :meth:`step` and
    :meth:`augment`, from a global generator (torch's; in the first two also NumPy's and Python's): the engine seeds
    them from the run's seed and the step, so that a resumed run continues as if it had never stopped. For the same
    reason a recipe keeps no state between steps; what must survive belongs into a buffer of the model.

    Attributes:
        Config: class of the settings.
        manual: :meth:`step` calls ``run.backward`` and ``run.update`` itself (several optimisers taking turns, a
            closure). Otherwise it returns a ``"loss"``, and the engine minimises it with all optimisers.
        best: columns of the validation table to choose weights by, with ``"max"`` or ``"min"``. For each, the weights
            with the best mean over the rows are kept as ``best-COLUMN.safetensors``; those of the first are the run's
            result. Without any, the result is what the last step leaves.
        alike: so many samples in a row of an epoch are augmented with the same random numbers: 2 where :meth:`order`
            gives pairs that shall be cropped and mirrored alike.
        stores: ``"trainable"`` writes only parameters that require a gradient (and the buffers beside them) into
            checkpoints and results, for small additions to a large frozen network.
    """

    Config: ClassVar[type[TrainConfig]]
    manual: ClassVar[bool] = False
    best: ClassVar[Mapping[str, Literal["max", "min"]]] = {}
    alike: int = 1
    stores: ClassVar[Literal["all", "trainable"]] = "all"

    def __init__(self, config: TrainConfig) -> None:
        self.config: Any = config

    def prepare(self, folder: Path, quiet: bool) -> None:  # noqa: B027 - nothing, by default
        """Make what training reads, such as a cache, in the run's folder, unless it is there. One process at a time."""

    @abstractmethod
    def model(self) -> nn.Module:
        """All networks of the training, in training mode; what does not require a gradient is frozen."""

    def result(self, model: nn.Module) -> nn.Module:
        """The part of :meth:`model` that is averaged, validated and written out: itself, or the generator of a GAN."""
        return model

    @abstractmethod
    def optimizers(self, model: nn.Module) -> Optimizer | dict[str, Optimizer]:
        """The optimiser, or several by name."""

    def schedulers(self, run: Run) -> list[tuple[LRScheduler, Literal["step", "epoch"]]]:
        """Torch's schedulers of ``run.optimizers``, and after what each advances. ``run.steps`` is the total."""
        return []

    def data(self) -> Dataset | None:
        """Training samples by index, each the same every time; None if :meth:`step` makes its own batches."""
        return None

    def order(self, epoch: int, length: int, rng: np.random.Generator) -> Sequence[int]:
        """Indices of one epoch: a shuffle, unless a method balances classes or draws a part. Always equally many."""
        return rng.permutation(length)

    def augment(self, sample: Any, rng: np.random.Generator) -> Any:
        """A sample changed at random. It depends on seed, epoch and place in the epoch, on no process or worker.

        Samples that are to be :attr:`alike` get equal generators.
        """
        return sample

    def collate(self, samples: list[Any]) -> Any:
        """A batch."""
        return default_collate(samples)

    def on_epoch(self, run: Run) -> None:  # noqa: B027 - nothing, by default
        """Called before the first step of each epoch, and after resuming within one."""

    @abstractmethod
    def step(self, run: Run, batch: Any) -> dict[str, Tensor | float]:
        """One step on this process's part of the batch (``batch`` is None without :meth:`data`).

        Returns:
            Scalars for the log, means over the part; in automatic mode ``"loss"``, a scalar with a graph, among them.
        """

    def validate(self, network: nn.Module) -> list[Row]:
        """Rows of a table measured on validation data; ``network`` is :meth:`result` in evaluation mode."""
        return []

    def about(self, rows: list[Row]) -> dict[str, str]:
        """What the file of weights says of itself beside method and step, such as how to build its network.

        Args:
            rows: the validation table of these weights; a threshold may come from there.
        """
        return {}

    def evaluate(self, network: nn.Module) -> list[Row]:
        """The table of ``pyface evaluate``, measured on test data; the validation table where there is no other.

        Nothing was prepared for it: it must do without :meth:`prepare`.
        """
        return self.validate(network)
