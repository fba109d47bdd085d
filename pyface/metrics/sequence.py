"""Was a sequence of face edits recovered? Accuracy per step, and over the whole sequence.

A sequence is ``steps`` edit ids, 1 to ``classes``, in the order of the edits, filled up with 0 (no edit); an untouched
face is all 0. Fixed and adaptive accuracy are the measures of the Seq-DeepFake benchmark (Shao et al., ECCV 2022,
arXiv:2207.02204). Complete sequence matching is named by MMNet (Xia et al., TIFS 2024, arXiv:2307.02733), whose formula
could not be read; ours is the literal one: the whole sequence is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from pyface.errors import UserError
from pyface.metrics._base import Mean, describe


class _Sequences(Metric):
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, steps: int = 5, classes: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if steps < 1 or classes < 1:
            raise UserError(f"{type(self).__name__}: steps and classes must be at least 1, got {steps} and {classes}")
        self.steps, self.classes = steps, classes

    def _check(self, predicted: Tensor, target: Tensor) -> None:
        for name, ids in (("predicted", predicted), ("target", target)):
            where = f"{type(self).__name__}: {name}"
            if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != self.steps or ids.is_floating_point():
                raise UserError(f"{where} must be an integer Tensor[N, {self.steps}], got {describe(ids)}")
            if ids.numel() and not 0 <= ids.min() <= ids.max() <= self.classes:
                raise UserError(
                    f"{where} must hold edit ids from 0 (none) to {self.classes}, got {ids.min()} to {ids.max()}"
                )
        if len(predicted) != len(target):
            raise UserError(
                f"{type(self).__name__}: predicted and target must have one length, got {len(predicted)} and "
                f"{len(target)}"
            )


class FixedAccuracy(_Sequences, Mean):
    """Share of all positions, filling included, at which the predicted id is right. NaN without samples.

    Filling counts, so predicting "no edit" everywhere scores well on short sequences.

    ``update(predicted, target)``: integer Tensor[N, steps] each, ids from 0 to ``classes``.
    """

    def update(self, predicted: Tensor, target: Tensor) -> None:
        self._check(predicted, target)
        self._add(predicted == target)


class AdaptiveAccuracy(_Sequences, Mean):
    """Share of right positions among those that matter: a micro average over positions. NaN without samples.

    For each image only the first l positions count, with l the larger of the numbers of non-zero ids in prediction and
    target (an id 0 inside a predicted sequence is not counted, as in the benchmark's code). Where l = 0, the image
    counts as one right position.

    ``update(predicted, target)``: integer Tensor[N, steps] each, ids from 0 to ``classes``.
    """

    def update(self, predicted: Tensor, target: Tensor) -> None:
        self._check(predicted, target)
        length = torch.maximum((predicted != 0).sum(1), (target != 0).sum(1)).clamp(min=1)
        within = torch.arange(self.steps, device=target.device) < length[:, None]
        self._add((predicted == target) & within, count=length.sum())


def matching_prefixes(predicted: Tensor, target: Tensor) -> Tensor:
    """bool Tensor[N, steps]: whether the first k ids of an image are all right, for k = 1 to ``steps``."""
    return (predicted == target).long().cumprod(1).bool()


class CompleteSequenceMatch(_Sequences):
    """Share of images whose whole sequence is right, and the curve over its first k steps. NaN without samples.

    ``update(predicted, target)``: integer Tensor[N, steps] each, ids from 0 to ``classes``.
    ``compute()``: ``{"csm": ..., "csm@1": ..., ..., "csm@<steps>": ...}``; ``csm`` is the last of the curve, which
    never rises. ``csm`` is at most the fixed accuracy.

    Args:
        rule: (predicted, target), each Tensor[N, steps] -> bool Tensor[M, steps], one row per image that counts, one
            column per k. Another reading of the measure, such as "forged images only", is another rule.
    """

    is_differentiable = False
    full_state_update = False

    matched: Tensor
    images: Tensor

    def __init__(
        self,
        steps: int = 5,
        classes: int = 5,
        rule: Callable[[Tensor, Tensor], Tensor] = matching_prefixes,
        **kwargs: Any,
    ) -> None:
        super().__init__(steps, classes, **kwargs)
        self.rule = rule
        self.add_state("matched", torch.zeros(steps, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        self._check(predicted, target)
        matched = self.rule(predicted, target)
        self.matched += matched.sum(0)
        self.images += len(matched)

    def compute(self) -> dict[str, Tensor]:
        curve = self.matched / self.images
        return {"csm": curve[-1], **{f"csm@{k}": share for k, share in enumerate(curve, 1)}}
