"""Training objectives of HIDA, term by term (weights: ``recipe.Config``)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

EPS = 1e-7


def pixel_loss(drawn: Tensor, target: Tensor) -> Tensor:
    """L_pix: mean absolute difference of Tensor[B, 1, H, W], scalar."""
    return F.l1_loss(drawn, target)


def geometry_loss(reconstructed: Tensor, depth: Tensor) -> Tensor:
    """L_geo: root of the mean squared depth error, one root over the whole batch of Tensor[B, 1, H, W], scalar.

    The released code has a bare root, whose gradient at a perfect reconstruction is not a number; 1e-12 under the root
    keeps it finite and is at most 1e-6 in the value.
    """
    return ((reconstructed - depth).square().mean() + 1e-12).sqrt()


def texture_loss(drawn: Tensor, reference: Tensor) -> Tensor:
    """L_tex: one minus the cosine between the directions of the two pictures' gradients, mean over pixels.

    Prewitt gradients of the sum over three channels, zero beyond the border; a grey picture counts three times. In flat
    regions the cosine is 0 and the term 1. (The released code calls it GMSD; it is not the index of that name.)

    Args:
        drawn: Tensor[B, 1, H, W].
        reference: Tensor[B, 1 or 3, H, W]; as released the photo, not the artist's sketch.

    Returns:
        Scalar in [0, 2].
    """
    x, y = _gradients(drawn)
    u, v = _gradients(reference)
    lengths = (x * x + y * y + EPS).sqrt() * (u * u + v * v + EPS).sqrt()
    return (1 - (x * u + y * v) / lengths).mean()


def _gradients(image: Tensor) -> tuple[Tensor, Tensor]:
    """Prewitt gradients along x and y by additions, which autocast leaves in float32; a convolution it would not."""
    x = F.pad(image.float().sum(1, keepdim=True) / image.shape[1], (1, 1, 1, 1))
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    columns = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    return rows[..., :-2] - rows[..., 2:], columns[..., :-2, :] - columns[..., 2:, :]


def generator_loss(verdict: Tensor) -> Tensor:
    """L_gan of the generator: minus the critic's mean verdict on the drawing, Tensor[B, 1, h, w] -> scalar."""
    return -verdict.float().mean()


def critic_loss(on_real: Tensor, on_drawn: Tensor, balance: float = 2.0) -> Tensor:
    """Hinge loss of the critic, plus what keeps its two means together.

    ::

        mean max(0, 1 - D(m, y)) + mean max(0, 1 + D(m, G)) + balance/2 (mean D(m, G) - mean D(m, y))^4

    Args:
        on_real, on_drawn: verdicts Tensor[B, 1, h, w].
        balance: weight; 2 as released. The fourth power is the released code's, which squares a squared error.
    """
    on_real, on_drawn = on_real.float(), on_drawn.float()
    gap = on_drawn.mean() - on_real.mean()
    return F.relu(1 - on_real).mean() + F.relu(1 + on_drawn).mean() + balance * 0.5 * gap**4
