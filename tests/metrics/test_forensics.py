"""Error rates against examples worked out by hand, and what a video's score may depend on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import BinaryEER

from pyface.errors import UserError
from pyface.metrics import ClipAccuracy, EqualErrorRate, VideoAccuracy, VideoAUROC, VideoEqualErrorRate
from pyface.metrics.forensics import best_threshold

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")
VIDEO_METRICS = [VideoAUROC, VideoAccuracy, VideoEqualErrorRate]

# Real 0.1 0.2 0.6, fake 0.3 0.7 0.8 0.9. Walking the threshold down past 0.7, (false alarms, missed) = (0, 1/4); past
# 0.6, (1/3, 1/4). The line between them meets "equal" at 1/4.
SCORES = torch.tensor([0.1, 0.2, 0.6, 0.3, 0.7, 0.8, 0.9])
LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 1])


def test_equal_error_rate_by_hand():
    assert EqualErrorRate()(SCORES, LABELS).item() == pytest.approx(1 / 4)
    # torchmetrics takes the mean of the two rates at the nearest point, which is another number
    assert BinaryEER()(SCORES, LABELS).item() == pytest.approx((1 / 3 + 1 / 4) / 2)


@pytest.mark.parametrize(
    ("scores", "labels", "rate"),
    [
        ([0.1, 0.9], [0, 1], 0.0),
        ([0.9, 0.1], [0, 1], 1.0),
        ([0.5, 0.5, 0.5], [0, 1, 1], 0.5),  # no information: the diagonal
        ([5.0, 80.0, 90.0], [0, 0, 1], 0.0),  # large logits, which a sigmoid in float32 would make equal
    ],
)
def test_equal_error_rate_at_the_ends(scores, labels, rate):
    assert EqualErrorRate()(torch.tensor(scores), torch.tensor(labels)).item() == pytest.approx(rate)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-8, 8), st.booleans()), min_size=2, max_size=30))
def test_equal_error_rate_is_blind_to_the_scale_and_symmetric_in_the_classes(rows):
    scores = torch.tensor([float(score) for score, _ in rows])
    labels = torch.tensor([int(label) for _, label in rows])
    rate = EqualErrorRate()(scores, labels)
    if labels.min() == labels.max():
        assert rate.isnan()
        return
    assert 0 <= rate <= 1
    torch.testing.assert_close(EqualErrorRate()(torch.sigmoid(scores / 3), labels), rate)
    torch.testing.assert_close(EqualErrorRate()(-scores, 1 - labels), rate)


@pytest.mark.parametrize(
    ("scores", "labels", "threshold"),
    [
        ([0.2, 0.5, 0.4, 0.9], [0, 1, 0, 1], 0.45),
        ([0.1, 0.2, 0.3, 0.4, 0.9], [0, 0, 0, 0, 1], 0.65),
        # one real sample above the fake: letting it go is better than missing the only fake
        ([0.1, 0.2, 0.3, 0.95, 0.9], [0, 0, 0, 0, 1], 0.6),
        # of two equally good ones, 0.2 with a false alarm and 0.6 with a miss, the higher
        ([0.1, 0.3, 0.5, 0.7], [0, 1, 0, 1], 0.6),
        # of three, 0.15, 0.35 and 0.55, the middle one
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0, 1, 0, 1, 0, 1], 0.35),
        ([0.3, 0.3, 0.3], [0, 1, 1], 0.3),  # nothing to separate
        ([-7.0, 90.0, 3.0], [0, 1, 0], 46.5),
    ],
)
def test_threshold_balances_both_classes(scores, labels, threshold):
    assert best_threshold(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(threshold)


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], []])
def test_no_threshold_without_both_classes(labels):
    assert math.isnan(best_threshold(torch.rand(len(labels)), torch.tensor(labels)))


def test_clips_and_videos_of_the_sheet():
    # P(real) of two clips each: video A (real) 0.9, 0.4; video B (fake) 0.6, 0.2
    fake = 1 - torch.tensor([0.9, 0.4, 0.6, 0.2])
    labels, videos = torch.tensor([0, 0, 1, 1]), ["A", "A", "B", "B"]
    assert ClipAccuracy()(fake, labels) == 0.5
    assert VideoAccuracy()(fake, labels, videos) == 1
    assert VideoAUROC()(fake, labels, videos) == 1
    assert VideoEqualErrorRate()(fake, labels, videos) == 0
    names, scores, found = _updated(VideoAUROC(), fake, labels, videos).videos()
    assert names == ["A", "B"]
    assert found.tolist() == [0, 1]
    assert (1 - scores).tolist() == pytest.approx([0.65, 0.40])


def _updated(metric, *batch):
    metric.update(*batch)
    return metric


def test_video_auroc_counts_ties_half():
    # videos: real 0.5 and 0.2; fake 0.5 and 0.8. Pairs (fake above real): 1/2, 1, 1, 1 -> 3.5 / 4
    auroc = VideoAUROC()(torch.tensor([0.5, 0.2, 0.5, 0.8]), torch.tensor([0, 0, 1, 1]), [1, 2, 3, 4])
    assert auroc.item() == pytest.approx(3.5 / 4)


def test_mean_over_frames_not_over_batches():
    metric = VideoAUROC()
    # video x: frames 0.9 | 0.1 0.1 0.1, mean 0.3; the mean of its two batches' means would be 0.5, above y
    metric.update(torch.tensor([0.9, 0.4]), torch.tensor([0, 1]), ["x", "y"])
    metric.update(torch.tensor([0.1, 0.1, 0.1]), torch.tensor([0, 0, 0]), ["x"] * 3)
    assert metric.compute() == 1


def test_equal_videos_tie_however_their_frames_arrive():
    frames = torch.tensor([0.1, 0.2, 0.3, 0.7, 1e-9, 0.123456789])
    metric = VideoAUROC()
    metric.update(frames, torch.zeros(6), ["real"] * 6)
    for frame in frames.flip(0).split(1):
        metric.update(frame, torch.ones(1), ["fake"])
    assert metric.compute() == 0.5


def test_names_may_be_strings_of_any_alphabet_integers_or_a_tensor():
    scores, labels = torch.tensor([0.1, 0.2, 0.8]), torch.tensor([0, 0, 1])
    for videos in (["ä/影片", "ä/影片", "ä/影片2"], [7, "7", 8], torch.tensor([-3, -3, 10**12])):
        metric = _updated(VideoAUROC(), scores, labels, videos)
        names, means, _ = metric.videos()
        assert len(names) == 2
        assert means.tolist() == pytest.approx([0.15, 0.8])


def test_sigmoid_ratio_of_mean_logits():
    logits = torch.tensor([[1.0, -1.0], [3.0, 0.0], [0.0, 2.0]])  # (real, fake)
    metric = _updated(VideoAUROC(rule="sigmoid_ratio"), logits, torch.tensor([0, 0, 1]), ["a", "a", "b"])
    _, scores, _ = metric.videos()

    def sigmoid(z):
        return 1 / (1 + math.exp(-z))

    a = sigmoid(-0.5) / (sigmoid(2) + sigmoid(-0.5))
    b = sigmoid(2) / (sigmoid(0) + sigmoid(2))
    assert scores.tolist() == pytest.approx([a, b])
    assert metric.compute() == 1
    # where both sigmoids are 0 in any floating point number, the ratio still is a number
    deep = _updated(VideoAccuracy(rule="sigmoid_ratio"), torch.tensor([[-2000.0, -1999.0]]), torch.tensor([1]), ["c"])
    assert deep.videos()[1].item() == pytest.approx(sigmoid(1))
    assert deep.compute() == 1


def test_a_score_at_the_threshold_is_fake():
    half = torch.tensor([0.5])
    assert ClipAccuracy()(half, torch.tensor([1])) == 1
    assert VideoAccuracy()(half, torch.tensor([0]), ["v"]) == 0
    assert VideoAccuracy(threshold=0.6)(half, torch.tensor([0]), ["v"]) == 1


def test_nothing_or_one_class_is_nan():
    assert EqualErrorRate().compute().isnan()
    assert ClipAccuracy().compute().isnan()
    for make in VIDEO_METRICS:
        assert make().compute().isnan()
        assert make(rule="sigmoid_ratio").compute().isnan()
        empty = _updated(make(), torch.zeros(0), torch.zeros(0, dtype=torch.long), [])
        assert empty.compute().isnan()
    assert VideoAUROC()(torch.rand(3), torch.ones(3), [1, 2, 3]).isnan()
    assert EqualErrorRate()(torch.rand(3), torch.zeros(3)).isnan()


def test_reset_forgets():
    metric = _updated(VideoAccuracy(), torch.tensor([0.9]), torch.tensor([0]), ["v"])
    metric.reset()
    metric.update(torch.tensor([0.9]), torch.tensor([1]), ["v"])
    assert metric.compute() == 1


@pytest.mark.parametrize("make", [EqualErrorRate, ClipAccuracy, *VIDEO_METRICS])
@pytest.mark.parametrize(
    ("scores", "labels", "says"),
    [
        (SCORES[None], LABELS, r"scores must be a Tensor\[N\], got float32 \[1, 7\]"),
        (SCORES, LABELS[1:], "one length, got 7 and 6"),
        (SCORES, LABELS + 1, "labels must be 0 or 1, got 2"),
        (SCORES, LABELS - 1, "labels must be 0 or 1, got -1"),
        (SCORES.where(SCORES != 0.6, math.nan), LABELS, "scores has values that are not finite"),
    ],
)
def test_wrong_input_is_refused(make, scores, labels, says):
    extra = (["v"] * 7,) if make in VIDEO_METRICS else ()
    with pytest.raises(UserError, match=says):
        make().update(scores, labels, *extra)


def test_wrong_videos_are_refused():
    with pytest.raises(UserError, match="name the video of each of the 7 frames"):
        VideoAUROC().update(SCORES, LABELS, ["v"])
    with pytest.raises(UserError, match="name the video of each"):
        VideoAUROC().update(SCORES, LABELS, "seven77")
    with pytest.raises(UserError, match="strings or integers"):
        VideoAUROC().update(SCORES, LABELS, [None] * 7)
    with pytest.raises(UserError, match="rule must be 'mean' or 'sigmoid_ratio', got 'median'"):
        VideoAUROC(rule="median")
    with pytest.raises(UserError, match=r"logits Tensor\[N, 2\]"):
        VideoAUROC(rule="sigmoid_ratio").update(SCORES, LABELS, ["v"] * 7)
    with pytest.raises(UserError, match="video 'v' has frames of both labels"):
        _updated(VideoAUROC(), SCORES, LABELS, ["v"] * 7).compute()
