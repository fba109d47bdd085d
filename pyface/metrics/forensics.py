"""Real or fake? Error rates of frames, clips and videos.

Everywhere: label 0 = real, 1 = fake, and a higher score means "more likely fake". Networks that put fake first
(GazeForensics) swap their outputs before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_roc

from pyface.errors import UserError
from pyface.metrics._base import Mean, RowMetric, check_labels, check_scores, describe


def equal_error_rate(scores: Tensor, labels: Tensor) -> Tensor:
    """The error rate at the threshold where the share of real samples taken for fake is that of fake taken for real.

    Between two neighbouring points of the ROC curve the rates are interpolated linearly, so the value is that at the
    crossing itself; torchmetrics' ``BinaryEER`` takes the mean of both rates at the nearest point instead, which on few
    samples is far off.

    Args:
        scores: Tensor[N], higher for label 1; any scale.
        labels: Tensor[N] of 0 and 1.

    Returns:
        Tensor[], float32; NaN unless both labels occur.
    """
    if not _both(labels):
        return scores.new_tensor(math.nan, dtype=torch.float32)
    passed, caught, _ = binary_roc(_ranks(scores), labels.long())
    gap = 1 - caught.double() - passed.double()  # missed minus false alarms: falls from 1 to -1
    after = int((gap <= 0).int().argmax())
    share = gap[after - 1] / (gap[after - 1] - gap[after])
    return torch.lerp(passed[after - 1].double(), passed[after].double(), share).float()


def best_threshold(scores: Tensor, labels: Tensor) -> float:
    """The score from which on a sample counts as fake, so that the mean of both classes' accuracy is highest.

    It lies half way between the two neighbouring scores that it separates. Of several that are equally good it is the
    middle one, of an even number the higher of the two in the middle: fewer real samples are called fake. NaN unless
    both labels occur.

    Args:
        scores: Tensor[N], higher for label 1; any scale.
        labels: Tensor[N] of 0 and 1.
    """
    if not _both(labels):
        return math.nan
    values = scores.double().unique()
    cuts = (values[1:] + values[:-1]) / 2
    if len(cuts) == 0:
        return float(values[0])
    passed, fake = scores.double() >= cuts[:, None], labels.bool()
    balanced = passed[:, fake].double().mean(1) + (~passed[:, ~fake]).double().mean(1)
    good = (balanced >= balanced.max() - 1e-12).nonzero().flatten()
    return float(cuts[good[len(good) // 2]])


def _auroc(scores: Tensor, labels: Tensor) -> Tensor:
    if not _both(labels):
        return scores.new_tensor(math.nan, dtype=torch.float32)
    return binary_auroc(_ranks(scores), labels.long())


def _both(labels: Tensor) -> bool:
    return len(labels) > 0 and bool(labels.min() == 0) and bool(labels.max() == 1)


def _ranks(scores: Tensor) -> Tensor:
    """Scores in the same order in [0, 1]; torchmetrics would put others through a sigmoid, which merges large ones."""
    _, place = scores.unique(return_inverse=True)
    return place.double() / place.max().clamp(min=1)


class EqualErrorRate(RowMetric):
    """:func:`equal_error_rate` over all samples. NaN unless both labels occurred.

    ``update(scores, labels)``: float Tensor[N], higher = more likely fake, on one scale throughout; Tensor[N] of 0 and
    1. Keeps all scores.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    columns = {"scores": torch.empty(0, dtype=torch.float64), "labels": torch.empty(0, dtype=torch.uint8)}

    def update(self, scores: Tensor, labels: Tensor) -> None:
        check_scores("EqualErrorRate", scores=scores, labels=labels)
        check_labels("EqualErrorRate", "labels", labels)
        self.scores.append(scores.detach().double())
        self.labels.append(labels.to(torch.uint8))

    def compute(self) -> Tensor:
        return equal_error_rate(self.column("scores"), self.column("labels"))


class ClipAccuracy(Mean):
    """Share of samples on the right side of the threshold; NaN without samples.

    A sample counts as fake where score >= threshold, that is, as real where P(real) > 1 - threshold (GazeForensics);
    torchmetrics' ``BinaryAccuracy`` decides a score at the threshold itself the other way.

    ``update(scores, labels)``: float Tensor[N], higher = more likely fake; Tensor[N] of 0 and 1.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold

    def update(self, scores: Tensor, labels: Tensor) -> None:
        check_scores("ClipAccuracy", scores=scores, labels=labels)
        check_labels("ClipAccuracy", "labels", labels)
        self._add((scores >= self.threshold) == labels.bool())


class VideoMetric(RowMetric):
    """One score and label per video, from frames (or clips) that may come in any order, batch and process.

    Every frame is kept, and a video's sum is rounded once (``math.fsum``), so not even the last bit depends on how the
    frames were spread.

    ``update(scores, labels, videos)``: per frame its score (see ``rule``), its label 0 = real or 1 = fake, and its
    video: strings, integers or an integer Tensor[N]. 7 and "7" are the same video.

    Args:
        rule: "mean": ``scores`` is Tensor[N], higher = more likely fake; a video's score is their mean
            (GazeForensics).
            "sigmoid_ratio": ``scores`` is Tensor[N, 2] logits (real, fake); a video's score is s1 / (s0 + s1) with s
            the sigmoids of the frames' mean logits (ACMF's code; not a softmax, and in another order than the mean).
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    columns = {
        "labels": torch.empty(0, dtype=torch.uint8),
        "names": torch.empty(0, dtype=torch.uint8),  # the videos' names in UTF-8, one after the other
        "lengths": torch.empty(0, dtype=torch.int64),  # of the names
    }

    def __init__(self, rule: str = "mean", **kwargs: Any) -> None:
        if rule not in ("mean", "sigmoid_ratio"):
            raise UserError(f"{type(self).__name__}: rule must be 'mean' or 'sigmoid_ratio', got {rule!r}")
        self.rule = rule
        self._width = 1 if rule == "mean" else 2
        self.columns = {**self.columns, "scores": torch.empty(0, self._width, dtype=torch.float64)}
        super().__init__(**kwargs)

    def update(self, scores: Tensor, labels: Tensor, videos: Sequence[str | int] | Tensor) -> None:
        name = type(self).__name__
        if self.rule == "mean":
            check_scores(name, scores=scores, labels=labels)
        else:
            if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] != 2:
                raise UserError(f"{name}: scores must be logits Tensor[N, 2] (real, fake), got {describe(scores)}")
            check_scores(name, scores=scores.flatten())
            check_scores(name, logits=scores[:, 0], labels=labels)
        check_labels(name, "labels", labels)
        if isinstance(videos, Tensor):
            videos = videos.tolist()
        if isinstance(videos, str) or len(videos) != len(labels):
            raise UserError(f"{name}: videos must name the video of each of the {len(labels)} frames")
        if not all(isinstance(video, (str, int)) for video in videos):
            raise UserError(f"{name}: videos must be strings or integers")
        names = [str(video).encode() for video in videos]
        device = scores.device
        self.scores.append(scores.detach().double().reshape(len(labels), self._width))
        self.labels.append(labels.to(torch.uint8))
        self.names.append(torch.tensor(list(b"".join(names)), dtype=torch.uint8, device=device))
        self.lengths.append(torch.tensor([len(one) for one in names], dtype=torch.int64, device=device))

    def videos(self) -> tuple[list[str], Tensor, Tensor]:
        """Names, scores Tensor[V] float64 and labels Tensor[V] uint8 of the videos so far, sorted by name.

        Raises:
            UserError: a video has frames of both labels.
        """
        joined = self.column("names").cpu().numpy().tobytes()
        frames: dict[bytes, list[list[float]]] = {}
        label: dict[bytes, int] = {}
        start = 0
        rows = zip(self.column("lengths").tolist(), self.column("scores").tolist(), self.column("labels").tolist())
        for length, row, is_fake in rows:
            video = joined[start : start + length]
            start += length
            if label.setdefault(video, is_fake) != is_fake:
                raise UserError(f"{type(self).__name__}: video {video.decode()!r} has frames of both labels")
            frames.setdefault(video, []).append(row)
        names = sorted(frames)
        means = [[math.fsum(values) / len(frames[video]) for values in zip(*frames[video])] for video in names]
        means = torch.tensor(means, dtype=torch.float64, device=self.device).reshape(len(names), self._width)
        if self.rule == "sigmoid_ratio" and names:
            real, fake = F.logsigmoid(means).unbind(1)
            scores = (fake - real).sigmoid()  # s1 / (s0 + s1), also where both sigmoids round to 0
        else:
            scores = means.flatten()
        labels = torch.tensor([label[video] for video in names], dtype=torch.uint8, device=self.device)
        return [video.decode() for video in names], scores, labels


class VideoAUROC(VideoMetric):
    """Area under the ROC curve of video scores, ties counted half. NaN unless both labels occurred.

    ``update`` and ``rule``: see :class:`VideoMetric`.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        _, scores, labels = self.videos()
        return _auroc(scores, labels)


class VideoEqualErrorRate(VideoMetric):
    """Interpolated equal error rate of video scores. NaN unless both labels occurred.

    ``update`` and ``rule``: see :class:`VideoMetric`.
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        _, scores, labels = self.videos()
        return equal_error_rate(scores, labels)


class VideoAccuracy(VideoMetric):
    """Share of videos on the right side of the threshold. NaN without videos.

    ``update`` and ``rule``: see :class:`VideoMetric`.
    """

    higher_is_better = True

    def __init__(self, rule: str = "mean", threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(rule, **kwargs)
        self.threshold = threshold

    def compute(self) -> Tensor:
        _, scores, labels = self.videos()
        return ((scores >= self.threshold) == labels.bool()).float().mean()
