"""Right and wrong keys, on flat pictures whose PSNR and SSIM can be worked out by hand."""

import math

import pytest
import torch

from pyface.errors import UserError
from pyface.metrics import KeyRecovery


def flat(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


def ssim(a, b):
    return (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)  # no variance: the luminance term alone


def test_by_hand():
    metric = KeyRecovery()
    original, right = flat(0.5, 0.5), flat(0.6, 0.51)  # mean squared errors 0.01 and 0.0001: 20 and 40 dB
    wrong = torch.stack((flat(0.0, 1.0), flat(0.9, 0.7)), 1)  # the closer of the two keys: 0.16 and 0.04
    metric.update(original, right, wrong)
    result = {name: value.item() for name, value in metric.compute().items()}
    psnr = [-10 * math.log10(0.16), -10 * math.log10(0.04)]
    assert result == pytest.approx(
        {
            "right_psnr": 30,
            "right_psnr_worst": 20,
            "right_ssim": (ssim(0.5, 0.6) + ssim(0.5, 0.51)) / 2,
            "right_ssim_worst": ssim(0.5, 0.6),
            "wrong_psnr": sum(psnr) / 2,
            "wrong_psnr_worst": max(psnr),
            "wrong_ssim": (ssim(0.5, 0.9) + ssim(0.5, 0.7)) / 2,
            "wrong_ssim_worst": ssim(0.5, 0.7),
        },
        rel=1e-4,
    )


def test_one_wrong_key_needs_no_extra_dimension():
    a, b, c = torch.rand(3, 2, 3, 16, 16)
    assert KeyRecovery()(a, b, c) == KeyRecovery()(a, b, c[:, None])


def test_exact_recovery_is_infinite():
    face = torch.rand(1, 3, 16, 16)
    result = KeyRecovery()(face, face, 1 - face)
    assert result["right_psnr"] == result["right_psnr_worst"] == math.inf
    assert result["right_ssim"] == pytest.approx(1)
    assert result["wrong_psnr"] < 20


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_is_nan():
    assert all(value.isnan() for value in KeyRecovery().compute().values())


def test_wrong_input_is_refused():
    face = torch.rand(2, 3, 16, 16)
    for right, wrong, says in [
        (face[:1], face, "original and right must have one shape"),
        (face, face[:, None, None], r"wrong must be Tensor\[N, 3, H, W\] or \[N, K, 3, H, W\]"),
        (face, face[:, None][:, :0], "wrong must be"),
        (face, face[:1], "original and wrong must have one shape"),
        (face * 2 - 1, face, r"right must be in \[0, 1\]"),
        (face, face * 2 - 1, r"wrong must be in \[0, 1\]"),
    ]:
        with pytest.raises(UserError, match=says):
            KeyRecovery().update(face, right, wrong)
    small = torch.rand(1, 3, 10, 30)
    with pytest.raises(UserError, match="at least 11 x 11 pixels"):
        KeyRecovery().update(small, small, small)
