"""What the metrics share: states that do not depend on batches and processes, and checks of what comes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from pyface.errors import UserError


class Mean(Metric):
    """A sum over a count, kept in float64 (whole numbers exactly). NaN before the first sample.

    A subclass's ``update`` calls ``_add``. The state is named after the subclass, because ``MetricCollection`` takes
    two metrics for one when their states have the same names and, after the first batch, by chance the same values.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._state = f"{type(self).__name__}_sum_and_count"
        self.add_state(self._state, torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, scores: Tensor, count: Tensor | None = None) -> None:
        """Scores of any shape, and how much they count for (as many as there are, if not said)."""
        total = scores.sum(dtype=torch.float64)
        count = torch.full_like(total, scores.numel()) if count is None else count.to(total)
        setattr(self, self._state, getattr(self, self._state) + torch.stack((total, count)))

    def _mean(self) -> Tensor:
        total, count = getattr(self, self._state)
        return (total / count).float()

    def compute(self) -> Any:
        return self._mean()


class RowMetric(Metric):
    """Keeps all samples: each state is a column to which ``update`` adds rows.

    ``columns`` maps a state's name to an empty tensor that shows the dtype and the shape of its rows. torchmetrics
    stands in for a process that saw no sample with an empty float vector, which cannot be gathered with columns of
    another dtype or rank; so such a process contributes the empty tensor of the right kind instead.
    """

    is_differentiable = False
    full_state_update = False
    columns: ClassVar[Mapping[str, Tensor]]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self.columns:
            self.add_state(name, [], dist_reduce_fx="cat")

    def sync(self, *args: Any, **kwargs: Any) -> None:
        for name in self.columns:
            if isinstance(getattr(self, name), list):
                setattr(self, name, [self.column(name)])
        super().sync(*args, **kwargs)

    def column(self, name: str) -> Tensor:
        """All rows of a column so far; empty before the first."""
        rows = getattr(self, name)
        if isinstance(rows, Tensor):
            return rows
        return torch.cat(rows) if rows else self.columns[name].to(self.device)


def check_images(function: str, *, channels: tuple[int, ...] = (1, 3), **images: Tensor) -> None:
    """UserError unless all are float Tensor[N, C, H, W] of one shape, finite and in [0, 1]."""
    shape = None
    for name, image in images.items():
        if not isinstance(image, Tensor) or image.ndim != 4 or not image.is_floating_point():
            raise UserError(f"{function}: {name} must be a float Tensor[N, C, H, W], got {describe(image)}")
        if image.shape[-3] not in channels:
            raise UserError(
                f"{function}: {name} must have {' or '.join(map(str, channels))} channels, got {describe(image)}"
            )
        if shape is not None and image.shape != shape:
            raise UserError(
                f"{function}: {' and '.join(images)} must have one shape, got {list(shape)} and {list(image.shape)}"
            )
        shape = image.shape
        check_unit(function, name, image)


def check_unit(function: str, name: str, values: Tensor) -> None:
    """UserError unless all values are in [0, 1] (so none is NaN)."""
    if values.numel() and not bool(((values >= 0) & (values <= 1)).all()):
        low, high = values.detach().aminmax()
        raise UserError(f"{function}: {name} must be in [0, 1], got values from {low.item():g} to {high.item():g}")


def check_scores(function: str, **vectors: Tensor) -> None:
    """UserError unless all are finite Tensor[N] of one length."""
    length = None
    for name, vector in vectors.items():
        if not isinstance(vector, Tensor) or vector.ndim != 1:
            raise UserError(f"{function}: {name} must be a Tensor[N], got {describe(vector)}")
        if length is not None and len(vector) != length:
            raise UserError(f"{function}: {' and '.join(vectors)} must have one length, got {length} and {len(vector)}")
        length = len(vector)
        if not bool(vector.isfinite().all()):
            raise UserError(f"{function}: {name} has values that are not finite")


def check_labels(function: str, name: str, labels: Tensor) -> None:
    """UserError unless all labels are 0 or 1 (or bool)."""
    wrong = labels[(labels != 0) & (labels != 1)]
    if len(wrong):
        raise UserError(f"{function}: {name} must be 0 or 1, got {wrong[0].item():g}")


def describe(value: Any) -> str:
    """Dtype and shape for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
