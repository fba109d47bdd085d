"""Is it still the same person, and do the eyes still look the same way?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyface.errors import UserError
from pyface.metrics._base import Mean, RowMetric, check_images, check_labels, check_scores, describe


class IdentitySimilarity(Mean):
    """Mean cosine of the embeddings of two pictures of each pair, and the share of pairs taken for one person.

    For privacy the share is what matters: anonymisation succeeds on 1 - ``matched`` of the faces. Judge with
    recognisers that had no part in making the pictures.

    ``update(first, second)``: Tensor[N, 3, H, W] each, in [0, 1].
    ``compute()``: ``{"similarity": ...}``, and with a threshold ``"matched"``; NaN without pairs.

    Args:
        embedder: images Tensor[N, 3, H, W] in [0, 1] -> Tensor[N, D], of any length: for example
            :func:`pyface.backbones.create_recogniser`. Called under ``no_grad``, in the mode it is in (put it into
            ``eval()``), with both halves of the pairs in one batch.
        threshold: two faces match where their cosine is at least this; :class:`VerificationRate` finds it on
            pairs that are known.
    """

    higher_is_better = None  # recovery wants it high, anonymisation low

    matched: Tensor

    def __init__(self, embedder: Callable[[Tensor], Tensor], threshold: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embedder = embedder
        self.threshold = threshold
        self.add_state("matched", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, first: Tensor, second: Tensor) -> None:
        check_images("IdentitySimilarity", channels=(3,), first=first, second=second)
        if not len(first):
            return
        embedded = self.embedder(torch.cat((first, second)))
        if embedded.ndim != 2 or len(embedded) != 2 * len(first):
            raise UserError(
                f"IdentitySimilarity: the embedder must return Tensor[{2 * len(first)}, D], got {describe(embedded)}"
            )
        cosine = F.cosine_similarity(*embedded.float().chunk(2), dim=1)
        if self.threshold is not None:
            self.matched += (cosine >= self.threshold).sum()
        self._add(cosine)

    def compute(self) -> dict[str, Tensor]:
        result = {"similarity": self._mean()}
        if self.threshold is not None:
            result["matched"] = (self.matched / getattr(self, self._state)[1]).float()
        return result


class VerificationRate(RowMetric):
    """Share of same-person pairs accepted at a given false accept rate, and the threshold that gives it.

    The threshold is the lowest that lets at most ``far`` of the different-person pairs through (scores at the threshold
    are accepted). With fewer than 1 / ``far`` such pairs that is one above them all: the rate is then a lower bound,
    not a measurement at that ``far``.

    ``update(similarities, same)``: float Tensor[N], higher = more alike; Tensor[N] of 1 = one person, 0 = two.
    ``compute()``: ``{"rate": ..., "threshold": ...}``, float32; NaN unless both kinds of pairs occurred.
    Keeps all scores.
    """

    higher_is_better = True
    columns = {"similarities": torch.empty(0, dtype=torch.float32), "same": torch.empty(0, dtype=torch.uint8)}

    def __init__(self, far: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= far < 1:
            raise UserError(f"VerificationRate: far must be in [0, 1), got {far}")
        self.far = far

    def update(self, similarities: Tensor, same: Tensor) -> None:
        check_scores("VerificationRate", similarities=similarities, same=same)
        check_labels("VerificationRate", "same", same)
        self.similarities.append(similarities.detach().float())
        self.same.append(same.to(torch.uint8))

    def compute(self) -> dict[str, Tensor]:
        similarities, same = self.column("similarities"), self.column("same").bool()
        genuine, impostors = similarities[same], similarities[~same]
        if not len(genuine) or not len(impostors):
            nothing = similarities.new_tensor(math.nan)
            return {"rate": nothing, "threshold": nothing}
        allowed = math.floor(self.far * len(impostors) + 1e-9)  # 0.29 * 100 is a little less than 29
        refused = impostors.sort(descending=True).values[allowed]
        threshold = refused.nextafter(refused.new_tensor(math.inf))
        return {"rate": (genuine >= threshold).float().mean(), "threshold": threshold}


class AngularError(Mean):
    """Mean angle in degrees between predicted and true gaze. NaN without samples.

    ``update(predicted, target)``: float Tensor[N, 2] each, (pitch, yaw) in radians. The direction is
    (-cos p sin y, -sin p, -cos p cos y) as in L2CS-Net and Gaze360; the angle is the same under any convention that
    only flips axes.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 180.0

    @torch.no_grad()
    def update(self, predicted: Tensor, target: Tensor) -> None:
        for name, gaze in (("predicted", predicted), ("target", target)):
            if not isinstance(gaze, Tensor) or gaze.ndim != 2 or gaze.shape[1] != 2 or not gaze.is_floating_point():
                raise UserError(
                    f"AngularError: {name} must be a float Tensor[N, 2] of (pitch, yaw) in radians, got "
                    f"{describe(gaze)}"
                )
            if not bool(gaze.isfinite().all()):
                raise UserError(f"AngularError: {name} has values that are not finite")
        if len(predicted) != len(target):
            raise UserError(
                f"AngularError: predicted and target must have one length, got {len(predicted)} and {len(target)}"
            )
        a, b = _direction(predicted.double()), _direction(target.double())
        # atan2 keeps its precision near 0 and 180 degrees, where the arc cosine loses half of the digits
        self._add(torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(1)).rad2deg())


def _direction(gaze: Tensor) -> Tensor:
    pitch, yaw = gaze.unbind(1)
    return -torch.stack((pitch.cos() * yaw.sin(), pitch.sin(), pitch.cos() * yaw.cos()), 1)
