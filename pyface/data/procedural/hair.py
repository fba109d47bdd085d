"""Hair, hats and face masks: how far they lift the surface, where they are, and what they look like."""

from __future__ import annotations

import math

import numpy as np

from pyface.data.procedural import head
from pyface.data.procedural.canvas import Canvas, ellipsoid, linear, material, texture
from pyface.data.procedural.describe import has_bangs
from pyface.data.procedural.head import CENTRE, Measures, bump, clip, smooth
from pyface.data.procedural.parameters import Person, View, grey_share

_VOLUME = {"bald": 0.0, "buzz": 0.022, "short": 0.085, "parted": 0.105, "bob": 0.11, "long": 0.10, "tied": 0.05,
           "afro": 0.36}  # fmt: skip
HANGING = ("bob", "long")


def hair_colour(person: Person, view: View) -> np.ndarray:
    """Linear colour [3] of the hair with its grey."""
    grey = grey_share(person, view)
    return (1 - grey) * linear(person.hair.colour) + grey * linear((0.66, 0.65, 0.64))


def cover(person: Person, view: View, m: Measures, direction: np.ndarray, skin: np.ndarray):
    """Thickness over the skin, and the margins (positive inside) of hair, hat and mask; all [CHART, CHART]."""
    hair = person.hair
    margin = _hairline(person, view, m, direction)
    volume = _VOLUME[hair.style] * (1 + 0.3 * hair.volume + 0.25 * hair.length * (hair.style in ("short", "afro")))
    thick = volume * smooth(0.0, 0.28 if hair.style != "afro" else 0.34, margin) * (0.75 + 0.25 * direction[1])
    if hair.style == "afro":
        thick = thick * (0.5 + 0.5 * smooth(-0.5, 0.35, direction[1]))
    if has_bangs(person, view):
        thick = thick + 0.035 * smooth(0.02, 0.12, margin) * smooth(0.5, 0.75, direction[2])
    if hair.style in ("parted", "bob", "long", "tied"):
        line = 0.30 * hair.part
        groove = np.exp(-(((direction[0] - line) / 0.045) ** 2)) * smooth(0.45, 0.7, direction[1])
        thick = thick * (1 - 0.45 * groove * smooth(-0.5, 0.1, direction[2]))
    if hair.style != "bald" and hair.curl > 0.3:
        along = np.arange(head.CHART, dtype=np.float32) * (200 / head.CHART)
        lumps = texture("mottle", along + person.seed % 251, along[:, None] + person.seed % 97)
        thick = thick * (1 + (0.04 if hair.style == "afro" else 0.22) * hair.curl * clip(lumps, -2, 2))
    if hair.style == "short" and hair.curl <= 0.5:  # brushed up at the front
        thick = thick + 0.05 * (1 + hair.length) * smooth(0.0, 0.1, margin) * bump(
            direction[0] - 0.15 * hair.part, direction[1] - 0.86, 0.35, 0.12) * (direction[2] > 0)  # fmt: skip
    x, y = head.to_face(direction)
    beard = m.beard * {"stubble": 0.0, "moustache": 0.010, "goatee": 0.018, "full": 0.035}[person.beard.style]
    if beard > 0:
        thick = thick + beard * beard_density(person.beard.style, m, x, y, 1.6) * (direction[2] > -0.2)
    hat = np.full_like(skin, -1.0)
    if view.hat != "none":
        tilt = 0.36 if view.hat == "beanie" else 0.30
        hat = (direction[1] * math.cos(tilt) - direction[2] * math.sin(tilt)) - (0.40 if view.hat == "beanie" else 0.43)
        lift = 0.085 * smooth(0.0, 0.03, hat) + 0.06 * smooth(0.1, 0.8, hat)
        if view.hat == "beanie":
            lift = lift + 0.03 * smooth(0.0, 0.02, hat) * smooth(0.2, 0.17, hat)
        thick = np.where(hat > 0, lift, thick * smooth(0.0, -0.12, hat) + np.float32(0.03) * (thick > 0.03))
    mask = np.full_like(skin, -1.0)
    if view.occluder == "mask":
        mask = np.minimum(
            np.minimum(-0.17 - 0.30 * np.abs(x) ** 1.7 - y, y + 1.12 + 0.1 * x * x), 0.66 - 0.12 * y**2 - np.abs(x)
        )
        shell = head.ellipsoid_radius(direction, (0, -0.52, 0.30), (0.56, 0.66, 0.80)) + 0.01
        lift = np.maximum(shell - skin, 0.02) * smooth(0.0, 0.1, mask)
        thick = np.where((mask > 0) & (direction[2] > 0), np.maximum(lift, 0.012), thick)
        mask = np.where(direction[2] > 0, mask, -1.0)
    return thick, margin, hat, mask


_TURN = np.cos(np.radians((180, 150, 130, 115, 100, 87, 79, 72, 60, 45, 25, 0)))


def _hairline(person: Person, view: View, m: Measures, direction) -> np.ndarray:
    """How far inside the hair a direction is (about radians); below 0 outside."""
    hair, front = person.hair, 0.80 + 0.025 * person.shape.forehead
    if hair.style == "bald":
        return np.full(direction.shape[1:], -1.0, np.float32)
    lose = hair.recession
    burn = 0.12 - 0.05 * m.man if m.age > 14 else 0.2
    heights = [-0.52, -0.48, -0.2, 0.2, 0.42, 0.34, burn + 0.03, 0.33, 0.56 + 0.05 * lose, 0.70 + 0.15 * lose,
               front + 0.09 * lose, front + 0.04 * lose]  # fmt: skip
    flat = np.sqrt(direction[0] ** 2 + direction[2] ** 2) + 1e-4
    line = np.interp(direction[2] / flat, _TURN, heights).astype(np.float32)
    if has_bangs(person, view):
        low = 0.615 - 0.05 * hair.fringe - 0.10 * hair.part * direction[0] * (hair.style != "bob")
        line = line + (np.minimum(low, line) - line) * smooth(0.75, 0.42, np.abs(direction[0])) * (direction[2] > 0)
    return direction[1] - line


def beard_density(style: str, m: Measures, x, y, soft: float = 1.0) -> np.ndarray:
    """Where a beard of this style grows, 0 to 1, at face coordinates; ``soft`` widens its border."""
    side = np.abs(x)
    width = 0.06 * soft
    top, _, _, bottom = head.lip_lines(m, clip(side / (m.mouth_width * 1.05), 0, 1))
    droop = 0.10 * smooth(0.7 * m.mouth_width, 1.25 * m.mouth_width, side)
    lip = smooth(m.nose_base - 0.0, m.nose_base - 0.05, y + droop) * smooth(top - 0.012, top + 0.022, y + 1.2 * droop)
    lip = lip * smooth(m.mouth_width + 0.075, m.mouth_width + 0.01, side) * (0.45 + 0.55 * smooth(0.0, 0.05, side))
    if style == "moustache":
        return lip
    below = smooth(bottom - 0.01, bottom - 0.04, y)
    patch = 0.8 * bump(x, y - bottom + 0.05, 0.07, 0.08)
    if style == "goatee":
        chin = below * smooth(0.31, 0.31 - 1.5 * width, side) * smooth(bottom - 0.05, bottom - 0.14, y)
        ring = smooth(0.31, 0.27, side) * smooth(m.mouth_width + 0.012, m.mouth_width + 0.04, side)
        ring = ring * smooth(m.mouth_y + 0.06, m.mouth_y - 0.02, y)
        return np.maximum(np.maximum(lip, patch), np.maximum(chin, ring)) * smooth(-1.22, -1.1, y)
    # A full beard: everything below a line from the sideburns to the nose, but for the mouth.
    cheek = -0.50 + 2.3 * np.maximum(side - 0.40, 0) ** 1.5
    line = m.nose_base - 0.03 - 0.12 * smooth(0.5 * m.mouth_width, 1.3 * m.mouth_width, side)
    line = line + (cheek - line) * smooth(0.30, 0.46, side)
    around = smooth(m.mouth_width - 0.01, m.mouth_width + 0.04, side)
    free = np.maximum(np.maximum(smooth(top - 0.008, top + 0.022, y), smooth(bottom - 0.01, bottom - 0.05, y)), around)
    return smooth(line + 0.03, line - 1.6 * width, y) * free * smooth(0.12, -0.1, y)


def strands(person: Person, hit_direction, point, x, pixel: float, style: str, bangs: bool):
    """Texture and tangent of the scalp's hair.

    Args:
        hit_direction, point: [3, n], head axes.
        x: face coordinate, across the bangs.
        pixel: size of a pixel as a length.

    Returns:
        (noise [n] of about unit variance, tangent [3, n] of about unit length, head axes).
    """
    hair = person.hair
    d, shift = hit_direction, float(person.seed % 1021)
    if style == "afro" or style == "buzz":
        scale = 60.0 if style == "afro" else 150.0
        noise = texture("grain", point[0] * scale + shift + 31 * point[2], point[1] * scale + 17 * point[2])
        tangent = d
    elif style == "short":
        tilt = 0.75
        u = d[0]
        v = d[1] * math.sin(tilt) + d[2] * math.cos(tilt)  # forward, seen from the crown
        angle = np.arctan2(u, v) * (TURNS / (2 * math.pi))
        along = np.sqrt(u * u + v * v)
        wave = (1 + 7 * hair.curl) * np.sin(along * (12 + 22 * hair.curl) + shift + 0.05 * angle)
        noise = texture("strand", angle * 1.0 + wave + shift, along * 26 + shift)
        tangent = np.stack((u, v * math.sin(tilt), v * math.cos(tilt))) / (along + 0.05)
    else:
        across = point[2] + 0.25 * np.abs(point[0]) + 0.2 * x * (point[2] > 0.3)
        along = np.abs(point[0] - 0.3 * hair.part) - point[1]
        wave = hair.curl * (3 + 5 * hair.curl) * np.sin(along * (8 + 12 * hair.curl) + 9 * across + shift)
        noise = texture("strand", across * 95 + wave + shift, along * 12 + shift)
        if bangs:
            hang = smooth(0.84, 0.70, d[1]) * smooth(0.3, 0.6, d[2])
            noise += hang * (texture("strand", 100 * x + 0.6 * wave, point[1] * 14 + shift) - noise)
        side = np.where(point[0] > 0.3 * hair.part, 1.0, -1.0)
        lean = smooth(1.0, 0.2, d[1])
        tangent = np.stack((side * (1 - 0.85 * lean), -0.2 - 0.8 * lean, 0.15 * np.ones_like(lean)))
    fade = min(1.0, 0.018 / pixel)
    return noise * (0.45 + 0.55 * fade), tangent


TURNS = 420.0


def highlight(tangent, towards, view_axis) -> np.ndarray:
    """Kajiya and Kay's highlight of thin strands, 0 to about 1."""
    half = towards + view_axis
    half = half / math.sqrt(float(half @ half))
    along = sum(float(h) * t for h, t in zip(half, tangent))
    sine = clip(1 - along * along, 0, 1)
    s4 = sine * sine
    s4 = s4 * s4
    s16 = s4 * s4
    s16 = s16 * s16
    return 0.35 * s4 + 0.65 * s16 * s16


def hanging(canvas: Canvas, person: Person, view: View, m: Measures, axes, towards) -> None:
    """The hair that falls beside and behind the face: a curtain around the head."""
    hair = person.hair
    if hair.style not in HANGING:
        return
    long = hair.style == "long"
    bottom = -1.75 - 0.4 * hair.length if long else -1.0 - 0.16 * hair.length
    swell = 1 + 0.05 * hair.volume + 0.10 * hair.curl
    centre = np.array((0.0, -0.42, -0.30)) - CENTRE
    radii = (0.93 * swell, 1.45 if long else 1.12, 0.80)
    hit = ellipsoid(canvas, axes, axes @ centre, radii)
    if hit is None:
        return
    depth = float(axes[2] @ centre) - 0.25  # behind the neck, the inside of the far half
    inside = material(hit.shape, hair_colour(person, view) * 0.35, hit.normal, 0.4)
    local, seed = hit.local, float(person.seed % 1021)
    height = local[1] * radii[1] + float(centre[1] + CENTRE[1])  # head coordinates
    around = np.arctan2(local[0], local[2] + 0.9)
    wave = hair.curl * (3 + 5 * hair.curl) * np.sin(height * (7 + 11 * hair.curl) + 7 * around + seed)
    noise = texture("strand", around * 90 + wave + seed, height * 14 + seed)
    ends = bottom + 0.05 * noise + 0.10 * np.cos(3 * around)
    alpha = hit.alpha * smooth(ends - 0.03, ends + 0.05, height)
    canvas.put(hit.box, np.full(hit.shape, depth, np.float32), alpha, 13, inside)
    # Hair parts in front of the neck.
    apart = np.abs(local[0]) * radii[0] + 0.03 * noise + 0.10 * smooth(-0.9, -1.5, height)
    alpha = alpha * np.maximum(smooth(0.44, 0.52, apart), smooth(0.0, -0.3, local[2]))
    # Loose strands along the outline.
    rim = 1 - hit.normal[2] ** 2
    alpha = alpha * (1 - smooth(0.75, 1.0, rim) * smooth(-0.2, 1.4, noise) * 0.9)
    tangent = (axes[0, 1] * -1.0 + 0 * noise, axes[1, 1] * -1.0 + 0 * noise, axes[2, 1] * -1.0 + 0 * noise)
    dot = sum(t * n for t, n in zip(tangent, hit.normal))
    tangent = [t - dot * n for t, n in zip(tangent, hit.normal)]
    shine = highlight(tangent, towards, np.array((0, 0, 1.0))) * (0.7 + 0.3 * noise)
    colour = hair_colour(person, view)
    shade = (1 + 0.30 * noise) * (0.62 + 0.38 * smooth(0.0, 0.9, hit.normal[2]))
    fill = material(
        hit.shape, [c * shade for c in colour], hit.normal, 0.55 + 0.35 * hit.normal[2], 0.0, 0.0,
        np.maximum(shine, 0) * 0.5 * (0.02 + 0.9 * float(colour.mean())),
    )  # fmt: skip
    canvas.put(hit.box, hit.z, alpha, 13, fill, soft=0.05)
