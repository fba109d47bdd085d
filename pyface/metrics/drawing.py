"""How close is a drawn face to the artist's? SCOOT for style, FSIM for structure."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyface.errors import UserError
from pyface.metrics._base import Mean, check_images

_BLOCKS, _LEVELS = 4, 6
_OFFSETS = ((0, 1), (-1, 1), (-1, 0), (-1, -1))  # (down, right) of the second pixel of a pair

_SCALES, _ORIENTATIONS = 4, 4
_SHORTEST_WAVE, _WAVE_RATIO = 6, 2  # pixels; factor from scale to scale
_BANDWIDTH = 0.55  # spread of a filter over its centre frequency
_ANGULAR = 1.2  # angle between filters over their angular spread
_NOISE_SIGMAS, _NOISE_SCALE = 2.0, 1.7
_T1, _T2, _T3, _T4, _LAMBDA = 0.85, 160.0, 200.0, 200.0, 0.03


def scoot(drawn: Tensor, reference: Tensor) -> Tensor:
    """Structure co-occurrence texture measure of sketches (Fan et al., ICCV 2019, arXiv:1804.02975).

    As the authors' FS2K toolbox computes it: 8-bit grey; 4 x 4 blocks; in each block the co-occurrence matrices of 6
    grey levels over the range 0 to 255 at four offsets, averaged and rounded; their contrast and energy. The score is
    1 / (1 + the Euclidean distance of the two pictures' 32 numbers). Symmetric.

    Args:
        drawn, reference: Tensor[N, C, H, W] in [0, 1], C = 1 or 3, at least 8 pixels high and wide. The toolbox resizes
            the drawn picture to the reference beforehand; do so too where sizes differ.

    Returns:
        Tensor[N], float32, in (0, 1]; 1 for equal textures. Not differentiable.
    """
    check_images("scoot", drawn=drawn, reference=reference)
    if min(drawn.shape[-2:]) < 2 * _BLOCKS:
        raise UserError(
            f"scoot: pictures must be at least {2 * _BLOCKS} pixels high and wide, got {list(drawn.shape[-2:])}"
        )
    if not len(drawn):
        return drawn.new_zeros(0)
    distance = (_textures(drawn) - _textures(reference)).flatten(1).norm(dim=1)
    return (1 / (1 + distance)).float()


def _textures(images: Tensor) -> Tensor:
    """Contrast and energy of each block: Tensor[N, blocks, 2] float64."""
    count, _, height, width = images.shape
    grey = _grey(images)
    levels = (grey * (_LEVELS / 255)).floor().clamp(max=_LEVELS - 1).long()
    # MATLAB's cut: the bounds of the blocks are rounded down
    bounds = [torch.tensor([size * k // _BLOCKS for k in range(1, _BLOCKS)]) for size in (height, width)]
    row, column = (torch.bucketize(torch.arange(size), cut, right=True) for size, cut in zip((height, width), bounds))
    block = (row[:, None] * _BLOCKS + column).to(images.device)
    blocks = _BLOCKS**2
    bins = blocks * _LEVELS**2
    start = torch.arange(count, device=images.device)[:, None] * bins
    total = torch.zeros(count * bins, dtype=torch.int64, device=images.device)
    for down, right in _OFFSETS:
        here = (..., slice(max(0, -down), height - max(0, down)), slice(max(0, -right), width - max(0, right)))
        there = (..., slice(max(0, down), height - max(0, -down)), slice(max(0, right), width - max(0, -right)))
        inside = block[here] == block[there]
        first, second = levels[here][:, inside], levels[there][:, inside]
        code = start + (block[here][inside] * _LEVELS + first) * _LEVELS + second
        total += torch.bincount(code.flatten(), minlength=len(total))
    pairs = (total.double() / len(_OFFSETS) + 0.5).floor()  # halves up
    share = pairs.view(count, blocks, _LEVELS, _LEVELS)
    share = share / share.sum((2, 3), keepdim=True).clamp(min=1)  # in a tiny block all counts may round to 0
    level = torch.arange(_LEVELS, dtype=torch.float64, device=images.device)
    contrast = (share * (level[:, None] - level).square()).sum((2, 3))
    return torch.stack((contrast, share.square().sum((2, 3))), 2)


def _grey(images: Tensor) -> Tensor:
    """Whole numbers from 0 to 255, Tensor[N, H, W] float64; the channels are rounded, and their sum, as in MATLAB."""
    channels = (images.double() * 255 + 0.5).floor()
    if channels.shape[1] == 1:
        return channels[:, 0]
    weights = channels.new_tensor((0.298936021293775, 0.587043074451121, 0.114020904255103))
    return (torch.einsum("nchw,c->nhw", channels, weights) + 0.5).floor()


def fsim(drawn: Tensor, reference: Tensor, *, chromatic: bool = False) -> Tensor:
    """Feature similarity index (Zhang et al., IEEE TIP 20(8), 2011, doi 10.1109/TIP.2011.2109730).

    With PC the phase congruency (Kovesi, 1999: 4 scales, 4 orientations), G the Scharr gradient of the 8-bit luminance
    and PCm the larger of the two PC:

        S_PC = (2 PC1 PC2 + T1) / (PC1^2 + PC2^2 + T1),  S_G = (2 G1 G2 + T2) / (G1^2 + G2^2 + T2)
        FSIM = sum(S_PC S_G PCm) / sum(PCm),  T1 = 0.85, T2 = 160

    FSIMc also multiplies by (S_I S_Q)^0.03 with the chrominances I and Q of YIQ and T3 = T4 = 200. Pictures are first
    shrunk by the whole number nearest to (shorter side / 256). Where neither picture has any feature (PCm = 0
    everywhere), the similarities are averaged without weights. Symmetric.

    Args:
        drawn, reference: Tensor[N, C, H, W] in [0, 1], C = 1 or 3, at least 8 pixels high and wide.
        chromatic: FSIMc; needs C = 3.

    Returns:
        Tensor[N], float32, in (0, 1]; 1 for equal pictures. Computed in float64. Not meant as a loss: on plain paper
        the gradient may be NaN.
    """
    check_images("fsim", channels=(3,) if chromatic else (1, 3), drawn=drawn, reference=reference)
    if min(drawn.shape[-2:]) < 8:
        raise UserError(f"fsim: pictures must be at least 8 pixels high and wide, got {list(drawn.shape[-2:])}")
    few = 16 if drawn.is_cuda else 1  # 16 filter responses per picture: on the CPU, stay in the cache
    return torch.cat([_fsim(a, b, chromatic) for a, b in zip(drawn.split(few), reference.split(few))]).float()


def _fsim(drawn: Tensor, reference: Tensor, chromatic: bool) -> Tensor:
    first, second = (_planes(images) for images in (drawn, reference))
    congruency = phase_congruency(first[:, 0]), phase_congruency(second[:, 0])
    similarity = _similarity(*congruency, _T1) * _similarity(_gradient(first[:, 0]), _gradient(second[:, 0]), _T2)
    if chromatic:
        colour = _similarity(first[:, 1], second[:, 1], _T3) * _similarity(first[:, 2], second[:, 2], _T4)
        # the real part of the complex power, as the authors take it where one of the factors is negative
        power = colour.abs().clamp(min=1e-300) ** _LAMBDA
        similarity = similarity * torch.where(colour < 0, math.cos(math.pi * _LAMBDA) * power, power)
    weight = torch.maximum(*congruency).flatten(1)
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, torch.ones_like(weight))
    return (similarity.flatten(1) * weight).sum(1) / weight.sum(1)


def _similarity(a: Tensor, b: Tensor, constant: float) -> Tensor:
    return (2 * a * b + constant) / (a * a + b * b + constant)


def _planes(images: Tensor) -> Tensor:
    """Luminance (and I, Q of YIQ) on the scale of 255, shrunk: Tensor[N, 1 or 3, h, w] float64."""
    planes = images.double() * 255
    if planes.shape[1] == 3:
        to_yiq = planes.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        planes = torch.einsum("kc,nchw->nkhw", to_yiq, planes)
    factor = max(1, math.floor(min(images.shape[-2:]) / 256 + 0.5))
    # Every factor-th pixel of a box filter that is zero outside, centred as MATLAB's conv2(..., 'same') does
    before, after = factor - 1 - factor // 2, factor // 2
    return F.avg_pool2d(F.pad(planes, (before, after, before, after)), factor, factor)


def _gradient(luminance: Tensor) -> Tensor:
    down = luminance.new_tensor([[3, 10, 3], [0, 0, 0], [-3, -10, -3]]) / 16
    both = F.conv2d(luminance[:, None], torch.stack((down, down.T))[:, None], padding=1)
    return torch.linalg.vector_norm(both, dim=1)


def phase_congruency(luminance: Tensor) -> Tensor:
    """Kovesi's PC_2 measure with the noise compensation and the parameters of the FSIM paper.

    Args:
        luminance: Tensor[N, H, W], float64.

    Returns:
        Tensor[N, H, W], float64, at least 0; 0 where nothing oscillates.
    """
    if not len(luminance):
        return luminance  # MKL refuses a transform of nothing (torch 2.14)
    _, height, width = luminance.shape
    filters, power, interference = _log_gabor(height, width)
    spectrum = torch.fft.fft2(luminance)[:, None]
    energy, amplitude = 0.0, 0.0
    for bank, passed, sums in zip(filters.to(luminance.device), power, interference):
        response = torch.fft.ifft2(spectrum * bank)  # [N, scales, H, W]; real part even, imaginary part odd
        mean = response.sum(1, keepdim=True)
        mean = mean / (mean.abs() + 1e-4)  # the direction of the mean phase
        turned = response * mean.conj()
        local = (turned.real - turned.imag.abs()).sum(1)
        size = response.abs()
        # The median response of the finest filter tells the noise, which is Rayleigh distributed
        noise = _median(size[:, 0].square().flatten(1)) / math.log(2) / passed
        tau = (noise * sums).sqrt()
        threshold = tau * (math.sqrt(math.pi / 2) + _NOISE_SIGMAS * math.sqrt(2 - math.pi / 2)) / _NOISE_SCALE
        energy = energy + (local - threshold[:, None, None]).clamp(min=0)
        amplitude = amplitude + size.sum(1)
    return energy / amplitude.clamp(min=torch.finfo(torch.float64).tiny)


def _median(values: Tensor) -> Tensor:
    """Over dim 1; the mean of the middle two for an even count, unlike ``torch.median``."""
    count = values.shape[1]
    return (values.kthvalue((count + 1) // 2, 1).values + values.kthvalue(count // 2 + 1, 1).values) / 2


@functools.lru_cache(maxsize=4)
def _log_gabor(height: int, width: int) -> tuple[Tensor, list[float], list[float]]:
    """Filters Tensor[orientations, scales, H, W] float64 in the layout of ``fft2``; per orientation, the power of the
    finest, and the power of the sum of all scales' even parts in space (which holds their interference)."""
    # Kovesi's grid: an odd side is spread over the whole of [-0.5, 0.5]
    y, x = (torch.fft.fftfreq(size, dtype=torch.float64) * size / (size - size % 2) for size in (height, width))
    y, x = torch.meshgrid(y, x, indexing="ij")
    radius, angle = torch.hypot(x, y), torch.atan2(-y, x)
    low_pass = 1 / (1 + (radius / 0.45) ** 30)  # the corners of the spectrum would upset the sums
    radius[0, 0] = 1
    scales = []
    for scale in range(_SCALES):
        wave = _SHORTEST_WAVE * _WAVE_RATIO**scale
        radial = torch.exp(-(radius * wave).log().square() / (2 * math.log(_BANDWIDTH) ** 2)) * low_pass
        radial[0, 0] = 0
        scales.append(radial)
    spread = math.pi / _ORIENTATIONS / _ANGULAR
    sectors = []
    for orientation in range(_ORIENTATIONS):
        turned = angle - orientation * math.pi / _ORIENTATIONS
        away = torch.atan2(turned.sin(), turned.cos())
        sectors.append(torch.exp(-away.square() / (2 * spread**2)))
    filters = torch.stack(sectors)[:, None] * torch.stack(scales)
    power = filters[:, 0].square().sum((1, 2)).tolist()
    even = torch.fft.ifft2(filters.sum(1)).real
    return filters, power, (even.square().sum((1, 2)) * height * width).tolist()


class Scoot(Mean):
    """Mean :func:`scoot` of drawn pictures and their references. NaN without pictures.

    ``update(drawn, reference)``: Tensor[N, C, H, W] each, in [0, 1], C = 1 or 3.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    @torch.no_grad()
    def update(self, drawn: Tensor, reference: Tensor) -> None:
        self._add(scoot(drawn, reference))


class Fsim(Mean):
    """Mean :func:`fsim` of drawn pictures and their references, or FSIMc. NaN without pictures.

    ``update(drawn, reference)``: Tensor[N, C, H, W] each, in [0, 1], C = 1 or 3.

    Args:
        chromatic: FSIMc; needs C = 3.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, chromatic: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chromatic = chromatic

    @torch.no_grad()
    def update(self, drawn: Tensor, reference: Tensor) -> None:
        self._add(fsim(drawn, reference, chromatic=self.chromatic))
