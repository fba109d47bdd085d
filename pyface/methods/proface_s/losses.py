"""Training objectives of PRO-Face S: the two released ones and the one behind the weights that ship here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = 1.2  # released, for both kinds of triplet
Perceptual = Callable[[Tensor, Tensor], Tensor]


def store_8bit(protected: Tensor) -> Tensor:
    """What an 8-bit file keeps of a picture in [-1, 1]: clamped and rounded, with the identity as its gradient."""
    stored = (protected.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    return protected + (stored - protected).detach()


def _log_error(a: Tensor, b: Tensor) -> Tensor:
    """log10 of the mean squared error of each picture on the [0, 1] scale, Tensor[B]; PSNR is -10 times this."""
    return torch.log10((a - b).square().mean((1, 2, 3)) / 4 + 1e-9)


def leak(wrong: Tensor, image: Tensor) -> Tensor:
    """How much of the image's local detail a wrong recovery shows, whatever its colours, contrast and offset.

    A wrong recovery can be far from the image in PSNR and still show the face: in other colours, under blobs. So this
    regresses its detail (the picture minus a 5 x 5 mean) on the image's detail, patch by patch (8 pixels, every 4), and
    averages the squared slopes, weighted by the squared energy of the image's patch, over three scales.

    Args:
        wrong, image: Tensor[B, 3, H, W]; ``wrong`` not clamped. Averaging several wrong recoveries first shows what
            somebody without any key can average out.

    Returns:
        Tensor[B], at least 0: about 0 when nothing shows, 1 when the detail is there at full contrast.
    """
    scales = []
    while not scales or (len(scales) < 3 and min(image.shape[-2:]) >= 16):
        if scales:
            wrong, image = F.avg_pool2d(wrong, 2), F.avg_pool2d(image, 2)
        a, b = (x - F.avg_pool2d(x, 5, 1, 2, count_include_pad=False) for x in (wrong, image))
        patch = min(8, *image.shape[-2:])
        shared = F.avg_pool2d((a * b).mean(1, keepdim=True), patch, 4)
        energy = F.avg_pool2d((b * b).mean(1, keepdim=True), patch, 4)
        scales.append(shared.square().sum((1, 2, 3)) / (energy.square().sum((1, 2, 3)) + 1e-10))
    return torch.stack(scales).mean(0)


def deployable_loss(
    image: Tensor,
    obfuscated: Tensor,
    stored: Tensor,
    recovered: Tensor,
    wrong: Tensor | None,
    *,
    protected_psnr: float = 40.0,
    wrong_psnr: float = 10.0,
    protected_weight: float = 2.0,
    wrong_weight: float = 1.0,
    leak_weight: float = 0.5,
) -> tuple[Tensor, dict[str, float]]:
    """Maximise the recovery's PSNR, subject to soft limits on hiding and on what a wrong key gives.

    Log errors make a decibel worth the same everywhere, and the hinges stop paying once a limit is met, so capacity
    goes where it is still needed.

    Args:
        image, obfuscated, stored, recovered: Tensor[B, 3, H, W]; ``stored`` comes from :func:`store_8bit`.
        wrong: recovery with another key, Tensor[B, 3, H, W], or None to leave that term out of this step.
        protected_psnr: dB above which the protected picture is close enough to the obfuscated one.
        wrong_psnr: dB below which the wrong recovery (clamped, as seen) is far enough from the image.
        protected_weight, wrong_weight: slopes of the two hinges relative to the recovery term.
        leak_weight: weight of log10 of the wrong recovery's :func:`leak`, the term that hides the face's structure;
            distance alone would be met by the face in wrong colours.

    Returns:
        (scalar loss, {"recovered", "protected", "wrong": mean PSNR in dB, "leak": mean}).
    """
    recovery, hiding = _log_error(recovered, image), _log_error(stored, obfuscated)
    loss = recovery.mean() + protected_weight * F.relu(hiding + protected_psnr / 10).mean()
    report = {"recovered": -10 * recovery.mean().item(), "protected": -10 * hiding.mean().item()}
    if wrong is not None:
        likeness = _log_error(wrong.clamp(-1, 1), image)
        loss = loss + wrong_weight * F.relu(-wrong_psnr / 10 - likeness).mean()
        shown = leak(wrong, image)
        loss = loss + leak_weight * torch.log10(shown + 0.003).mean()
        report |= {"wrong": -10 * likeness.mean().item(), "leak": shown.mean().item()}
    return loss, report


def random_wr_loss(
    image: Tensor,
    obfuscated: Tensor,
    protected: Tensor,
    recovered: Tensor,
    wrong: Tensor,
    *,
    perceptual: Perceptual | None = None,
    per_image: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """The released RandWR objective: a wrong key shall give noise.

    ``0.3 L_img + 0.5 L1(recovered, image) + 0.2 L_wr`` with ``L_img = 5 P(obfuscated, protected) + L1`` and ``L_wr`` a
    perceptual and an L1 triplet that want the right recovery nearer to the image than the wrong one.

    Args:
        image, obfuscated, protected, recovered, wrong: Tensor[B, 3, H, W].
        perceptual: P, a callable from two such tensors to a distance per picture or its mean (released: LPIPS with VGG
            on [-1, 1]). None leaves its terms out.
        per_image: take the L1 triplet on each picture's mean difference instead of on each row's sum, as the released
            code does because PyTorch measures triplet distances along the last axis.

    Returns:
        (scalar loss, {"hiding", "recovery", "wrong_key": unweighted terms}).
    """
    hiding = F.l1_loss(protected, obfuscated)
    recovery = F.l1_loss(recovered, image)
    wrong_key = l1_triplet(image, recovered, wrong, per_image=per_image)
    if perceptual is not None:
        hiding = hiding + 5 * perceptual(obfuscated, protected).mean()
        wrong_key = wrong_key + _perceptual_triplet(perceptual, image, recovered, wrong)
    loss = 0.3 * hiding + 0.5 * recovery + 0.2 * wrong_key
    return loss, {"hiding": hiding.item(), "recovery": recovery.item(), "wrong_key": wrong_key.item()}


def obfuscated_wr_loss(
    image: Tensor,
    obfuscated: Tensor,
    protected: Tensor,
    recovered: Tensor,
    wrong: Tensor,
    *,
    perceptual: Perceptual | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The released ObfsWR objective: a wrong key shall give the obfuscated picture again.

    ``0.2 L_img + 0.3 (L1(recovered, image) + L1(wrong, obfuscated)) + 0.5 L_wr``; arguments and result as in
    :func:`random_wr_loss`. Without ``perceptual`` nothing is left of ``L_wr``, and the L1 terms do the work.
    """
    hiding = F.l1_loss(protected, obfuscated)
    recovery = F.l1_loss(recovered, image) + F.l1_loss(wrong, obfuscated)
    wrong_key = image.new_zeros(())
    if perceptual is not None:
        hiding = hiding + 5 * perceptual(obfuscated, protected).mean()
        wrong_key = _perceptual_triplet(perceptual, recovered, image, obfuscated)
        wrong_key = wrong_key + _perceptual_triplet(perceptual, wrong, obfuscated, image)
    loss = 0.2 * hiding + 0.3 * recovery + 0.5 * wrong_key
    return loss, {"hiding": hiding.item(), "recovery": recovery.item(), "wrong_key": wrong_key.item()}


def l1_triplet(anchor: Tensor, positive: Tensor, negative: Tensor, *, per_image: bool = False) -> Tensor:
    """Triplet hinge with margin 1.2 on L1 distances, Tensor[B, 3, H, W] each -> scalar.

    Released form: one hinge for each (picture, channel, row), on the *sum* over the columns, so its reach depends on
    the width. With ``per_image`` one hinge for each picture, on the mean over all its elements.
    """
    if not per_image:
        return F.triplet_margin_loss(anchor, positive, negative, margin=MARGIN, p=1)
    near, far = ((anchor - other).abs().mean((1, 2, 3)) for other in (positive, negative))
    return F.relu(near - far + MARGIN).mean()


def _perceptual_triplet(perceptual: Perceptual, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    return F.relu(perceptual(anchor, positive).mean() - perceptual(anchor, negative).mean() + MARGIN)
