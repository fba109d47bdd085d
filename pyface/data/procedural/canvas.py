"""The picture being built: rays, a depth buffer, what light will need at every pixel, and the shapes put on it.

Camera-aligned axes: x right, y up, z to the camera, origin at the head's centre, unit 10 cm. A pixel at (X, Y) on the
plane z = 0 sees the points (X, Y, 0) + z (-X / D, -Y / D, 1), where D is the camera's distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from scipy import ndimage

from pyface.data.procedural import head
from pyface.data.procedural.head import Surface, bilinear, clip

# Channels of the material buffer.
ALBEDO, NORMAL, AMBIENT, GLOSS, FLESH, SHEEN = slice(0, 3), slice(3, 6), 6, 7, 8, 9
CHANNELS = 10
FAR = -30.0

Box = tuple[slice, slice]


class Canvas:
    """Buffers of one picture.

    Attributes:
        z: float32 [H, W], nearest surface, :data:`FAR` where only background is.
        ident: uint8 [H, W], parsing id.
        cover: float32 [H, W], share of the pixel that is not background.
        material: float32 [CHANNELS, H, W]: linear albedo, normal, ambient light, gloss, translucency, sheen.
    """

    def __init__(self, size: int, unit: float, distance: float, origin: tuple[float, float]):
        self.size, self.unit, self.distance, self.origin = size, unit, distance, origin
        self.x = ((np.arange(size) - origin[0]) / unit).astype(np.float32)
        self.y = (-(np.arange(size) - origin[1]) / unit).astype(np.float32)
        self.z = np.full((size, size), FAR, np.float32)
        self.ident = np.zeros((size, size), np.uint8)
        self.cover = np.zeros((size, size), np.float32)
        self.material = np.zeros((CHANNELS, size, size), np.float32)

    def bands(self) -> list[slice]:
        """All rows, in pieces whose arrays fit the cache."""
        rows = max((1 << 14) // self.size, 1)
        return [slice(top, top + rows) for top in range(0, self.size, rows)]

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 3] -> pixels [..., 2], (x, y)."""
        scale = self.unit / (1 - points[..., 2] / self.distance)
        return np.stack((self.origin[0] + points[..., 0] * scale, self.origin[1] - points[..., 1] * scale), -1)

    def box(self, points: np.ndarray, margin: float) -> Box | None:
        """The pixels within ``margin`` (lengths) of the given points [..., 3]; None if off the picture."""
        pixels = self.project(points).reshape(-1, 2)
        reach = margin * self.unit * 1.15 + 1
        low = np.maximum(np.floor(pixels.min(0) - reach), 0).astype(int)
        high = np.minimum(np.ceil(pixels.max(0) + reach) + 1, self.size).astype(int)
        if (high <= low).any():
            return None
        return slice(low[1], high[1]), slice(low[0], high[0])

    def put(self, where, z, alpha, ident: int, material: np.ndarray, soft: float = 0.0) -> np.ndarray:
        """Lay a surface over what is there, where it is nearer.

        Args:
            where: an index into [H, W]: a box or (rows, columns).
            z, alpha: depth and coverage there.
            material: [CHANNELS, ...] there.
            soft: length over which surfaces that meet blend into each other.

        Returns:
            The coverage that came to be seen.
        """
        below = self.z[where]
        whole = alpha
        if soft > 0:
            alpha = whole * clip((z - below) * (1 / soft) + 0.5, 0, 1)
        else:
            alpha = whole * (z > below)
        before = self.cover[where]
        # The background is mixed in last. Where this surface is behind another that covers a pixel in part, as outlines
        # do, it fills the rest.
        cover = before + whole * (1 - before)
        share = (alpha + (whole - alpha) * (1 - before)) / np.maximum(cover, 1e-4)
        if isinstance(where[0], slice):
            under = self.material[(slice(None), *where)]
            material = material - under
            material *= share
            under += material
        else:
            flat = where[0] * self.size + where[1]
            for buffer, channel in zip(self.material.reshape(CHANNELS, -1), material):
                under = buffer.take(flat)
                under += share * (channel - under)
                buffer[flat] = under
        self.cover[where] = cover
        taken = alpha > 0.5
        self.z[where] = np.where(taken, z, below)
        self.ident[where] = np.where(taken, np.uint8(ident), self.ident[where])
        return alpha


def material(shape, albedo, normal, ambient=1.0, gloss=0.2, flesh=0.0, sheen=0.0) -> np.ndarray:
    """A material buffer of ``shape`` from numbers or arrays."""
    out = np.empty((CHANNELS, *shape), np.float32)
    for c in range(3):
        out[c], out[3 + c] = albedo[c], normal[c]
    out[AMBIENT], out[GLOSS], out[FLESH], out[SHEEN] = ambient, gloss, flesh, sheen
    return out


@dataclass(frozen=True)
class Hit:
    """Where rays meet an ellipsoid: ``box``, ``z``, ``alpha``, unit ``normal`` [3, h, w] and ``local`` [3, h, w].

    ``local`` are coordinates in which the ellipsoid is the unit sphere.
    """

    box: Box
    z: np.ndarray
    alpha: np.ndarray
    normal: np.ndarray
    local: np.ndarray

    @property
    def shape(self):
        return self.z.shape


def ellipsoid(canvas: Canvas, axes: np.ndarray, centre, radii, top: int = 0) -> Hit | None:
    """Intersect with an ellipsoid.

    Args:
        axes: [3, 3], columns are its axes in camera-aligned axes.
        centre: [3].
        radii: three half-lengths.
        top: first row to look at.

    Returns:
        None if it is off the picture.
    """
    centre = np.asarray(centre, np.float64)
    extent = np.sqrt(((axes * np.asarray(radii)) ** 2).sum(1))  # half-lengths along the camera's axes
    corners = centre + extent * np.array(((1, 1, 1), (-1, -1, 1), (1, 1, -1), (-1, -1, -1)))
    box = canvas.box(corners, 0.02)
    if box is None or box[0].stop <= top:
        return None
    box = slice(max(box[0].start, top), box[0].stop), box[1]
    inverse = (axes / np.asarray(radii)).T  # camera-aligned -> local
    towards = inverse.astype(np.float32)[:, :, None, None]
    start = towards[:, 0] * canvas.x[box[1]] + towards[:, 1] * canvas.y[box[0]][:, None]
    ray = towards[:, 2] - start * (1 / canvas.distance)
    start -= (inverse @ centre).astype(np.float32)[:, None, None]
    qa, qb = _dot(ray, ray), _dot(start, ray)
    closest = _dot(start, start) - qb * qb / qa
    z = (np.sqrt(np.maximum((1 - closest) * qa, 0)) - qb) / qa
    edge = float(min(extent[0], extent[1])) * canvas.unit
    alpha = clip(0.5 + (1 - np.sqrt(np.maximum(closest, 0))) * edge, 0, 1)
    local = start + z * ray
    normal = towards[0] * local[0] + towards[1] * local[1] + towards[2] * local[2]
    normal /= head.length(*normal) + 1e-6
    return Hit(box, z, alpha, normal, local)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@dataclass(frozen=True)
class HeadHit:
    """Where rays meet the head: flat arrays over ``n`` pixels at (``rows``, ``columns``).

    ``z``, ``alpha``: [n]; ``direction`` [3, n]: unit, head axes; ``point`` [3, n]: head axes, from the centre;
    ``x``, ``y`` [n]: face coordinates; ``cells`` [8, n]: see :class:`~pyface.data.procedural.head.Surface`.
    """

    rows: np.ndarray
    columns: np.ndarray
    z: np.ndarray
    alpha: np.ndarray
    direction: np.ndarray
    point: np.ndarray
    x: np.ndarray
    y: np.ndarray
    cells: np.ndarray


def meet_head(canvas: Canvas, axes: np.ndarray, shape: Surface) -> HeadHit:
    """Where every ray first meets the head: a coarse splat of the chart gives a start, Newton's steps the rest."""
    to_head = axes.T.astype(np.float32)
    start_z, box = _splat(canvas, axes.astype(np.float32), shape)
    inside = np.flatnonzero(start_z > FAR)
    height, width = start_z.shape
    rows, columns = np.divmod(inside, max(width, 1))
    rows += box[0].start
    columns += box[1].start
    gx, gy, t = canvas.x[columns], canvas.y[rows], start_z.ravel()[inside]
    start = to_head[:, 0, None] * gx + to_head[:, 1, None] * gy
    ray = to_head[:, 2, None] - start * np.float32(1 / canvas.distance)
    nearest, nearest_z = np.full(len(inside), 9.0, np.float32), t.copy()
    active, s, r = np.arange(len(inside)), start, ray
    near, near_z = nearest, nearest_z  # of the active rays
    gap_before = t_before = t
    for step in range(12):
        p = t * r
        p += s
        length = head.length(*p)
        p /= length
        gap = length - head.sample(shape.radius, p)[0]
        outward = _dot(p, r)
        away = np.abs(gap)
        if step == 0:
            slope = np.maximum(outward, 0.4)
        else:  # the secant through the last two points
            moved = t - t_before
            moved[np.abs(moved) < 1e-5] = 1e-5
            slope = clip((gap - gap_before) / moved, 0.25, 4.0)
        gap_before, t_before = gap, t
        t = t - np.minimum(gap / slope, 0.15)
        done = away < 4e-3
        better = away < near
        near, near_z = np.where(better, away, near), np.where(better, np.where(done, t, t_before), near_z)
        if step:
            done |= (outward < -0.1) & (gap > 0)
            go, over = np.flatnonzero(~done), np.flatnonzero(done)
            if len(go) <= 0.002 * len(inside) or step == 11:
                over, go = np.arange(len(done)), go[:0]
            nearest[active[over]], nearest_z[active[over]] = near[over], near_z[over]
            if not len(go):
                break
            active, s, r, t = active[go], s.take(go, 1), r.take(go, 1), t[go]
            gap_before, t_before, near, near_z = gap_before[go], t_before[go], near[go], near_z[go]
    alpha = clip(0.5 - (nearest - 0.002) * canvas.unit, 0, 1)
    alpha[nearest < 0.004] = 1
    seen = np.flatnonzero(alpha > 0.02)
    z = nearest_z[seen]
    point = start.take(seen, 1) + z * ray.take(seen, 1)
    direction = point / head.length(*point)
    return HeadHit(
        rows[seen], columns[seen], z, alpha[seen], direction, point, *head.to_face(direction),
        head.sample(shape.cells, direction),
    )  # fmt: skip


def _splat(canvas: Canvas, axes: np.ndarray, shape: Surface) -> tuple[np.ndarray, Box]:
    """A depth a little before the head's, [h, w] over a box of pixels; :data:`FAR` where the head cannot be."""
    every = shape.radius[0, 0, ::2, ::2].numpy() * head.chart_directions()[:, ::2, ::2]
    points = axes @ every.reshape(3, -1)
    z = points[2]
    scale = canvas.unit / (1 - z * (1 / canvas.distance))
    coarse = max(round(0.11 * canvas.unit), 2)  # pixels per cell, wide enough that none within the head stays empty
    cells = -(-canvas.size // coarse) + 4
    column = ((canvas.origin[0] + points[0] * scale + 0.5) * (1 / coarse)).astype(np.int32) + 2
    row = ((canvas.origin[1] - points[1] * scale + 0.5) * (1 / coarse)).astype(np.int32) + 2
    keep = (column >= 0) & (column < cells) & (row >= 0) & (row < cells)
    table = np.full(cells * cells, FAR, np.float32)
    np.maximum.at(table, (row * cells + column)[keep], z[keep])
    table = ndimage.maximum_filter(table.reshape(cells, cells), 3)[2:-2, 2:-2]
    table = np.where(table > FAR, table + 0.02, FAR)
    rows, columns = np.flatnonzero((table > FAR).any(1)), np.flatnonzero((table > FAR).any(0))
    if not len(rows):
        return np.full((0, 0), FAR, np.float32), (slice(0, 0), slice(0, 0))
    box = tuple(slice(int(k[0]) * coarse, min((int(k[-1]) + 1) * coarse, canvas.size)) for k in (rows, columns))
    fine = table[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].repeat(coarse, 0).repeat(coarse, 1)
    return fine[: box[0].stop - box[0].start, : box[1].stop - box[1].start], box


# --- Textures ---

TILE = 256


@cache
def tile(kind: str) -> np.ndarray:
    """A tileable texture, float32 [TILE, TILE], zero mean, unit variance.

    "cloud": amplitude falls as 1 / f^1.6; "mottle": a band of middle frequencies; "grain": fine;
    "strand": fine across (columns), long along (rows).
    """
    rng = np.random.default_rng({"cloud": 11, "mottle": 12, "grain": 13, "strand": 14}[kind])
    fy, fx = np.fft.fftfreq(TILE)[:, None] * TILE, np.fft.rfftfreq(TILE)[None] * TILE
    f = np.hypot(fx, fy)
    if kind == "cloud":
        weight = np.maximum(f, 1) ** -1.6
    elif kind == "mottle":
        weight = f * np.exp(-((f / 22) ** 2))
    elif kind == "grain":
        weight = np.exp(-((f / 90) ** 2)) * np.minimum(f / 20, 1)
    else:
        weight = np.maximum(fx, 3) ** -0.25 * np.exp(-((fy / 5) ** 2)) * np.exp(-((fx / 80) ** 2)) * (fx > 0)
    weight[0, 0] = 0
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((TILE, TILE))) * weight, (TILE, TILE))
    return (noise / noise.std()).astype(np.float32)


def texture(kind: str, x, y) -> np.ndarray:
    """Values of :func:`tile` at columns ``x`` and rows ``y`` (in texels, wrapped), bilinear."""
    at = np.empty((*np.broadcast_shapes(np.shape(x), np.shape(y)), 2), np.float32)
    for axis, value in ((0, x), (1, y)):
        turns = np.multiply(value, 2 / TILE, dtype=np.float32)
        at[..., axis] = turns - 2 * np.floor(0.5 * turns) - 1
    return bilinear(_wrapped(kind), at.reshape(-1, 2))[0].reshape(at.shape[:-1])


@cache
def _wrapped(kind: str) -> torch.Tensor:
    """A tile with its first row and column again at the end: Tensor[1, 1, TILE + 1, TILE + 1]."""
    return torch.from_numpy(np.pad(tile(kind), (0, 1), mode="wrap"))[None, None]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear resampling of the last two axes to [height, width], picture borders aligned."""
    maps = torch.from_numpy(image.reshape(1, -1, *image.shape[-2:]))
    out = torch.nn.functional.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
    return out.numpy().reshape(*image.shape[:-2], height, width)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of the last two axes."""
    reach = max(int(2.5 * sigma + 0.5), 1)
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(reach + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    height, width = image.shape[-2:]
    for axis, size in ((-2, height), (-1, width)):
        first, last = (image[..., k, :] if axis == -2 else image[..., k] for k in (slice(1), slice(-1, None)))
        padded = np.concatenate((*[first] * reach, image, *[last] * reach), axis)
        shifted = [padded[..., k : k + size, :] if axis == -2 else padded[..., k : k + size]
                   for k in range(2 * reach + 1)]  # fmt: skip
        image = shifted[reach] * (weights[0] / total)
        for k in range(1, reach + 1):
            image += (shifted[reach - k] + shifted[reach + k]) * (weights[k] / total)
    return image


def linear(colour) -> np.ndarray:
    """sRGB (3 numbers in [0, 1]) -> linear light, float32 [3], not to be written to."""
    return _linear(tuple(colour))


@lru_cache(256)
def _linear(colour: tuple[float, float, float]) -> np.ndarray:
    return np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour], np.float32)


@cache
def _encoding() -> np.ndarray:
    x = np.arange(1 << 15) / ((1 << 15) - 1)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 1e-9) ** (1 / 2.4) - 0.055).astype(np.float32)


def encode(light: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] -> sRGB."""
    return _encoding().take((clip(light, 0, 1) * ((1 << 15) - 1) + 0.5).astype(np.int32))
