"""Same person, same gaze: examples worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyface.errors import UserError
from pyface.metrics import AngularError, IdentitySimilarity, VerificationRate

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")


def mean_colour(images):
    return images.mean((2, 3))


def flat(*colours):
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, 4, 4)


def test_identity_similarity_by_hand():
    first = flat((1.0, 0.0, 0.0), (0.5, 0.5, 0.0))
    second = flat((0.6, 0.8, 0.0), (0.2, 0.2, 0.0))  # cosines 0.6 and 1
    metric = IdentitySimilarity(mean_colour, threshold=0.7)
    metric.update(first, second)
    result = metric.compute()
    assert result["similarity"].item() == pytest.approx(0.8)
    assert result["matched"] == 0.5
    assert list(IdentitySimilarity(mean_colour)(first, second)) == ["similarity"]


def test_the_embedder_sees_both_halves_at_once_and_no_gradient():
    seen = []

    def embedder(images):
        seen.append((len(images), torch.is_grad_enabled()))
        return images.flatten(1)

    IdentitySimilarity(embedder).update(torch.rand(3, 3, 4, 4), torch.rand(3, 3, 4, 4))
    assert seen == [(6, False)]


def test_wrong_pictures_or_embedder_are_refused():
    metric = IdentitySimilarity(mean_colour)
    with pytest.raises(UserError, match=r"first and second must have one shape"):
        metric.update(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 5, 4))
    with pytest.raises(UserError, match=r"first must be in \[0, 1\], got values from -1 to -1"):
        metric.update(-torch.ones(2, 3, 4, 4), torch.rand(2, 3, 4, 4))
    with pytest.raises(UserError, match="second must be in"):
        metric.update(torch.rand(2, 3, 4, 4), torch.full((2, 3, 4, 4), math.nan))
    with pytest.raises(UserError, match="3 channels"):
        metric.update(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4))
    with pytest.raises(UserError, match=r"embedder must return Tensor\[4, D\], got float32 \[4, 3, 1\]"):
        IdentitySimilarity(lambda images: images[:, :, 0, :1]).update(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4))


def test_verification_rate_by_hand():
    impostors = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    genuine = torch.tensor([0.35, 0.45, 0.5, 0.9])
    metric = VerificationRate(far=0.2)  # 1 of 5 may pass: 0.5 may, 0.4 not
    metric.update(torch.cat((impostors, genuine)), torch.tensor([0] * 5 + [1] * 4))
    result = metric.compute()
    assert result["rate"] == 0.75
    assert 0.4 < result["threshold"] < 0.4 + 1e-6
    assert (impostors >= result["threshold"]).sum() == 1


def test_ties_among_impostors_never_exceed_the_rate():
    result = VerificationRate(far=0.5)(torch.tensor([0.3, 0.3, 0.3, 0.2, 0.3, 0.4]), torch.tensor([0, 0, 0, 0, 1, 1]))
    assert result["rate"] == 0.5  # 2 of 4 may pass, but 3 share 0.3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=40), st.sampled_from([0, 0.01, 0.1, 0.29, 0.5, 0.9]))
def test_the_threshold_keeps_the_rate_and_is_the_lowest_that_does(scores, far):
    impostors = torch.tensor(scores, dtype=torch.float32)
    metric = VerificationRate(far)
    metric.update(torch.cat((impostors, torch.zeros(1))), torch.tensor([0] * len(scores) + [1]))
    threshold = metric.compute()["threshold"]
    assert (impostors >= threshold).double().mean() <= far + 1e-9
    lower = threshold.nextafter(torch.tensor(-math.inf))
    assert (impostors >= lower).double().mean() > far  # the next number down, and too many pass


def test_verification_needs_both_kinds_of_pairs():
    assert VerificationRate().compute()["rate"].isnan()
    assert VerificationRate()(torch.rand(3), torch.ones(3))["threshold"].isnan()
    with pytest.raises(UserError, match=r"far must be in \[0, 1\), got 1"):
        VerificationRate(far=1)
    with pytest.raises(UserError, match="same must be 0 or 1"):
        VerificationRate().update(torch.rand(2), torch.tensor([0, 2]))


def test_angular_error_by_hand():
    zero = torch.zeros(1, 2)
    right_angle = torch.tensor([[0.0, math.pi / 2]])
    assert AngularError()(zero, right_angle).item() == pytest.approx(90)
    assert AngularError()(torch.tensor([[0.1, 0.0]]), torch.tensor([[-0.2, 0.0]])).item() == pytest.approx(
        math.degrees(0.3), rel=1e-6
    )
    # at 60 degrees of pitch a yaw of 90 degrees is an angle of acos(sin(60) ** 2)
    pitch = math.radians(60)
    steep = AngularError()(torch.tensor([[pitch, 0.0]]), torch.tensor([[pitch, math.pi / 2]]))
    assert steep.item() == pytest.approx(math.degrees(math.acos(0.75)), rel=1e-6)
    assert AngularError()(zero, torch.tensor([[0.0, math.pi]])).item() == pytest.approx(180)
    assert AngularError().compute().isnan()


def test_angular_error_keeps_tiny_angles():
    tiny = torch.tensor([[0.0, 1e-7]], dtype=torch.float64)
    assert AngularError()(torch.zeros_like(tiny), tiny).item() == pytest.approx(math.degrees(1e-7), rel=1e-5)


def test_wrong_gaze_is_refused():
    with pytest.raises(UserError, match=r"predicted must be a float Tensor\[N, 2\]"):
        AngularError().update(torch.rand(4, 3), torch.rand(4, 3))
    with pytest.raises(UserError, match="one length, got 4 and 1"):
        AngularError().update(torch.rand(4, 2), torch.rand(1, 2))
    with pytest.raises(UserError, match="not finite"):
        AngularError().update(torch.full((1, 2), math.nan), torch.rand(1, 2))
