"""Pencil sketches of faces in the hands of three artists, as FS2K has three.

Where a line belongs comes from geometry (jumps of depth, borders of the parsing) and from appearance (dark ridges of
the luminance, found by a difference of Gaussians as in Winnemoeller's XDoG, 2012); how strokes run comes from depth:
hatching follows the surface, hair strokes leave the crown. A real photo needs an image and a depth map only; with a
parsing the drawing gets cleaner contours and strands of hair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyface.errors import UserError

STYLES = (1, 2, 3)
"""1: fine pencil, light hatching. 2: bold contours on clean paper. 3: charcoal, tone on grainy paper."""

# What an artist outlines, as CelebAMask-HQ ids. The nose belongs to the skin: only its underside gets a line.
_OUTLINED = (
    (1, 2), (4, 5), (6, 7), (11, 12), (10,), (3,), (8, 9, 15), (13,), (14,), (16, 17), (18,), (19,),
)  # fmt: skip
_FACE = (1, 2, 3, 4, 5, 6, 7, 10, 11, 12)
_FEATURES = (4, 5, 6, 7)
_HAIR = (13,)
_NOSE = (2,)
_REFERENCE_SIZE = 256  # strokes are measured in pixels of a picture of this size
_SUPERSAMPLED_BELOW = 200  # smaller pictures are drawn at twice their size, for strokes finer than a pixel


def sketch(sample: Mapping[str, Any], style: int, seed: int = 0) -> Tensor:
    """Draw a face.

    Args:
        sample: ``image`` Tensor[3, H, W] in [0, 1], ``depth`` Tensor[1, H, W] in [0, 1] (0 background, nearer is
            brighter), and, if there is one, ``parsing`` Tensor[H, W] of CelebAMask-HQ ids. What lies at depth 0 stays
            white paper; where depth is 0 everywhere the whole picture is drawn.
        style: one of :data:`STYLES`.
        seed: of the paper and the unsteadiness of the hand. The same arguments give the same drawing.

    Returns:
        Tensor[1, H, W] float32 in [0, 1]; white paper is 1. No gradient.

    Raises:
        UserError: unknown style, a missing entry, a wrong shape, or a picture with a side below 16.
    """
    if style not in _ARTISTS:
        raise UserError(f"sketch: style must be 1, 2 or 3, got {style!r}")
    look = _look_at(sample, np.random.default_rng((seed, style)))
    with torch.no_grad():
        ink = _ARTISTS[style](look)
        return (1 - F.interpolate(ink, sample["image"].shape[-2:], mode="area")[0]).clamp(0, 1)


@dataclass(frozen=True)
class _Look:
    """What an artist sees, at the resolution of drawing; maps are Tensor[1, 1, H, W] float32."""

    tone: Tensor  # 0 black ... 1 as light as well-lit skin
    depth: Tensor
    figure: Tensor  # coverage of everything that is not background
    borders: Tensor  # [1, K, H, W] soft coverages; a contour is where one of them crosses one half
    hair: Tensor
    face: Tensor
    features: Tensor  # eyes and brows
    nose: Tensor
    unit: float  # pixels here per pixel of a 256-pixel picture
    rng: np.random.Generator

    @property
    def pen(self) -> float:
        """Pixels here per unit of a line's width: lines must not vanish in small pictures."""
        return max(self.unit, 1.0)

    def noise(self, scale: float) -> Tensor:
        """Unit-variance noise with blobs of about ``scale`` units."""
        spacing = max(1.0, scale * self.unit)
        size = self.tone.shape[-2:]
        coarse = [math.ceil(side / spacing) + 1 for side in size]
        white = torch.from_numpy(self.rng.standard_normal((1, 1, *coarse), np.float32))
        result = F.interpolate(white, size, mode="bicubic", align_corners=True)
        return result / (result.std() + 1e-9)


def _look_at(sample: Mapping[str, Any], rng: np.random.Generator) -> _Look:
    for key in ("image", "depth"):
        if not isinstance(sample.get(key), Tensor):
            raise UserError(f"sketch: the sample needs a Tensor {key!r}; it has: {', '.join(sorted(sample))}")
    image, depth, parsing = sample["image"], sample["depth"], sample.get("parsing")
    size = tuple(image.shape[-2:])
    if image.ndim != 3 or image.shape[0] != 3 or min(size) < 16:
        raise UserError(f"sketch: image must be Tensor[3, H, W] with sides from 16 on, got {tuple(image.shape)}")
    if tuple(depth.shape) != (1, *size):
        raise UserError(f"sketch: depth must be Tensor[1, {size[0]}, {size[1]}], got {tuple(depth.shape)}")
    if parsing is not None and tuple(parsing.shape) != size:
        raise UserError(f"sketch: parsing must be Tensor[{size[0]}, {size[1]}], got {tuple(parsing.shape)}")

    factor = 2 if min(size) < _SUPERSAMPLED_BELOW else 1
    large = (size[0] * factor, size[1] * factor)
    unit = min(large) / _REFERENCE_SIZE

    def enlarge(x: Tensor) -> Tensor:
        return F.interpolate(x.float(), large, mode="bilinear", align_corners=False)

    image, depth = image[None].float(), depth[None].float()
    luminance = (image * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    figure = (depth > 0).float()
    if not figure.any():
        figure = torch.ones_like(figure)
    figure_here = _smooth(enlarge(figure), 0.5 * factor)
    if parsing is None:
        borders = figure_here
        hair, face, features, nose = torch.zeros(1, 4, *large).split(1, 1)
    else:
        # Every outlined region has a number; where two meet, at least one binary digit changes. So four maps carry the
        # borders of all regions.
        numbers = torch.zeros(256, dtype=torch.long)
        for number, ids in enumerate(_OUTLINED, 1):
            numbers[list(ids)] = number
        number = numbers[parsing.long()]
        digits = torch.stack([number >> digit & 1 for digit in range(4)])[None]
        borders = torch.cat((figure_here, _smooth(enlarge(digits), 0.5 * factor)), 1)
        member = torch.zeros(4, 256)
        for row, ids in enumerate((_HAIR, _FACE, _FEATURES, _NOSE)):
            member[row, list(ids)] = 1
        hair, face, features, nose = enlarge(member[:, parsing.long()][None]).split(1, 1)
    lit = figure > 0 if parsing is None else (parsing == 1)[None, None]
    lit = luminance[lit] if lit.any() else luminance[figure > 0]
    # Paper has to serve for light and for dark skin: tone is relative to well-lit skin, as artists draw it.
    tone = (luminance / torch.quantile(lit, 0.8).clamp(min=0.05)).clamp(0, 1)
    return _Look(enlarge(tone), enlarge(depth), figure_here, borders, hair, face, features, nose, unit, rng)


def _smooth(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of maps [B, C, H, W], edges repeated; on a CPU several times faster than conv2d."""
    if sigma <= 0.2:
        return x
    radius = max(1, round(2 * sigma))
    taps = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    for dim, padding in ((-1, (radius, radius, 0, 0)), (-2, (0, 0, radius, radius))):
        size, padded = x.shape[dim], F.pad(x, padding, mode="replicate")
        x = padded.narrow(dim, radius, size) * (taps[0] / total)
        for k in range(1, radius + 1):
            pair = padded.narrow(dim, radius - k, size) + padded.narrow(dim, radius + k, size)
            x.add_(pair, alpha=taps[k] / total)
    return x


def _step(x: Tensor, low: float, high: float) -> Tensor:
    """0 below ``low``, 1 above ``high``, smooth between; falls if ``low > high``."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _borders(coverage: Tensor, width: float) -> Tensor:
    """Lines of ``width`` pixels where soft coverage [1, K, H, W] crosses one half; the strongest of all K."""
    slope_x, slope_y = _slopes(coverage)
    distance = (coverage - 0.5).abs() / (slope_x.square() + slope_y.square()).sqrt().clamp(min=0.02)
    return _step(distance, 0.5 * width + 0.6, 0.5 * width - 0.4).amax(1, keepdim=True)


def _contours(look: _Look, width: float) -> Tensor:
    """Borders of the figure, of everything the parsing outlines, and the underside of the nose."""
    nose = _smooth(look.nose, look.pen)
    _, falls = _slopes(nose)
    underside = _borders(nose, width) * _step(-falls, 0.04, 0.12)
    return torch.maximum(_borders(look.borders, width), underside)


def _slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y, per pixel."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2


def _jumps(depth: Tensor, width: float, low: float = 0.05, high: float = 0.12) -> Tensor:
    """Where depth jumps within about ``width`` pixels: occluding contours."""
    reach = 2 * round(width / 2) + 1
    nearest = F.max_pool2d(depth, reach, 1, reach // 2)
    farthest = -F.max_pool2d(-depth, reach, 1, reach // 2)
    return _step(nearest - farthest, low, high)


def _ridges(look: _Look, scale: float, low: float, high: float) -> Tensor:
    """Dark lines of the luminance of about ``scale`` units: lids, nostrils, the mouth's line, wrinkles, strands."""
    tone = torch.log(look.tone + 0.08)
    fine = _smooth(tone, scale * look.unit)
    response = _smooth(tone, 1.6 * scale * look.unit) - fine
    return _step(response, low, high)


def _directions(look: _Look) -> tuple[Tensor, Tensor]:
    """Coordinates (along, across) in units whose lines of equal ``across`` are strokes.

    On skin they are diagonals that bulge with the depth, as cross-contour hatching does; in hair they leave the crown.
    """
    height, width = look.tone.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height) / look.unit, torch.arange(width) / look.unit, indexing="ij")
    relief = _smooth(look.depth, 3 * look.unit)[0, 0]
    along, across = (x + y) * 0.7071, (x - y) * 0.7071 + 60 * relief
    hair = look.hair[0, 0]
    if hair.sum() > 0:
        rows = (hair > 0.5).any(1).nonzero()
        top = rows[0] / look.unit if len(rows) else y.new_zeros(1)
        face = look.face[0, 0]
        weight = face if face.sum() > 0 else hair
        centre = (weight * x).sum() / weight.sum()
        dx, dy = x - centre, y - top - 14
        radius = (dx.square() + dy.square()).sqrt()
        # Halfway down the sides strands hang: angles shrink towards the vertical with the distance from the crown.
        angle = torch.atan2(dx, dy.abs() + 8)
        inside = hair > 0.5
        along = torch.where(inside, radius, along)
        across = torch.where(inside, 95 * angle + 3 * torch.sin(radius / 14), across)
    return along, across


def _strokes(look: _Look, length: float, thickness: float) -> Tensor:
    """Unit-variance noise drawn out along the strokes: ``length`` and ``thickness`` in units."""
    along, across = _directions(look)
    side = 256
    grain = torch.from_numpy(look.rng.standard_normal((1, 1, side, side), np.float32))
    place = torch.stack((across / thickness, along / length), -1)[None]
    place = place.remainder(2 * (side - 1))
    place = torch.minimum(place, 2 * (side - 1) - place) / (side - 1) * 2 - 1  # mirrored: no seam where it repeats
    return 1.4 * F.grid_sample(grain, place, mode="bilinear", align_corners=True)


def _unsteady(look: _Look, ink: Tensor, amount: float, scale: float = 12.0) -> Tensor:
    """Move ink by smooth random displacements of ``amount`` units, as a hand does."""
    height, width = ink.shape[-2:]
    shift = torch.cat((look.noise(scale), look.noise(scale)), 1)[0].permute(1, 2, 0) * amount * look.unit
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack((x, y), -1) + shift
    place = place / torch.tensor([width - 1, height - 1]) * 2 - 1
    return F.grid_sample(ink, place[None], mode="bilinear", padding_mode="border", align_corners=True)


def _pressure(look: _Look, weakest: float, scale: float = 9.0) -> Tensor:
    """How hard the pencil is pressed, in [weakest, 1]."""
    return weakest + (1 - weakest) * _step(look.noise(scale), -1.2, 0.6)


def _form(look: _Look, reach: float) -> Tensor:
    """Shadow of the bare form in [0, 1], from the depth's slope: the artists' lamp hangs at the upper left."""
    slope_x, slope_y = _slopes(_smooth(look.depth, reach * look.unit))
    rise = (slope_x + 0.6 * slope_y) * -128 * look.unit
    away = (slope_x.square() + slope_y.square()).sqrt() * 128 * look.unit
    return (_step(rise, 0.1, 1.6) * 0.7 + _step(away, 0.9, 3.0) * 0.3) * look.figure


def _fine_pencil(look: _Look) -> Tensor:
    """Thin grey lines, and hatching whose density follows the shadow."""
    pen = look.pen
    lines = _contours(look, 1.1 * pen)
    lines = torch.maximum(lines, 0.7 * _jumps(look.depth, 1.2 * pen, 0.08, 0.2) * look.figure)
    lines = lines * _pressure(look, 0.5)
    lines = torch.maximum(lines, 0.9 * _ridges(look, 0.8, 0.015, 0.1) * look.figure)
    lines = _unsteady(look, torch.maximum(lines, _accents(look)), 0.5)
    dark = 1.15 * (1 - _smooth(look.tone, 1.2 * look.unit)) + 0.3 * _form(look, 3) + 0.18 * look.hair
    hatch = _hatch(_strokes(look, 26, 1.6), dark.clamp(0, 1)) * look.figure
    return (0.8 * lines + 0.62 * hatch * (1 - 0.6 * lines)).clamp(0, 0.74)  # graphite is no black


def _hatch(strokes: Tensor, dark: Tensor) -> Tensor:
    """Strokes appear where the noise exceeds a level that falls with darkness: more and broader in the shade."""
    level = 1.9 - 2.6 * dark
    return ((strokes - level) / 1.3).clamp(0, 1) * (0.45 + 0.55 * dark)


def _accents(look: _Look) -> Tensor:
    """Irises, lashes and brows, filled where they are dark."""
    return look.features * _step(look.tone, 0.55, 0.38)


def _bold_contour(look: _Look) -> Tensor:
    """Thick black lines on clean paper, a few accents, sparse strokes for hair."""
    u, pen = look.unit, look.pen
    lines = _contours(look, 2.2 * pen)
    lines = torch.maximum(lines, _jumps(look.depth, 2.4 * pen, 0.12, 0.22) * look.figure)
    lines = torch.maximum(lines, _ridges(look, 1.3, 0.03, 0.09) * look.figure)
    lines = _unsteady(look, lines, 0.9, 16)
    strands = _step(_strokes(look, 60, 2.6), 1.5, 1.9) * look.hair * _step(_smooth(look.tone, 2 * u), 1.0, 0.5)
    return torch.maximum(torch.maximum(lines, strands), _accents(look)) * 0.95


def _charcoal(look: _Look) -> Tensor:
    """Soft tone rubbed into grainy paper, with smudged dark edges and few lines."""
    u = look.unit
    tone = 0.75 * _smooth(look.tone, 1.1 * u) + 0.25 * _smooth(look.tone, 5 * u)
    dark = (1 - tone) ** 1.15 + 0.28 * _form(look, 4) + 0.02
    edges = _smooth(_contours(look, 2 * look.pen), 1.1 * u)
    edges = torch.maximum(edges, _ridges(look, 1.3, 0.02, 0.2) * look.figure)
    halo = _smooth(look.figure, 6 * u)  # charcoal is rubbed a little beyond the outline
    dark = (dark * look.figure + 0.7 * edges + 0.08 * halo).clamp(0, 1)
    dark = dark * (1 + 0.07 * _strokes(look, 30, 4.0) * look.figure)
    grain = 0.6 * look.noise(0.6) + 0.6 * look.noise(1.3)
    # Paper takes charcoal on its tops first: grain shows in half tones, not on white paper or in black.
    return (dark + 0.28 * grain * dark * (1.1 - dark).clamp(min=0) + 0.05).clamp(0, 0.97)


_ARTISTS = {1: _fine_pencil, 2: _bold_contour, 3: _charcoal}
