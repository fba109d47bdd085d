"""Training pictures made on the spot: faces, dead leaves, coloured noise, gradients and texture photographs.

Nothing here is a photograph of a person. Each picture depends on (seed, index, size) alone.
The natural-statistics part follows Baradad et al., "Learning to See by Looking at Noise" (2021): occluding shapes
("dead leaves") and noise whose spectrum falls as a power of frequency have the edges and the correlations that
make networks work on photographs.
"""

from __future__ import annotations

import colorsys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from pyface.errors import UserError

# Only surfaces, microscopy and sky: the portraits and photographs of scikit-image are kept for validation.
TEXTURE_FILES = ("brick.png", "grass.png", "gravel.png", "color.png", "ihc.png", "hubble_deep_field.jpg", "retina.jpg")
KINDS = ("face", "leaves", "noise", "gradient", "texture")
_MIX = (0.34, 0.24, 0.14, 0.06, 0.22)


def scene(seed: int, index: int, size: int = 256, kind: str | None = None) -> np.ndarray:
    """One training picture.

    Args:
        seed, index: non-negative; the same pair always gives the same picture.
        size: side in pixels, at least 8.
        kind: one of :data:`KINDS`; None draws one (about a third are faces).

    Returns:
        uint8 array [size, size, 3], RGB.

    Raises:
        UserError: size below 8, negative seed or index, unknown kind.
    """
    if size < 8 or seed < 0 or index < 0:
        raise UserError(f"scene: need size >= 8, seed >= 0 and index >= 0, got {size}, {seed}, {index}")
    if kind is not None and kind not in KINDS:
        raise UserError(f"scene: unknown kind {kind!r}; known: {', '.join(KINDS)}")
    rng = np.random.default_rng((seed, index))
    drawn = rng.choice(KINDS, p=_MIX)
    picture = _PAINTERS[kind or drawn](rng, size)
    return np.ascontiguousarray(np.clip(np.rint(_develop(rng, picture) * 255), 0, 255).astype(np.uint8))


def _develop(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """What a camera adds: exposure, contrast, sometimes grey, blur and sensor noise."""
    picture = np.clip(picture, 0, 1)
    if rng.random() < 0.6:
        picture = picture ** np.exp(rng.uniform(-0.5, 0.5))
    if rng.random() < 0.4:
        low, high = np.sort(rng.uniform(0, 1, 2))
        picture = picture * (0.35 + 0.65 * high) + 0.35 * low * (1 - high)
    if rng.random() < 0.12:
        picture = np.repeat(picture @ np.float32([[0.299], [0.587], [0.114]]), 3, 2)
    if rng.random() < 0.4:
        picture = ndimage.gaussian_filter(picture, (*[rng.uniform(0.3, 1.2)] * 2, 0))
    if rng.random() < 0.5:
        picture = picture + rng.normal(0, rng.uniform(0.003, 0.03), picture.shape).astype(np.float32)
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    return picture


def _power_noise(rng: np.random.Generator, size: int, exponent: float, channels: int = 3) -> np.ndarray:
    """Noise of amplitude spectrum 1 / f**exponent, zero mean, unit variance, float32 [size, size, channels]."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((size, size, channels)), axes=(0, 1))
    noise = np.fft.irfft2(spectrum * frequency[..., None] ** -exponent, (size, size), axes=(0, 1))
    return (noise / (noise.std((0, 1)) + 1e-12)).astype(np.float32)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A random colour, muted more often than loud, float32 [3]."""
    return np.float32(colorsys.hsv_to_rgb(rng.random(), rng.beta(1.2, 2.2), rng.beta(1.3, 1.1)))


def _paint_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    noise = _power_noise(rng, size, rng.uniform(0.7, 1.8))
    mixing = rng.normal(0, 0.5, (3, 3)) + np.ones((1, 3)) * rng.normal(0, 1)
    return (_colour(rng) + rng.uniform(0.08, 0.25) * noise @ (mixing / np.linalg.norm(mixing) * 1.5)).astype(np.float32)


def _paint_gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j].astype(np.float32)
    picture = np.zeros((size, size, 3), np.float32) + _colour(rng)
    for _ in range(rng.integers(1, 4)):
        angle = rng.uniform(0, 2 * np.pi)
        if rng.random() < 0.5:
            t = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5) + 0.5
        else:
            t = np.hypot(x - rng.random(), y - rng.random()) * rng.uniform(0.7, 1.5)
        t = np.clip((t - rng.uniform(0, 0.5)) / rng.uniform(0.05, 1), 0, 1)[..., None]
        picture = picture * (1 - t) + _colour(rng) * t
    return picture


def _paint_leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    """Occluding ellipses, rectangles and polygons of a power-law size, many of them textured or shaded."""
    scale = 2  # drawn twice as large and averaged down, for edges as soft as a camera's
    side = size * scale
    picture = _paint_gradient(rng, size) if rng.random() < 0.5 else _paint_noise(rng, size)
    picture = np.clip(picture, 0, 1)
    shading = _power_noise(rng, size, 1.0)
    flat = Image.new("RGB", (side, side))
    cover = Image.new("L", (side, side))
    draw, mask = ImageDraw.Draw(flat), ImageDraw.Draw(cover)
    smallest = rng.uniform(0.012, 0.06) * side
    for _ in range(rng.integers(20, 350)):
        radius = min(smallest * rng.uniform(1e-3, 1) ** -0.5, side / 3)
        centre = rng.uniform(-0.1, 1.1, 2) * side
        corners = rng.integers(3, 8) if rng.random() < 0.5 else 24
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 24 else np.linspace(0, 2 * np.pi, corners)
        tilt, flatness = rng.uniform(0, np.pi), rng.uniform(0.3, 1)
        x, y = radius * np.cos(angles), radius * flatness * np.sin(angles)
        points = np.stack((x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)), 1) + centre
        outline = [tuple(p) for p in points]
        draw.polygon(outline, fill=tuple(int(255 * v) for v in _colour(rng)))
        mask.polygon(outline, fill=int(rng.integers(150, 256)))
    flat = np.asarray(flat.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    alpha = np.asarray(cover.resize((size, size), Image.Resampling.BOX), np.float32)[..., None] / 255
    flat = flat + rng.uniform(0, 0.1) * shading * (rng.random() < 0.7)
    return picture * (1 - alpha) + flat * alpha


@cache
def _texture_file(name: str) -> np.ndarray:
    from skimage import data, io

    # beside the module, where the wheel puts them; `data.data_dir` is a download cache when pooch is installed
    picture = io.imread(Path(data.__file__).with_name(name))
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, 2)
    return picture[..., :3]


def _paint_texture(rng: np.random.Generator, size: int) -> np.ndarray:
    picture = _texture_file(TEXTURE_FILES[rng.integers(len(TEXTURE_FILES))])
    extent = int(min(size * np.exp(rng.uniform(np.log(0.6), np.log(3))), *picture.shape[:2]))
    top, left = (rng.integers(0, total - extent + 1) for total in picture.shape[:2])
    crop = Image.fromarray(np.ascontiguousarray(picture[top : top + extent, left : left + extent]))
    crop = crop.resize((size, size), Image.Resampling.BICUBIC)
    crop = np.rot90(np.asarray(crop, np.float32) / 255, rng.integers(4))
    if rng.random() < 0.5:
        tint = 0.5 + 0.5 * _colour(rng)
        crop = crop * tint / tint.max()
    return crop.astype(np.float32)


def _paint_face(rng: np.random.Generator, size: int) -> np.ndarray:
    """A person who does not exist, before a background of their own."""
    from pyface.data.procedural import draw_person, draw_view, render

    person, view = draw_person(int(rng.integers(2**31)), 0), draw_view(int(rng.integers(2**31)), 0)
    side = max(size, 16)
    face = render([person], [view], side)[0]["image"].numpy().transpose(1, 2, 0)
    return face if side == size else ndimage.zoom(face, (size / side, size / side, 1), order=1)


_PAINTERS = {
    "face": _paint_face,
    "leaves": _paint_leaves,
    "noise": _paint_noise,
    "gradient": _paint_gradient,
    "texture": _paint_texture,
}
