"""Which frames make a clip, and how many clips a video gives (sheet, section 5)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from pyface.errors import UserError
from pyface.methods.gazeforensics.model import FRAMES


def training_frames(length: int, rng: np.random.Generator) -> list[int]:
    """Positions of a training clip's 14 frames, from consecutive ones to nearly the whole video (section 5.2).

    A video of fewer frames repeats its last one.

    Args:
        length: L, frames of the video, at least 1.
        rng: draws stretch and place.
    """
    excess = length - FRAMES
    if excess <= 0:
        return padded(length)
    extend = int(rng.integers(excess))
    offset = int(rng.integers(excess - extend))
    # The code's stride (14 + extend) / 14, in whole numbers so that no rounding can shift a frame.
    return [offset + j * (FRAMES + extend) // FRAMES for j in range(FRAMES)]


def padded(length: int) -> list[int]:
    """All positions of a short video, the last one repeated up to 14 (our choice; the code does not handle it)."""
    if length < 1:
        raise UserError("gazeforensics: a video without frames has no clips")
    return [min(j, length - 1) for j in range(FRAMES)]


def evaluation_clips(length: int, seed: int = 0) -> list[list[int]]:
    """The clips that a video is tested on: long and short strides mixed, as section 5.3 enumerates them.

    Args:
        length: L, frames of the video, at least 1. Below 14 there is one clip, padded.
        seed: of the offsets, drawn anew for each video.

    Returns:
        Positions of 14 frames for each clip.
    """
    if length < FRAMES:
        return [padded(length)]
    rng = np.random.default_rng(seed)
    most = length // FRAMES
    clips: list[list[int]] = []
    last = None
    for step in range(most, 0, -1):
        if step <= 3 and most != 1 and len(clips) >= 5:
            break
        count = length // (FRAMES * step)
        if last is not None and count <= last + 2:
            continue
        last = count
        rest = length % (FRAMES * step)
        offset = int(rng.integers(rest)) if rest else 0
        clips += [[(FRAMES * j + k) * step + offset for k in range(FRAMES)] for j in range(count)]
    return clips


def clip_quota(lengths: Sequence[int], labels: Sequence[int], cap: int = 0) -> list[int]:
    """How many training clips each video may give, equally many in both classes (section 5.1, 1 and 2).

    Args:
        lengths: frames of each video.
        labels: 0 real, 1 fake.
        cap: most clips of one video; 0 for none.

    Returns:
        floor(L / 14) (at least 1), capped; then one clip at a time is taken off the video with the most clips of the
        larger class. Ties: the first video.
    """
    quota = [max(1, length // FRAMES) for length in lengths]
    if cap:
        quota = [min(n, cap) for n in quota]
    by_label = [[i for i, label in enumerate(labels) if label == wanted] for wanted in (0, 1)]
    if not all(by_label):
        raise UserError("gazeforensics: training needs real and fake videos; one kind is missing")
    target = min(sum(quota[i] for i in videos) for videos in by_label)
    for videos in by_label:
        _strip(quota, videos, target, range(len(videos)))
    return quota


def epoch_order(quota: Sequence[int], labels: Sequence[int], share: float, rng: np.random.Generator) -> np.ndarray:
    """Indices of videos, one entry per clip, for one epoch (section 5.1, 3).

    Args:
        quota: of :func:`clip_quota`.
        labels: 0 real, 1 fake.
        share: u, the part of all clips that is kept; the same number of each class.
        rng: ranks the videos that are equally long, and shuffles.
    """
    kept = list(quota)
    for wanted in (0, 1):
        videos = [i for i, label in enumerate(labels) if label == wanted]
        target = max(1, round(share * sum(kept[i] for i in videos)))
        _strip(kept, videos, target, rng.permutation(len(videos)))
    return rng.permutation(np.repeat(np.arange(len(kept)), kept))


def paired_order(
    quota: Sequence[int], labels: Sequence[int], people: Sequence[str], share: float, rng: np.random.Generator
) -> np.ndarray:
    """As :func:`epoch_order`, but each clip of a real video is followed by one of a fake of the same person (ours).

    Such a pair differs in the forgery alone, so little data teaches more. The fakes' quota does not matter: a fake is
    drawn from all of the person's, or from all if there is none.

    Args:
        people: who is seen in each video.
    """
    fakes: dict[str, list[int]] = {}
    for video, (label, person) in enumerate(zip(labels, people, strict=True)):
        if label:
            fakes.setdefault(person, []).append(video)
    every = [video for own in fakes.values() for video in own]
    real = [video for video in epoch_order(quota, labels, share, rng) if not labels[video]]
    return np.array([(video, rng.choice(fakes.get(people[video], every))) for video in real]).ravel()


def _strip(quota: list[int], videos: Sequence[int], target: int, ranks: Sequence[int]) -> None:
    """Take clips off the currently longest of these videos, the lowest rank first, until ``target`` are left."""
    heap = [(-quota[video], int(rank), video) for video, rank in zip(videos, ranks)]
    heapq.heapify(heap)
    for _ in range(sum(quota[video] for video in videos) - target):
        count, rank, video = heapq.heappop(heap)
        quota[video] -= 1
        heapq.heappush(heap, (count + 1, rank, video))
