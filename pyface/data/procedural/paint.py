"""The colours of the head: skin with its age and blemishes, eyes, brows, nostrils, lips, teeth, beard and hair."""

from __future__ import annotations

import math

import numpy as np

from pyface.data.procedural import hair as hairs
from pyface.data.procedural import head
from pyface.data.procedural.canvas import (
    ALBEDO,
    AMBIENT,
    CHANNELS,
    FLESH,
    GLOSS,
    NORMAL,
    SHEEN,
    Canvas,
    HeadHit,
    linear,
    texture,
)
from pyface.data.procedural.head import Measures, bump, clip, smooth
from pyface.data.procedural.parameters import Person, View

_TONES = (
    (0.94, 0.80, 0.73), (0.89, 0.73, 0.64), (0.82, 0.64, 0.53), (0.71, 0.53, 0.42), (0.56, 0.40, 0.31),
     (0.41, 0.29, 0.225), (0.29, 0.205, 0.165),
)  # fmt: skip
_LIPSTICKS = ((0.62, 0.10, 0.14), (0.70, 0.25, 0.30), (0.48, 0.08, 0.16), (0.72, 0.38, 0.36), (0.60, 0.16, 0.30))
EYE_RADIUS = 0.122


def skin_colour(person: Person) -> np.ndarray:
    """Linear colour [3] of the skin before anything is on it."""
    at = min(person.skin.tone, 0.9999) * (len(_TONES) - 1)
    share = at - int(at)
    colour = [a + share * (b - a) for a, b in zip(_TONES[int(at)], _TONES[int(at) + 1])]
    warm = 0.02 * person.skin.warmth
    return linear((colour[0] * (1 + 0.4 * warm), colour[1], colour[2] * (1 - 1.6 * warm)))


class _Paint:
    """Flat arrays over pixels of the head, and ways to put colour on them.

    ``x``, ``y``: face coordinates; ``out`` [CHANNELS, n]; ``ident`` [n]; ``pixel``: size of a pixel as a length.
    """

    def __init__(self, hit: HeadHit, x, y, out, ident, pixel: float):
        self.hit, self.x, self.y, self.out, self.ident, self.pixel = hit, x, y, out, ident, pixel
        self.at = None

    def front(self, inside) -> _Paint:
        """A copy of the pixels that are ``inside`` and on the front of the head; :meth:`put` brings it back."""
        return self.part(np.flatnonzero(inside & (self.hit.direction[2] > 0.05)))

    def part(self, at) -> _Paint:
        part = _Paint(self.hit, self.x[at], self.y[at], self.out.take(at, 1), self.ident[at], self.pixel)
        part.at = at
        return part

    def put(self, part: _Paint) -> None:
        for channel, value in zip(self.out, part.out):
            channel[part.at] = value
        self.ident[part.at] = part.ident

    def mix(self, colour, alpha, ident: int | None = None) -> None:
        """Lerp albedo to ``colour`` ([3] or [3, n])."""
        albedo, colour = self.out[ALBEDO], np.asarray(colour, np.float32)
        albedo += alpha * ((colour if colour.ndim == 2 else colour[:, None]) - albedo)
        if ident is not None:
            self.ident[alpha > 0.5] = ident

    def shade(self, factor) -> None:
        """Multiply albedo."""
        self.out[ALBEDO] *= factor

    def set(self, channel: int, value, alpha) -> None:
        """Lerp one channel of the material to ``value``."""
        old = self.out[channel]
        old += alpha * (value - old)


def paint_head(canvas: Canvas, hit: HeadHit, person: Person, view: View, m: Measures, axes, towards, eyes) -> None:
    """Put the head on the canvas.

    Args:
        axes: [3, 3] head axes in camera-aligned axes.
        towards: unit vector [3] to the key light, camera-aligned.
        eyes: [2, 3] from :func:`~pyface.data.procedural.head.landmarks`.
    """
    if not len(hit.z):
        return
    count = len(hit.z)
    out, ident = np.zeros((CHANNELS, count), np.float32), np.ones(count, np.uint8)
    paint = _Paint(hit, hit.x, hit.y, out, ident, 1.0 / canvas.unit)
    turn = axes.astype(np.float32)[:, :, None]
    normal = turn[:, 0] * hit.cells[0] + turn[:, 1] * hit.cells[1] + turn[:, 2] * hit.cells[2]
    paint.out[NORMAL] = normal / head.length(*normal)
    paint.out[AMBIENT] = hit.cells[3]
    _skin(paint, person, view, m)
    _age(paint, person, m)
    _nostrils(paint, m)
    _lips(paint, person, m)
    _eyes(paint, person, view, m, axes, towards, eyes)
    _brows(paint, person, view, m)
    _beard(paint, person, view, m)
    to_head = (towards @ axes).astype(np.float32)
    _hair(paint, person, view, m, to_head, axes)
    _worn(paint, person, view)
    taken = canvas.put((hit.rows, hit.columns), hit.z, hit.alpha, 1, paint.out, soft=0.04)
    seen = taken > 0.5
    canvas.ident[hit.rows[seen], hit.columns[seen]] = paint.ident[seen]


def _skin(paint: _Paint, person: Person, view: View, m: Measures) -> None:
    x, y = paint.hit.x, paint.hit.y
    skin, side, seed = person.skin, np.abs(x), float(person.seed % 997)
    base = skin_colour(person)
    light = 1 - skin.tone
    terms = head.quadratic(side, y)
    red = head.bumps(terms, (
        (0.55 * (1 + 0.5 * skin.blush + 0.9 * (m.makeup > 0.7)), 0.40, -0.30, 0.20, 0.18),
        (0.55, 0, m.nose_tip, 0.13, 0.10),
        (0.25, 0, m.chin_y, 0.2, 0.12),
    ))  # fmt: skip
    dark = head.bumps(terms, (
        (0.10 * (1 + m.old), m.eye_x - 0.03, m.eye_y - 0.085, 0.13, 0.045),
        (0.07, m.eye_x, m.eye_y + 0.03, 0.17, 0.06),
        (0.10, 0.14, 0.02, 0.05, 0.07),
        (-0.05, 0, 0.42, 0.35, 0.2),
    ))  # fmt: skip
    oily = head.bumps(terms, (
        (1.0, 0, 0.40, 0.35, 0.18),
        (1.0, 0, m.nose_tip, 0.09, 0.12),
        (0.6, 0, 0.02, 0.06, 0.2),
        (0.5, 0.40, -0.16, 0.14, 0.10),
        (0.4, 0, m.chin_y, 0.12, 0.1),
    ))  # fmt: skip
    red += 0.10 * texture("cloud", x * 60 + seed, y * 60)
    dark += (0.018 + 0.010 * skin.roughness) * texture("mottle", x * 150 + seed, y * 150)
    dark += 0.022 * texture("grain", x * 260, y * 260 + seed) * min(1.0, 0.012 / paint.pixel)
    if m.man > 0.5 and m.age > 16:  # the shadow of a shaven beard
        dark += 0.07 * light * hairs.beard_density("full", m, x, y)
    shade = clip(1 - dark, 0.2, 1.3)
    strength = 0.34 * (0.35 + 0.65 * light)
    paint.out[0] = base[0] * shade * (1 + 0.10 * strength * red)
    paint.out[1] = base[1] * shade * (1 - 0.85 * strength * red)
    paint.out[2] = base[2] * shade * (1 - 0.75 * strength * red)
    if skin.freckles > 0:
        freckles = smooth(1.1, 2.0, texture("mottle", x * 330 + seed, y * 330)) * bump(x, y + 0.22, 0.48, 0.28)
        paint.mix(base * (0.55, 0.40, 0.33), 0.75 * skin.freckles * freckles)
    paint.out[FLESH] = 1.0
    paint.out[GLOSS] = 0.22 + 0.30 * np.minimum(oily, 1) * (1 + 0.3 * skin.roughness) + 0.05 * skin.tone
    if skin.moles:
        rng = np.random.default_rng(skin.moles)
        for _ in range(int(rng.integers(1, 5))):
            cx, cy = rng.uniform(-0.55, 0.55), rng.uniform(-0.9, 0.45)
            radius = rng.uniform(0.006, 0.014)
            part = paint.front((np.abs(x - cx) < 0.06) & (np.abs(y - cy) < 0.06))
            away = head.length(part.x - cx, part.y - cy)
            spot = smooth(radius + 0.5 * paint.pixel, radius - 0.5 * paint.pixel, away)
            part.mix(base * (0.38, 0.28, 0.25), 0.65 * spot)
            paint.put(part)


def _age(paint: _Paint, person: Person, m: Measures) -> None:
    """Wrinkles and folds: dark lines with a lit edge, by bending the normal and darkening."""
    x, y, side = paint.hit.x, paint.hit.y, np.abs(paint.hit.x)
    cheer = max(m.smile, 0.0)
    lines = np.zeros_like(x)
    at = np.flatnonzero((side < m.mouth_width + 0.2) & (np.abs(y - 0.5 * (m.nose_base + m.mouth_y)) < 0.3))
    lines[at] = (0.08 + 0.42 * m.old + 0.28 * cheer * (1 - 0.6 * m.child)) * head._fold(m, side[at], y[at])
    crow = max(m.old - 0.1, 0) + 0.35 * cheer * (m.age > 28)
    if crow > 0.05:
        u, v = side - m.eye_x - m.eye_width - 0.02, y - m.eye_y - 0.01
        angle = v / (np.abs(u) + 0.05)
        lines += 0.45 * crow * np.maximum(np.cos(9 * angle), 0) ** 3 * bump(u - 0.06, v, 0.055, 0.09) * (u > 0)
    furrow = 0.55 * max(m.old - 0.08, 0) + 0.35 * m.raised * (m.age > 22)
    if furrow > 0.05:
        wave = y + 0.03 * x * x - 0.012 * texture("cloud", x * 30 + person.seed % 211, y * 0 + 5)
        strokes = np.maximum(np.cos((wave - 0.31) * (2 * math.pi / 0.085)), 0) ** 6
        lines += furrow * strokes * bump(x, y - 0.39, 0.40, 0.13) ** 1
    if m.old > 0.1 or m.frown > 0.2:
        lines += (0.5 * m.old + 0.4 * m.frown) * bump(side - 0.045, y - 0.14, 0.014, 0.07)
    if m.old > 0.15:
        lines += 0.25 * m.old * bump(side - m.mouth_width - 0.03 - 0.1 * (m.mouth_y - y), y - m.mouth_y + 0.12,
                                    0.022, 0.10)  # fmt: skip
        lines += 0.5 * m.old * bump(side - m.eye_x + 0.02, y + 0.135 - 0.25 * (side - m.eye_x) ** 2, 0.13, 0.013)
        blotch = texture("mottle", x * 90 + person.seed % 89, y * 90)
        lines += 0.18 * m.old * smooth(0.8, 2.2, blotch) * (1 - person.skin.tone)
    at = np.flatnonzero(lines > 1e-3)
    shade = np.minimum(lines[at], 0.8)
    for c, share in enumerate((0.30, 0.40, 0.42)):
        paint.out[c, at] *= 1 - share * shade


def _nostrils(paint: _Paint, m: Measures) -> None:
    x, y = paint.hit.x, paint.hit.y
    part = paint.front((np.abs(x) < m.nose_wing + 0.08) & (y < m.nose_tip + 0.12) & (y > m.nose_base - 0.06))
    side, y = np.abs(part.x), part.y
    flesh = part.out[ALBEDO].mean(1) if len(y) else np.ones(3)
    u, v = side - 0.47 * m.nose_wing, y - m.nose_base - 0.026 - 0.12 * (side - 0.47 * m.nose_wing)
    hole = smooth(1.25, 0.6, head.length(u / (0.32 * m.nose_wing), v / 0.022))
    part.mix(flesh * (0.16, 0.09, 0.08), 0.88 * hole)
    u, v = side - 0.80 * m.nose_wing, y - m.nose_base - 0.062
    ring = head.length(u / 0.064, v / 0.066)
    crease = np.exp(-(((ring - 1) / 0.16) ** 2)) * smooth(-0.01, 0.03, u + 0.25 * np.abs(v))
    crease = np.maximum(crease, 0.5 * bump(side, y - m.nose_base + 0.012, 0.6 * m.nose_wing, 0.012))
    shade = 1 - 0.42 * crease
    for c, extra in enumerate((0.0, 0.06, 0.07)):
        part.out[c] *= shade - extra * crease
    paint.put(part)
    # The region of the nose: bridge, tip and wings.
    at = np.flatnonzero((np.abs(x) < m.nose_wing + 0.02) & (paint.y < 0.07) & (paint.y > m.nose_base - 0.02))
    side, y = np.abs(x[at]), paint.y[at]
    t = clip((m.nose_root - y) * (1 / (m.nose_root - m.nose_tip)), 0, 1)
    edge = 0.065 + (m.nose_wing + 0.012 - 0.065) * t**1.6
    inside = (side < edge) & (y > m.nose_base - 0.012 + 0.35 * np.maximum(side - 0.08, 0))
    paint.ident[at[inside & (paint.hit.direction[2, at] > 0.05)]] = 2


def _lips(paint: _Paint, person: Person, m: Measures) -> None:
    x, y, pixel = paint.hit.x, paint.hit.y, paint.pixel
    reach = m.gap_down + 0.16
    part = paint.front((np.abs(x) < 1.12 * m.mouth_width) & (np.abs(y - m.mouth_y) < reach + abs(m.corner)))
    if not len(part.x):
        return
    a, y = part.x / m.mouth_width, part.y
    inside = clip((1 - np.abs(a)) * (m.mouth_width / pixel) + 0.5, 0, 1)
    top, upper, lower, bottom = head.lip_lines(m, clip(a, -1, 1))
    width = max(pixel, 0.012)

    def between(high, low):
        return clip(np.minimum(high - y, y - low) / width + 0.5, 0, 1) * inside

    lips_upper, mouth, lips_lower = between(top, upper), between(upper, lower), between(lower, bottom)
    part.ident[lips_upper > 0.45] = 11
    part.ident[lips_lower > 0.45] = 12
    # Colour: the skin's own, redder; or a lipstick's.
    base = skin_colour(person)
    tone = person.skin.tone
    natural = base * np.array((0.86, 0.52, 0.54)) + np.array((0.02, 0.0, 0.004))
    natural = natural * (1 + np.array((0.05, -0.09, -0.07)) * (person.lips.redness + 0.25) * (1 - 0.5 * tone))
    stick = linear(_LIPSTICKS[person.seed % len(_LIPSTICKS)]) * (1 - 0.35 * tone)
    amount = 0.85 * smooth(0.15, 0.7, np.float32(m.makeup))
    colour = (1 - amount) * natural + amount * stick
    lip = np.maximum(lips_upper, lips_lower)
    grain = 1 + 0.05 * texture("strand", a * 60 + person.seed % 31, y * 40)
    tint = colour[:, None] * (np.where(lips_upper > lips_lower, np.float32(0.76), np.float32(1)) * grain)
    part.mix(tint, 0.88 * lip)
    part.set(GLOSS, 0.42 + 0.3 * m.makeup, lip)
    if mouth.max() > 0.01 and m.gap_down + m.gap_up > 0.012:
        _inner_mouth(part, m, a, y, upper, lower, mouth)
    # The line between closed lips, and the corners.
    seam = np.exp(-(((y - 0.5 * (upper + lower)) / (0.011 + 0.35 * pixel)) ** 2)) * smooth(1.08, 0.95, np.abs(a))
    seam = seam * (1 - mouth * smooth(0.012, 0.03, np.float32(m.gap_down)))
    part.shade(1 - (0.78 - 0.15 * tone) * seam)
    corner = bump(np.abs(a) - 1.0, (y - m.mouth_y - m.corner) / m.mouth_width, 0.09, 0.09)
    part.shade(1 - 0.40 * corner)
    shadow = bump(a, (y - bottom + 0.028) / 0.03, 0.6, 1.0) * (1 - lip)
    part.shade(1 - 0.16 * shadow)
    paint.put(part)


def _inner_mouth(paint: _Paint, m: Measures, a, y, upper, lower, mouth) -> None:
    depth = upper - y
    dark = np.array((0.055, 0.012, 0.012))
    paint.mix(dark, mouth)
    paint.ident[mouth > 0.5] = 10
    # Tongue, then both rows of teeth; the upper row hangs from the skull, the lower row moves with the jaw.
    tongue = smooth(0.05, 0.0, y - lower - 0.03) * smooth(0.75, 0.3, np.abs(a)) * float(smooth(0.05, 0.1, m.gap_down))
    paint.mix((0.28, 0.09, 0.09), 0.8 * tongue * mouth)
    edge = m.mouth_y - 0.052 + 0.045 * a * a
    row = smooth(edge - 0.6 * paint.pixel, edge + 0.6 * paint.pixel, y) * smooth(0.98, 0.80, np.abs(a))
    gaps = 1 - 0.14 * np.maximum(np.cos(a * (m.mouth_width * 2 * math.pi / 0.075) + math.pi), 0) ** 8 * min(
        1.0, 0.015 / paint.pixel)  # fmt: skip
    light = (0.45 + 0.55 * smooth(0.0, 0.03, depth)) * (1 - 0.62 * np.abs(a) ** 2.2) * gaps
    paint.mix(np.outer((0.56, 0.51, 0.45), light), row * mouth)
    under = m.mouth_y - m.gap_down + 0.022
    row = smooth(under + 0.6 * paint.pixel, under - 0.6 * paint.pixel, y) * smooth(0.75, 0.55, np.abs(a))
    paint.mix((0.279, 0.2475, 0.216), 0.8 * row * mouth * (m.gap_down > 0.09))
    paint.set(AMBIENT, 0.85, mouth)
    paint.set(GLOSS, 0.35, mouth)


def _eyes(paint: _Paint, person: Person, view: View, m: Measures, axes, towards, skin) -> None:
    """Both eyes; ``skin`` [2, 3] is the skin over them."""
    hit, pixel = paint.hit, paint.pixel
    part = paint.front((np.abs(np.abs(hit.x) - m.eye_x) < 0.30) & (np.abs(hit.y - m.eye_y) < 0.19))
    if not len(part.x):
        return
    right = part.x > 0
    side = np.where(right, np.float32(1), np.float32(-1))
    a, b = head.eye_frame(m, side, part.x, part.y)
    inside = clip(a, -1, 1)
    up, low = head.lids(m, inside)
    soft = max(pixel, 0.008)
    opening = clip(np.minimum(up - b, b - low) / soft + 0.5, 0, 1)
    opening = opening * clip((1 - np.abs(a)) * m.eye_width / soft + 0.5, 0, 1)
    if m.lid_up + m.lid_down < 0.012:
        opening = opening * 0
    base = skin_colour(person)
    arch = np.maximum(1 - inside * inside, 0)
    # Lid above the opening: crease, shadow, eye shadow.
    full_up = m.lid_full * arch * (1.06 - 0.18 * inside)
    if m.crease > 0:
        line = np.maximum(full_up, up) + m.crease * (0.35 + 0.65 * arch)
        crease = np.exp(-(((b - line) / (0.009 + 0.25 * pixel)) ** 2)) * smooth(1.12, 0.8, np.abs(a))
        part.shade(1 - 0.34 * crease)
    if m.makeup > 0.25:
        lid = smooth(up - 0.01, up + 0.01, b) * smooth(full_up + 0.10, full_up + 0.02, b) * smooth(1.2, 0.8, np.abs(a))
        hue = ((0.45, 0.32, 0.28), (0.35, 0.28, 0.36), (0.28, 0.30, 0.38))[person.seed % 3]
        part.mix(base * np.array(hue) * 1.1, 0.45 * m.makeup * lid)
    # The eyeball.
    centre = ((skin - (0, 0, EYE_RADIUS - 0.006)) @ axes.T).astype(np.float32)
    world = axes.astype(np.float32) @ hit.point.take(part.at, 1)
    n = (world[:2] - np.where(right, centre[1, :2, None], centre[0, :2, None])) * np.float32(1 / EYE_RADIUS)
    n *= np.minimum(1, 0.985 / (head.length(n[0], n[1]) + 1e-6))
    nz = np.sqrt(1 - n[0] * n[0] - n[1] * n[1])
    g = head.gaze_direction(view.gaze)
    c = n[0] * float(g[0]) + n[1] * float(g[1]) + nz * float(g[2])
    angle = np.sqrt(np.maximum(2 * (1 - c), 0))
    width = pixel / EYE_RADIUS
    iris = smooth(0.485 + 0.55 * width, 0.485 - 0.55 * width, angle)
    pupil = smooth(0.185 + 0.6 * width, 0.185 - 0.6 * width, angle)
    lid_shadow = 0.42 + 0.58 * smooth(-0.006, 0.040, up - b)
    white = (0.55 - 0.34 * person.skin.tone) * (0.72 + 0.28 * smooth(1.05, 0.55, np.abs(a))) * lid_shadow
    pink = smooth(0.7, 1.0, np.abs(a)) + 0.12
    ball = [white * (1 - 0.02 * pink), white * (0.965 - 0.20 * pink), white * (0.94 - 0.20 * pink)]
    colour = linear(person.eyes.iris) * (1 - 0.5 * person.skin.tone)
    fibre = 1 + 0.22 * texture("strand", np.arctan2(n[1] - float(g[1]), n[0] - float(g[0])) * 40, angle * 20)
    ring = smooth(0.47, 0.36, angle)
    glow = (0.35 + 0.65 * ring) * (0.9 + 0.55 * smooth(0.3, -0.3, n[1] - float(g[1])) * ring) * fibre * lid_shadow
    ball = [v + iris * (k * glow - v) for v, k in zip(ball, colour)]
    ball = [v + pupil * (0.004 - v) for v in ball]
    part.mix(ball, opening)
    np.copyto(part.ident, np.where(right, np.uint8(5), np.uint8(4)), where=opening > 0.45)
    for channel, value in zip((3, 4, 5), (n[0], n[1], nz)):
        part.set(channel, value, 0.75 * opening)
    part.set(FLESH, 0.25, opening)
    part.set(GLOSS, 0.15, opening)
    part.set(AMBIENT, 0.82 * lid_shadow + 0.1, opening)
    # The light's reflection on the cornea.
    half = towards + (0, 0, 1)
    spot = 0.55 * half / math.sqrt(float(half @ half)) + 0.45 * g
    d = head.length(n[0] - float(spot[0]), n[1] - float(spot[1]))
    size = 0.07 + 0.06 * view.light.softness
    catch = smooth(size + 0.6 * width, size - 0.6 * width, d) * (size / (size + 0.4 * width)) ** 2
    window = 0.25 * smooth(0.16 + width, 0.10, head.length(n[0] - float(g[0]) + 0.2, n[1] - float(g[1]) + 0.12))
    part.set(SHEEN, 0.75 - 0.3 * person.skin.tone, opening * np.maximum(catch, window * 0.4))
    # Edge of the upper lid with its lashes, and the lower lid's wet rim.
    thick = 0.010 + 0.006 * (1 - m.man) + 0.010 * m.makeup
    beyond = clip((1.10 + 0.06 * m.makeup - np.abs(a)) * 8, 0, 1) * np.where(a > 0, 1.0, smooth(-1.08, -0.9, a))
    edge = np.where(a > 1, (a - 1) * 0.10, up)
    lash = np.exp(-(((b - edge - 0.35 * thick) / (thick + 0.25 * pixel)) ** 2)) * beyond
    dark = np.array((0.018, 0.013, 0.012)) * (1 + 2 * (person.hair.colour[0] > 0.5) * (1 - m.makeup))
    part.mix(dark, clip((0.74 + 0.2 * m.makeup) * lash, 0, 1))
    if m.man < 0.5 and m.age > 12:
        comb = np.maximum(np.cos(a * 34 + 2 * b / m.lid_full), 0) * (b > edge)
        wing = np.exp(-np.maximum(b - edge, 0) / (0.012 + 0.02 * m.makeup + 0.012 * clip(a, 0, 1))) * beyond
        part.mix(dark, 0.55 * comb * wing * smooth(-0.6, 0.5, a) * min(1.0, 0.02 / pixel))
    rim = np.exp(-(((b - low + 0.004) / (0.007 + 0.2 * pixel)) ** 2)) * smooth(1.05, 0.85, np.abs(a))
    part.mix(base * (0.80, 0.55, 0.52), 0.45 * rim)
    below = np.exp(-(((b - low + 0.016) / 0.008) ** 2)) * smooth(1.0, 0.7, np.abs(a))
    part.shade(1 - (0.16 + 0.30 * m.makeup) * below)
    tear = bump(a + 0.97, b + 0.002, 0.09, 0.02)
    part.mix(base * (0.85, 0.50, 0.48), 0.7 * tear)
    paint.put(part)


def _brows(paint: _Paint, person: Person, view: View, m: Measures) -> None:
    away = np.abs(paint.x)
    near = (away > m.brow_in - 0.06) & (away < m.brow_out + 0.05) & (np.abs(paint.y - m.brow_y - 0.02) < 0.16)
    part = paint.front(near)
    if not len(part.x):
        return
    right = part.x > 0
    x, y = np.abs(part.x), part.y
    t = (x - m.brow_in) / (m.brow_out - m.brow_in)
    v = y - head.brow_line(m, clip(t, 0, 1))
    thick = m.brow_thick * (0.42 + 0.58 * smooth(-0.05, 0.22, t)) * (1 - 0.72 * smooth(0.45, 1.02, t))
    noise = texture("strand", (x * 0.8 - v * (0.4 + 1.8 * t)) * 190 + person.seed % 173 + 57 * right, v * 30 + 40 * x)
    dense = smooth(1.25, 0.45, np.abs(v) / thick + 0.14 * noise)
    dense = dense * smooth(-0.06, 0.10, t + 0.03 * noise) * smooth(1.05, 0.88, t)
    colour = hairs.hair_colour(person, view)
    darkness = 0.75 if person.hair.colour[0] < 0.5 else 0.42
    colour = colour * darkness + 0.1 * skin_colour(person) * (1 - person.skin.tone)
    strength = (0.80 + 0.12 * person.brows.thickness) * (1 - 0.25 * m.child) * (0.92 + 0.10 * noise)
    alpha = clip(strength * dense, 0, 0.95)
    part.mix(colour, alpha)
    np.copyto(part.ident, np.where(right, np.uint8(7), np.uint8(6)), where=dense > 0.4)
    part.set(GLOSS, 0.08, alpha)
    paint.put(part)


def _beard(paint: _Paint, person: Person, view: View, m: Measures) -> None:
    if m.beard <= 0.02:
        return
    hit, pixel = paint.hit, paint.pixel
    part = paint.front((hit.y < 0.15) & (paint.ident != 10) & (paint.ident != 11) & (paint.ident != 12))
    x, y = part.x, part.y
    style = person.beard.style
    density = hairs.beard_density(style, m, x, y)
    shift = float(person.seed % 509)
    bend = 0.9 * x
    noise = 0.8 * texture("strand", (x + bend * (y + 0.3)) * 210 + shift, y * 60 + 20 * x + shift)
    fade = min(1.0, 0.016 / pixel)
    colour = hairs.hair_colour(person, view) * (0.85, 0.78, 0.75)
    if style == "stubble":
        dots = texture("grain", x * 330 + shift, y * 330)
        alpha = density * (0.34 + 0.2 * m.beard) * clip(1 + 0.4 * dots * fade, 0, 1.6)
        colour = 0.75 * colour + 0.12 * skin_colour(person) * (0.75, 0.85, 1.0)
    else:
        grow = smooth(0.04, 0.55 + 0.15 * (1 - m.beard), density * (1 + 0.22 * noise * fade) + 0.05 * noise * fade)
        alpha = grow * (0.62 + 0.36 * m.beard)
        colour = np.outer(colour, 1 + 0.18 * noise * fade)
    part.mix(colour, clip(alpha, 0, 0.97))
    part.set(GLOSS, 0.06, alpha)
    part.set(FLESH, 0.3, alpha)
    paint.put(part)


def _hair(paint: _Paint, person: Person, view: View, m: Measures, to_head, axes) -> None:
    hair, hit = person.hair, paint.hit
    if hair.style == "bald":
        return
    margin = hit.cells[4]
    at = np.flatnonzero(margin > -0.25)
    if not len(at):
        return
    part, direction, margin = paint.part(at), hit.direction.take(at, 1), margin[at]
    point = hit.point.take(at, 1)
    noise, tangent = hairs.strands(person, direction, point, part.x, paint.pixel, hair.style, view.bangs)
    edge, rough = {"buzz": (0.10, 0.03), "afro": (0.03, 0.008), "short": (0.06, 0.045)}.get(hair.style, (0.05, 0.035))
    front = smooth(0.2, 0.6, direction[2])
    fringe = 0.03 * front if view.bangs else 0.0
    alpha = smooth(-edge, edge, margin - 0.01 + (rough + fringe) * noise)
    if hair.style == "buzz":
        alpha = alpha * (0.72 + 0.1 * clip(noise, -1, 1))
    if hair.recession > 0.75 and m.man > 0.5:
        alpha = alpha * (1 - 0.55 * (hair.recession - 0.5) * smooth(0.6, 0.9, direction[1]))
    if hair.style in ("parted", "bob", "long", "tied"):
        line = 0.30 * hair.part + 0.01 * noise
        parting = np.exp(-(((direction[0] - line) / 0.016) ** 2)) * smooth(0.0, 0.2, margin)
        alpha = alpha * (1 - 0.55 * parting * smooth(-0.1, 0.3, direction[2]))
    colour = hairs.hair_colour(person, view)
    depth = 0.62 + 0.38 * smooth(0.0, 0.25, margin)
    shade = clip(1 + 0.32 * noise, 0.25, 2) * depth
    # Just outside the hairline, hair shades the skin.
    part.shade(1 - 0.28 * smooth(-0.16, 0.0, margin) * (hair.style != "buzz"))
    part.mix(np.outer(colour, shade), alpha, 13)
    matte = {"afro": 0.15, "buzz": 0.3}.get(hair.style, 1.0) * (1 - 0.5 * hair.curl)
    normal = hit.cells[:3].take(at, 1)
    dot = (tangent * normal).sum(0)
    shine = hairs.highlight(tangent - dot * normal, to_head, axes[2].astype(np.float32))
    part.set(GLOSS, 0.02, alpha)
    part.set(FLESH, 0.1, alpha)
    glow = 0.02 + 0.9 * float(colour.mean())
    part.set(SHEEN, 0.5 * glow * matte * shine * clip(0.75 + 0.5 * noise, 0, 2.5), alpha)
    paint.put(part)


def _worn(paint: _Paint, person: Person, view: View) -> None:
    """Hat and mask: they are part of the surface, here they get their colour."""
    hit, soft = paint.hit, max(paint.pixel, 0.01)
    if view.hat != "none":
        at = np.flatnonzero(hit.cells[5] > -0.1)
        part, margin, d = paint.part(at), hit.cells[5, at], hit.direction.take(at, 1)
        alpha = clip(margin / soft + 0.5, 0, 1)
        colour = linear(view.clothes.accent)
        if view.hat == "beanie":
            ribs = np.cos(np.arctan2(d[0], d[2]) * 56) * min(1.0, 0.02 / paint.pixel)
            knit = 1 + 0.16 * ribs + 0.05 * texture("grain", d[0] * 300, d[1] * 300)
            knit = knit * (1 - 0.35 * np.exp(-(((margin - 0.19) / 0.02) ** 2)))
        else:
            turn = np.arctan2(d[0], d[2])
            seams = np.maximum(np.cos(turn * 3 + math.pi), 0) ** 40
            knit = 1 - 0.2 * seams + 0.03 * texture("grain", d[0] * 250, d[1] * 250)
        part.shade(1 - 0.4 * smooth(-0.1, 0.0, margin))
        part.mix(np.outer(colour, knit), alpha, 14)
        for channel, value in ((GLOSS, 0.06), (FLESH, 0.0), (SHEEN, 0.0)):
            part.set(channel, value, alpha)
        paint.put(part)
    if view.occluder == "mask":
        part = paint.front(hit.cells[6] > -0.05)
        margin, y = hit.cells[6, part.at], part.y
        alpha = clip(margin / soft + 0.5, 0, 1)
        shades = ((0.42, 0.62, 0.78), (0.80, 0.82, 0.84), (0.10, 0.10, 0.12))
        colour = linear(shades[view.occluder_seed % 3])
        folds = np.cos((y + 0.62) * (2 * math.pi / 0.12))
        pleat = 1 - 0.16 * np.maximum(folds, 0) ** 3 * smooth(0.05, 0.15, margin)
        pleat = pleat * (1 - 0.18 * np.exp(-(((margin - 0.035) / 0.012) ** 2)))
        pleat = pleat * (1 + 0.03 * texture("grain", part.x * 300, y * 300))
        part.mix(np.outer(colour, pleat), alpha, 19)
        for channel, value in ((GLOSS, 0.08), (FLESH, 0.0), (SHEEN, 0.0)):
            part.set(channel, value, alpha)
        part.set(AMBIENT, 0.95, alpha)
        paint.put(part)
