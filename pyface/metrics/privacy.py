"""What the right key brings back, and what a wrong key must not."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from pyface.errors import UserError
from pyface.metrics._base import check_images, describe


class KeyRecovery(Metric):
    """PSNR in dB and SSIM of faces recovered with the right key and with wrong keys, against the originals.

    PSNR and SSIM (11 x 11 Gaussian window) are torchmetrics' per picture, data range 1. Where a picture was tried with
    several wrong keys, the one that comes closest counts, PSNR and SSIM each for itself.

    ``update(original, right, wrong)``: Tensor[N, 3, H, W] in [0, 1]; ``wrong`` may be Tensor[N, K, 3, H, W], K keys.
    ``compute()``: ``right_psnr``, ``right_ssim``, ``wrong_psnr``, ``wrong_ssim`` (means over pictures), and each with
    ``_worst`` added: the lowest of the right, the highest of the wrong. NaN without pictures. An exact recovery has
    infinite PSNR, and so has the mean.

    A wrong key can be far off in PSNR and still show the face in false colours: look at the pictures too, and see
    :func:`pyface.methods.proface_s.losses.leak`.
    """

    is_differentiable = False
    higher_is_better = None  # high for the right key, low for wrong ones
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("right_psnr", "right_ssim", "wrong_psnr", "wrong_ssim"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            worst, reduce = (math.inf, "min") if name.startswith("right") else (-math.inf, "max")
            self.add_state(f"{name}_worst", torch.tensor(worst, dtype=torch.float64), dist_reduce_fx=reduce)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, original: Tensor, right: Tensor, wrong: Tensor) -> None:
        check_images("KeyRecovery", channels=(3,), original=original, right=right)
        if isinstance(wrong, Tensor) and wrong.ndim == 4:
            wrong = wrong[:, None]
        if not isinstance(wrong, Tensor) or wrong.ndim != 5 or not wrong.shape[1]:
            raise UserError(f"KeyRecovery: wrong must be Tensor[N, 3, H, W] or [N, K, 3, H, W], got {describe(wrong)}")
        if min(original.shape[-2:]) < 11:
            raise UserError(f"KeyRecovery: SSIM needs at least 11 x 11 pixels, got {list(original.shape[-2:])}")
        for key in wrong.unbind(1):
            check_images("KeyRecovery", channels=(3,), original=original, wrong=key)
        if not len(original):
            return
        tried = torch.stack([_psnr_and_ssim(key, original) for key in wrong.unbind(1)])
        for key, scores in (("right", _psnr_and_ssim(right, original)), ("wrong", tried.amax(0))):
            for measure, values in zip(("psnr", "ssim"), scores):
                total, worst = f"{key}_{measure}", f"{key}_{measure}_worst"
                setattr(self, total, getattr(self, total) + values.sum())
                further = torch.minimum if key == "right" else torch.maximum
                setattr(self, worst, further(getattr(self, worst), values.min() if key == "right" else values.max()))
        self.count += len(original)

    def compute(self) -> dict[str, Tensor]:
        result = {}
        for name in ("right_psnr", "right_ssim", "wrong_psnr", "wrong_ssim"):
            worst = getattr(self, f"{name}_worst")
            result[name] = (getattr(self, name) / self.count).float()
            result[f"{name}_worst"] = (worst if self.count else worst * math.nan).float()
        return result


def _psnr_and_ssim(image: Tensor, original: Tensor) -> Tensor:
    """Tensor[2, N] float64."""
    image, original = image.double(), original.double()
    psnr = peak_signal_noise_ratio(image, original, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(image, original, data_range=1.0, reduction="none")
    return torch.stack((psnr.reshape(-1), ssim.reshape(-1)))
