"""Backgrounds, light on surfaces, and the camera."""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
from scipy import special

from pyface.data.procedural.canvas import (
    AMBIENT,
    FLESH,
    GLOSS,
    NORMAL,
    SHEEN,
    TILE,
    Canvas,
    blur,
    encode,
    linear,
    resize,
    tile,
)
from pyface.data.procedural.head import clip, length
from pyface.data.procedural.parameters import Background, Camera, Light, View

_SHADOW_GRID = 64
_GRID = 64  # of backgrounds


def towards_light(light: Light) -> np.ndarray:
    """Unit vector [3] to the key light in camera-aligned axes (x right, y up, z to the camera)."""
    c = math.cos(light.elevation)
    return np.array((math.sin(light.azimuth) * c, math.sin(light.elevation), math.cos(light.azimuth) * c))


@lru_cache(2)  # the frames of a clip, and a face before and after an edit, have the same one
def backdrop(background: Background, size: int) -> np.ndarray:
    """What is behind, out of focus: linear float32 [3, size, size], not to be written to."""
    rng = np.random.default_rng(background.seed)
    base, accent = linear(background.colour), linear(background.accent)
    grid = _GRID
    u = np.arange(grid, dtype=np.float32)[None] / grid
    v = u.T
    if background.kind == "plain":
        share = 0.25 * length(u - rng.uniform(0.2, 0.8), v - rng.uniform(0.2, 0.6))
        picture = _mixed(base, base * 0.45, share)
    elif background.kind == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        share = clip(0.5 + (u - 0.5) * math.cos(angle) + (v - 0.5) * math.sin(angle), 0, 1)
        picture = _mixed(base, accent, share)
    elif background.kind == "bokeh":
        picture = _mixed(base * 0.35, accent * 0.25, v)
        for _ in range(int(rng.integers(10, 26))):
            x, y, radius = rng.uniform(-0.1, 1.1), rng.uniform(-0.1, 1.0), rng.uniform(0.03, 0.11)
            hue = linear(_near(rng, (0.95, 0.75, 0.5), 0.18)) * float(rng.uniform(0.15, 0.9))
            reach = radius + 1.5 / grid
            box = tuple(slice(max(int((at - reach) * grid), 0), max(int((at + reach) * grid) + 1, 0)) for at in (y, x))
            glow = clip((radius - length(u[:, box[1]] - x, v[box[0]] - y)) * grid * 0.4 + 0.5, 0, 1)
            picture[(slice(None), *box)] += glow * hue[:, None, None]
    elif background.kind == "leaves":
        x, y = (int(k) for k in rng.integers(0, TILE - grid, 2))
        cloud = np.roll(tile("cloud"), (x, y), (0, 1))[: 2 * grid : 2, : 2 * grid : 2]
        spots = np.roll(tile("mottle"), (y, x), (0, 1))[:grid, :grid]
        green = linear(_near(rng, (0.28, 0.42, 0.20), 0.06))
        sun = linear((0.85, 0.88, 0.65))
        picture = green[:, None, None] * clip(1 + 0.5 * cloud + 0.3 * spots, 0.15, 3)
        picture = picture + sun[:, None, None] * clip(0.5 * spots + 0.4 * cloud - 0.75 + 0.4 * (0.5 - v), 0, 1)
        picture = blur(picture, 1.5)
    else:  # indoor: walls, shelves, windows, frames
        picture = _mixed(base, base * 0.7, v)
        for _ in range(int(rng.integers(3, 9))):
            x, y, w, h = rng.uniform(-0.1, 1.0), rng.uniform(-0.1, 0.9), rng.uniform(0.06, 0.5), rng.uniform(0.06, 0.6)
            shaded = rng.random() < 0.7
            hue = accent * float(rng.uniform(0.25, 1.8)) if shaded else linear(rng.uniform(0.1, 0.95, 3).tolist())
            across, down = (slice(max(math.floor(low * grid) + 1, 0), max(math.ceil(high * grid), 0))
                            for low, high in ((x, x + w), (y, y + h)))  # fmt: skip
            picture[:, down, across] = hue[:, None, None]
        picture = blur(picture, float(rng.uniform(0.8, 2.4)))
    return resize(clip(picture, 0, 1.5).astype(np.float32), size, size)


def _mixed(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    """[3, grid, grid] from ``a`` at ``share`` 0 to ``b`` at 1."""
    out = np.empty((3, _GRID, _GRID), np.float32)
    out[:] = a[:, None, None] + share * (b - a)[:, None, None]
    return out


def _near(rng: np.random.Generator, colour, spread: float) -> tuple[float, ...]:
    return tuple(np.clip(rng.normal(colour, spread), 0, 1).tolist())


def shadows(canvas: Canvas, towards: np.ndarray, softness: float) -> np.ndarray:
    """Share of the key light that is kept away by nearer surfaces, [size, size], by a walk through the depth buffer."""
    step = max(canvas.size // _SHADOW_GRID, 1)
    z = canvas.z[step // 2 :: step, step // 2 :: step]
    unit = canvas.unit / step
    blocked = np.zeros_like(z)
    lx, ly, lz = (float(v) for v in towards)
    reach = math.hypot(lx, ly) + 1e-6
    travelled, stride = 0.0, 1.0
    rows, columns = z.shape
    for _ in range(16):
        travelled += stride  # pixels of this grid along the picture
        stride *= 1.13
        t = travelled / (reach * unit)
        if t > 1.6:
            break
        dx, dy = round(t * lx * unit), round(-t * ly * unit)
        if abs(dx) >= columns or abs(dy) >= rows:
            break
        target = (slice(max(-dy, 0), rows - max(dy, 0)), slice(max(-dx, 0), columns - max(dx, 0)))
        source = (slice(max(dy, 0), rows - max(-dy, 0)), slice(max(dx, 0), columns - max(-dx, 0)))
        above = z[source] - z[target] - t * lz
        penumbra = 0.05 + (0.12 + 0.45 * softness) * t
        amount = clip((above - 0.02) * (1 / penumbra), 0, 1) * (above < 1.6)
        blocked[target] = np.maximum(blocked[target], amount)
    return resize(blur(blocked, 0.7 + 0.8 * softness), canvas.size, canvas.size)


def shade(canvas: Canvas, view: View, towards: np.ndarray, background: np.ndarray, block) -> np.ndarray:
    """Light everything on the canvas: linear float32 [3, H, W] with the background.

    Args:
        block: [H, W] share of the key light that glasses keep away, or None.
    """
    light = view.light
    lx, ly, _ = (float(v) for v in towards)
    kept = shadows(canvas, towards, light.softness)
    if block is not None:
        dx, dy = -round(0.16 * lx * canvas.unit), round(0.16 * ly * canvas.unit)
        kept = np.maximum(kept, 0.6 * np.roll(block, (dy, dx), (0, 1)) * (canvas.ident != 3))
    warm = 0.10 * light.warmth
    key = np.array((1 + warm, 1.0, 1 - 1.3 * warm)) * (1.5 * light.strength)
    sky = background.mean((1, 2))
    sky = 0.75 + 0.25 * sky / max(float(sky.mean()), 0.02)
    ground = 0.45 + 0.25 * linear(view.clothes.colour)
    out = np.empty((3, canvas.size, canvas.size), np.float32)
    behind = 0.55 + 0.45 * light.ambient + 0.3 * light.strength
    for rows in canvas.bands():
        lit = _lit(light, canvas.material[:, rows], towards, kept[rows], key, sky, ground)
        cover = canvas.cover[rows]
        out[:, rows] = lit * cover + background[:, rows] * ((1 - cover) * behind)
    return out


def _lit(light: Light, buffer: np.ndarray, towards: np.ndarray, kept: np.ndarray, key, sky, ground) -> np.ndarray:
    """Light that materials ``buffer`` [CHANNELS, h, w] send to the camera: linear float32 [3, h, w].

    Args:
        kept: [h, w] share of the key light that does not arrive.
        key, sky, ground: [3] colours of the light from its side, above and below.
    """
    n = buffer[NORMAL]
    n = n / np.sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2] + 1e-6)
    lx, ly, lz = (float(v) for v in towards)
    facing = lx * n[0] + ly * n[1] + lz * n[2]
    ambient = buffer[AMBIENT]
    above = 0.5 + 0.5 * n[1]
    front = np.maximum(n[2], 0)
    flesh = buffer[FLESH]
    # Blinn's highlights: a broad one and a sharp one.
    half = np.array((lx, ly, lz + 1))
    half = half / math.sqrt(float(half @ half))
    mirror = np.maximum(sum(float(h) * n[i] for i, h in enumerate(half)), 0)
    m4 = mirror * mirror
    m4 = m4 * m4
    m16 = m4 * m4
    m16 = m16 * m16
    m64 = m16 * m16
    m64 = m64 * m64
    open_ = 1 - kept
    grazing = (1 - front) ** 2
    grazing = grazing * grazing
    gloss = buffer[GLOSS]
    shine = gloss * (0.13 * m16 + 0.13 * m64) * open_ * (facing > 0) + 0.03 * flesh * grazing * ambient
    shine = shine + buffer[SHEEN] * (0.35 + 0.65 * open_)
    rim = light.rim * np.maximum(-math.copysign(1.0, lx or 1.0) * n[0] - 0.35, 0) * 0.9
    out = np.empty((3, *kept.shape), np.float32)
    for c, (wrap, bleed) in enumerate(((0.24, 0.66), (0.11, 0.86), (0.06, 0.91))):
        wrapped = flesh * wrap
        diffuse = np.maximum((facing + wrapped) / (1 + wrapped), 0)
        passed = 1 - kept * (1 - flesh * (1 - bleed))
        dome = float(ground[c]) + (float(sky[c]) - float(ground[c])) * above
        got = float(key[c]) * diffuse * passed + light.ambient * ambient * (0.75 * dome + 0.35 * front)
        got = got + rim
        out[c] = buffer[c] * got + float(key[c]) * shine
    return out


def meter(light: Light, skin: np.ndarray) -> float:
    """What a light meter held to skin of linear colour ``skin`` [3] shows.

    It asks the parameters and not the picture, so that frames of a clip, and a face before and after an edit, are
    exposed alike. The coefficients are a fit to rendered faces.
    """
    return float(skin[1]) * (0.85 * light.strength * float(towards_light(light)[2]) + 0.5 * light.ambient + 0.27)


def develop(image: np.ndarray, camera: Camera, meter: float) -> np.ndarray:
    """Exposure, tone curve, white balance, blur, vignette, noise: linear light [3, H, W] -> sRGB.

    Args:
        meter: brightness of the face, from :func:`meter`.
    """
    size = image.shape[1]
    gain = 2.0**camera.exposure * (0.37 / max(meter, 0.01)) ** 0.62
    balance = 0.06 * camera.balance
    image = image * np.array((gain * (1 + balance), gain, gain * (1 - balance)), np.float32)[:, None, None]
    if camera.vignette > 0:
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
        image = image * (1 - camera.vignette * 1.3 * (axis[:, None] ** 2 + axis**2))
    sigma = camera.blur * math.sqrt(size / 128)
    image = blur(image, sigma)
    image = image * (1 + image * 0.12) / (1 + 0.50 * image) * 1.05  # a soft shoulder
    grey = image.mean(0)
    image = encode(grey + 1.10 * (image - grey))
    if camera.noise > 0:
        rng = np.random.default_rng(camera.seed)
        draws = np.frombuffer(rng.bytes(2 * image.size), np.uint16)
        image = image + camera.noise * _normal().take(draws).reshape(image.shape)
    return image


@cache
def _normal() -> np.ndarray:
    """Quantiles of the standard normal distribution: what uniform 16-bit numbers turn into, five times as fast."""
    return special.ndtri((np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float32)
