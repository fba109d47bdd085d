"""The head as one surface: a radius for every direction, deformed by the person's features and the view's expression.

Head axes: x to the picture's right in a frontal view, y up, z forward; unit 10 cm; the pupils lie near y = 0. The
surface is star-shaped around :data:`CENTRE`, so it is known by its radius over the sphere of directions. The radius is
tabulated on a chart (Lambert's azimuthal projection from the front, stretched towards its middle), which every pixel
samples. Features are placed in *face coordinates*, the stereographic projection of the direction scaled so that they
agree with head coordinates near the middle of the face: conformal, closed-form both ways, and attached to the skin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy import ndimage

from pyface.data.procedural.parameters import Person, View, beard_amount, effective_age, makeup_amount

CENTRE = (0.0, -0.2, 0.0)
CHART = 104
_STRETCH = 0.65
_FACE = 1.6  # face coordinates per unit of the stereographic projection


def rotation(pose: tuple[float, float, float]) -> np.ndarray:
    """float64 [3, 3]: head axes -> camera-aligned axes (x right, y up, z to the camera); pose as in ``parameters``."""
    pitch, yaw, roll = pose
    cp, sp, cy, sy, cr, sr = (f(a) for a in (pitch, yaw, roll) for f in (math.cos, math.sin))
    turn = np.array(((cy, 0, -sy), (0, 1, 0), (sy, 0, cy)))
    nod = np.array(((1, 0, 0), (0, cp, sp), (0, -sp, cp)))
    tilt = np.array(((cr, sr, 0), (-sr, cr, 0), (0, 0, 1)))
    return tilt @ turn @ nod


def gaze_direction(gaze: tuple[float, float]) -> np.ndarray:
    """Unit vector [3] of a (pitch, yaw) gaze in camera-aligned axes (x right, y up, z to the camera)."""
    pitch, yaw = gaze
    return np.array((-math.cos(pitch) * math.sin(yaw), math.sin(pitch), math.cos(pitch) * math.cos(yaw)))


def smooth(low: float, high: float, x):
    """Hermite step from 0 at ``low`` to 1 at ``high`` (either may be the larger)."""
    t = np.minimum(np.maximum((x - low) * (1.0 / (high - low)), 0), 1)
    square = t * t
    t *= -2
    t += 3
    t *= square
    return t


def clip(x, low: float, high: float):
    """``numpy.clip`` without its overhead, which small arrays feel."""
    return np.minimum(np.maximum(x, low), high)


def length(*parts):
    """Euclidean; ``numpy.hypot`` guards against overflow, which takes five times as long."""
    return np.sqrt(sum((part * part for part in parts[1:]), parts[0] * parts[0]))


def bump(x, y, width: float, height: float):
    """exp(-(x / width)^2 - (y / height)^2)."""
    x, y = x * (1 / width), y * (1 / height)
    return np.exp(-(x * x + y * y))


def quadratic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Terms [5, n] of which the logarithm of any :func:`bump` over ``x`` and ``y`` [n] is a sum."""
    return np.stack((x * x, y * y, x, y, np.ones_like(x)))


def bumps(terms: np.ndarray, places) -> np.ndarray:
    """Weighted sum [n] of K bumps, many at the cost of a few.

    Args:
        terms: [5, n] from :func:`quadratic`.
        places: K times (weight, x, y, width, height).
    """
    weight, x, y, width, height = np.array(places, np.float64).T
    a, b = width**-2, height**-2
    log = np.stack((-a, -b, 2 * a * x, 2 * b * y, -a * x * x - b * y * y), 1).astype(np.float32)
    weight = weight.astype(np.float32)[:, None]
    out = np.empty(terms.shape[1], np.float32)
    block = 2048  # fits the cache, and is too little for BLAS to start threads
    for low in range(0, len(out), block):
        each = np.exp(log @ terms[:, low : low + block])
        each *= weight
        each.sum(0, out=out[low : low + block])
    return out


@dataclass(frozen=True)
class Measures:
    """A person under an expression, in lengths of face coordinates (10 cm) and plain shares."""

    age: float
    child: float
    """1 at 5 years to 0 at 15."""
    old: float
    """0 at 35 years to 1 at 80."""
    man: float
    eye_x: float
    eye_y: float
    eye_width: float
    lid_up: float
    lid_down: float
    lid_full: float
    eye_tilt: float
    crease: float
    brow_y: float
    brow_thick: float
    brow_arch: float
    brow_in: float
    brow_out: float
    frown: float
    nose_root: float
    nose_tip: float
    nose_base: float
    nose_height: float
    nose_bridge: float
    nose_wing: float
    mouth_y: float
    mouth_width: float
    corner: float
    gap_up: float
    gap_down: float
    lip_up: float
    lip_down: float
    bow: float
    jaw_drop: float
    chin_y: float
    smile: float
    raised: float
    beard: float
    makeup: float


def measure(person: Person, view: View) -> Measures:
    """Everything about the size and place of features that geometry and paint share."""
    age = effective_age(person, view)
    child = min(max((15 - age) / 10, 0.0), 1.0)
    old = min(max((age - 35) / 45, 0.0), 1.0)
    man = 1.0 - person.female
    nose, eyes, brows, lips, shape = person.nose, person.eyes, person.brows, person.lips, person.shape
    smile, opened = max(view.smile, -0.4), min(max(view.mouth_open, 0.0), 1.0)
    cheer = max(smile, 0.0)
    look = gaze_direction(view.gaze) @ rotation(view.pose)  # in head axes
    look_up = math.asin(min(max(look[1], -1.0), 1.0))
    open_share = min(max(view.eye_open, 0.0), 1.2)
    full = 0.065 * (1 + 0.13 * eyes.size + 0.16 * eyes.roundness + 0.16 * child - 0.16 * old)
    lid_up = full * open_share * (1 + 0.55 * min(max(look_up, -0.6), 0.4)) - 0.005 * cheer
    lid_down = 0.049 * (1 + 0.10 * eyes.size + 0.1 * child) - 0.012 * cheer - 0.012 * min(look_up, 0.2)
    if open_share < 0.15:
        lid_up = -lid_down
    mouth_y = -0.610 + 0.05 * child - 0.012 * old + 0.018 * lips.height - 0.02 * shape.height
    stretch = 1 + 0.17 * cheer - 0.12 * opened * (1 - cheer)
    gap = 0.19 * opened
    lip = (1 - 0.22 * cheer) * (1 - 0.3 * old)
    return Measures(
        age=age,
        child=child,
        old=old,
        man=man,
        eye_x=0.322 + 0.020 * eyes.spacing + 0.006 * shape.width,
        eye_y=-0.03 * child,
        eye_width=0.162 * (1 + 0.06 * eyes.size + 0.06 * child),
        lid_up=max(lid_up, -lid_down),
        lid_down=lid_down,
        lid_full=full,
        eye_tilt=0.05 + 0.07 * eyes.tilt - 0.05 * old,
        crease=0.0 if eyes.fold < -0.6 else 0.034 + 0.012 * eyes.fold - 0.008 * old,
        brow_y=0.186 + 0.024 * brows.height + 0.035 * view.brow_raise - 0.018 * old - 0.012 * child,
        brow_thick=0.036 * (1 + 0.32 * brows.thickness) * (1 - 0.25 * child),
        brow_arch=0.035 + 0.018 * brows.arch,
        brow_in=0.125 - 0.012 * max(-view.brow_raise, 0.0),
        brow_out=0.50 + 0.025 * brows.length,
        frown=max(-view.brow_raise, 0.0),
        nose_root=0.10,
        nose_tip=-0.275 - 0.036 * nose.length + 0.05 * child + 0.02 * nose.tip - 0.012 * old,
        nose_base=-0.385 - 0.033 * nose.length + 0.055 * child - 0.006 * nose.tip,
        nose_height=(0.225 + 0.035 * nose.depth + 0.02 * old) * (1 - 0.28 * child),
        nose_bridge=0.5 + 0.17 * nose.bridge - 0.15 * child,
        nose_wing=(0.150 + 0.025 * nose.width + 0.013 * man + 0.004 * cheer) * (1 - 0.12 * child),
        mouth_y=mouth_y,
        mouth_width=0.250 * (1 + 0.09 * lips.width) * (1 - 0.12 * child) * stretch,
        corner=0.060 * smile - 0.013 - 0.012 * old,
        gap_up=0.14 * gap + 0.018 * cheer * (opened > 0.05),
        gap_down=0.86 * gap,
        lip_up=0.056 * (1 + 0.30 * lips.upper) * lip,
        lip_down=0.072 * (1 + 0.28 * lips.lower) * lip,
        bow=0.26 + 0.15 * lips.bow,
        jaw_drop=0.17 * opened,
        chin_y=-0.90 + 0.05 * child - 0.03 * shape.height,
        smile=smile,
        raised=max(view.brow_raise, 0.0),
        beard=beard_amount(person, view),
        makeup=makeup_amount(person, view),
    )


# --- Coordinates ---


def to_face(direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions [3, ...] from the centre -> face coordinates (x, y)."""
    scale = _FACE / np.maximum(1 + direction[2], 0.05)
    return direction[0] * scale, direction[1] * scale + CENTRE[1]


def to_direction(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Face coordinates -> unit directions [3, ...]."""
    u, v = x / _FACE, (y - CENTRE[1]) / _FACE
    square = u * u + v * v
    return np.stack((2 * u, 2 * v, 1 - square)) / (1 + square)


def to_chart(direction: np.ndarray) -> np.ndarray:
    """Unit directions [3, n] -> float32 [n, 2]: column and row on the chart, from -1 to 1."""
    out = np.empty((direction.shape[1], 2), np.float32)
    back = np.maximum(1 + direction[2], 1e-7)
    scale = (1 + _STRETCH) / ((1 + _STRETCH - 0.5 * _STRETCH * back) * np.sqrt(2 * back))
    np.multiply(direction[0], scale, out=out[:, 0], casting="same_kind")
    np.multiply(direction[1], scale, out=out[:, 1], casting="same_kind")
    return out


def bilinear(maps: torch.Tensor, at: np.ndarray) -> np.ndarray:
    """Sample Tensor[1, K, H, W] at ``at`` [n, 2], (x, y) from -1 to 1 between the centres of the corners: [K, n].

    torch does it in one pass, numpy in ten.
    """
    grid = torch.from_numpy(at.reshape(1, 1, -1, 2))
    found = torch.nn.functional.grid_sample(maps, grid, padding_mode="border", align_corners=True)
    return found.numpy()[0, :, 0]


def sample(maps: torch.Tensor, direction: np.ndarray) -> np.ndarray:
    """Values [K, n] of charts Tensor[1, K, CHART, CHART] at unit directions [3, n]."""
    return bilinear(maps, to_chart(direction))


@cache
def chart_directions() -> np.ndarray:
    """float32 [3, CHART, CHART]: the direction of every chart cell; beyond the disc, the back."""
    axis = np.linspace(-1, 1, CHART)
    w = np.stack(np.meshgrid(axis, axis))
    radius = np.minimum(np.hypot(*w), 1.0)
    # w = r (1 + k) / (1 + k r^2)  <=>  k w r^2 - (1 + k) r + w = 0
    k = _STRETCH
    r = 2 * radius / ((1 + k) + np.sqrt(np.maximum((1 + k) ** 2 - 4 * k * radius**2, 0)))
    unit = w / np.maximum(np.hypot(*w), 1e-9)
    sine = 2 * r * np.sqrt(np.maximum(1 - r * r, 0))
    return np.stack((unit[0] * sine, unit[1] * sine, 1 - 2 * r * r)).astype(np.float32)


@cache
def _front() -> tuple[slice, slice, np.ndarray, np.ndarray, np.ndarray]:
    """The part of the chart's right half with features on it, its face coordinates, and their :func:`quadratic`."""
    direction = chart_directions()[..., CHART // 2 :]
    x, y = to_face(direction)
    inside = (np.abs(x) < 1.0) & (y > -1.3) & (y < 0.7) & (direction[2] > 0)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    block = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    x, y = x[block].copy(), y[block].copy()
    return *block, x, y, quadratic(x.ravel(), y.ravel())


# --- The skin's radius ---


def ellipsoid_radius(direction, centre, radii):
    """Distance from CENTRE to the far side of an ellipsoid, along each direction; past it, to the nearest point."""
    a = b = c = 0.0
    for axis in range(3):
        inverse = 1 / radii[axis] ** 2
        offset = centre[axis] - CENTRE[axis]
        scaled = direction[axis] * inverse
        a += direction[axis] * scaled
        if offset:
            b += offset * scaled
        c += offset**2 * inverse
    return (b + np.sqrt(np.maximum(b * b - a * (c - 1), 0))) / a


def _union(a, b, softness: float):
    """Maximum with a rounded edge."""
    edge = np.maximum(softness - np.abs(a - b), 0)
    return np.maximum(a, b) + edge * edge * (0.25 / softness)


def skull(person: Person, m: Measures, direction: np.ndarray) -> np.ndarray:
    """Radius of the head without features along unit directions [3, ...]."""
    s = person.shape
    wide = 1 + 0.045 * s.width
    tall = 0.03 * s.height
    full = s.fullness + 0.5 * m.child
    radius = ellipsoid_radius(
        direction, (0, 0.20 + 0.02 * s.forehead, -0.17), (0.755 * wide, 0.95 + 0.02 * s.forehead, 0.97)
    )
    face = (
        (0.635 + 0.022 * s.cheekbones + 0.03 * full) * wide,
        0.74 + tall - 0.04 * m.child,
        0.74,
    )
    radius = _union(radius, ellipsoid_radius(direction, (0, -0.19, 0.07), face), 0.16)
    jaw = (
        (0.44 + 0.07 * s.jaw + 0.035 * full) * wide,
        0.42 + 0.03 * s.chin + 0.5 * tall + 0.42 * m.jaw_drop - 0.05 * m.child,
        0.54 + 0.02 * s.chin,
    )
    return _union(radius, ellipsoid_radius(direction, (0, -0.58 - 0.5 * m.jaw_drop, 0.20), jaw), 0.30)


def _relief(person: Person, m: Measures) -> np.ndarray:
    """What the features add to the radius, over the block of :func:`_front`."""
    s = person.shape
    side, y, terms = _front()[2:]
    tip, root, my = m.nose_tip, m.nose_root, m.mouth_y
    cheer = max(m.smile, 0.0)
    places = (
        # brow ridge, sockets, lids, bags
        (0.022 + 0.024 * m.man * (1 - m.child), 0.24, 0.15, 0.25, 0.075),
        (-0.072 - 0.02 * m.old, m.eye_x - 0.02, 0.035, 0.17, 0.085),
        (-0.045, 0.155, 0.03, 0.06, 0.075),
        (0.050, m.eye_x, m.eye_y + 0.004, 0.115, 0.06),
        (0.018 * m.old, m.eye_x - 0.01, -0.115, 0.12, 0.035),
        # tip and wings of the nose
        (0.045, 0, tip, 0.095, 0.075),
        (0.085, 0.80 * m.nose_wing, m.nose_base + 0.062, 0.058, 0.052),
        # the arch of the teeth, philtrum, chin, corners of the mouth
        (0.035, 0, my + 0.02, 0.30, 0.24),
        (-0.018, 0, my + 0.125, 0.035, 0.06),
        (0.045 + 0.02 * s.chin, 0, m.chin_y - 0.8 * m.jaw_drop, 0.16 + 0.03 * m.man, 0.12),
        (-0.016, m.mouth_width + 0.035, my + m.corner, 0.05, 0.06),
        # cheeks, jowls, temples, angles of the jaw
        (0.03 + 0.015 * s.cheekbones, 0.46, -0.17, 0.17, 0.12),
        (0.035 * cheer + 0.012 * s.fullness + 0.02 * m.child, 0.37, -0.33, 0.14, 0.13),
        (-0.02 + 0.02 * s.fullness - 0.015 * m.old, 0.46, -0.5, 0.13, 0.17),
        (0.03 * m.old, 0.40, -0.86, 0.12, 0.10),
        (-0.02, 0.62, 0.28, 0.14, 0.2),
        (0.012 + 0.02 * max(s.jaw, 0.0), 0.74, -0.60, 0.22, 0.28),
    )
    out = bumps(terms, places).reshape(y.shape)
    # nose: a bridge that rises to the tip and falls steeply to the base
    along = clip((root - y) * (1 / (root - tip)), 0, 1)
    rise = m.nose_height * (along * (m.nose_bridge + (1 - m.nose_bridge) * along))
    fall = np.minimum(y - tip, 0) * (1 / (1.15 * (tip - m.nose_base)))
    across = side / (0.062 + (0.002 + 0.25 * m.nose_wing) * along)
    out += rise * np.exp(-(fall * fall + across * across)) * smooth(root + 0.02, root - 0.09, y)
    # lips and the groove below them
    square = (side * (1 / m.mouth_width)) ** 2
    arch = np.exp(-((square * (1 / 0.82**2)) ** 2))
    height = y - my - m.corner * square
    up = (height - m.gap_up - 0.45 * m.lip_up) * (1 / (0.75 * m.lip_up))
    low = (height + m.gap_down + 0.5 * m.lip_down) * (1 / (0.72 * m.lip_down))
    out += arch * (0.024 * np.exp(-up * up) + 0.028 * np.exp(-low * low))
    out -= 0.018 * bump(side, height + m.gap_down + m.lip_down + 0.07, 0.16, 0.05)
    out -= (0.018 + 0.02 * cheer + 0.02 * m.old) * _fold(m, side, y)
    return out


def _fold(m: Measures, side, y):
    """The nasolabial fold, from beside the wing to beside the corner of the mouth: 0 to 1."""
    top, low = m.nose_base + 0.10, m.mouth_y - 0.02
    t = clip((top - y) / (top - low), 0, 1)
    path = m.nose_wing + 0.035 + (m.mouth_width + 0.045 - m.nose_wing) * t**1.3
    ends = smooth(top + 0.03, top - 0.06, y) * smooth(low - 0.09, low + 0.02, y)
    return np.exp(-(((side - path) / 0.032) ** 2)) * ends


@dataclass(frozen=True)
class Surface:
    """The finished head surface on the chart.

    Attributes:
        radius: Tensor[1, 1, CHART, CHART] float32, with hair and hat.
        skin: Tensor[1, 1, CHART, CHART] float32, without.
        cells: Tensor[1, 7, CHART, CHART] float32: normal (3, head axes), ambient light (0 to 1), hair margin, hat
            margin, mask margin.
    """

    radius: torch.Tensor
    skin: torch.Tensor
    cells: torch.Tensor


def surface(person: Person, view: View, m: Measures, cover) -> Surface:
    """Tabulate the head.

    Args:
        cover: function (person, view, measures, directions [3, CHART, CHART], skin radius) -> (thickness, hair
            margin, hat margin, mask margin), each [CHART, CHART].
    """
    direction = chart_directions()
    right = skull(person, m, direction[..., CHART // 2 :])  # faces are symmetric
    right[_front()[:2]] += _relief(person, m)
    skin = np.concatenate((right[:, ::-1], right), 1)
    thickness, *margins = cover(person, view, m, direction, skin)
    radius = (skin + thickness).astype(np.float32, copy=False)
    points = direction * radius
    across, down = _slope(points, 2), _slope(points, 1)
    cells = np.empty((7, CHART, CHART), np.float32)
    normal = cells[:3]
    for i in range(3):
        np.subtract(across[i - 2] * down[i - 1], across[i - 1] * down[i - 2], out=normal[i])
    normal /= length(*normal) + 1e-9
    hollow = ndimage.uniform_filter(radius, 9, mode="nearest") - radius
    fine = ndimage.uniform_filter(radius, 4, mode="nearest") - radius
    cells[3] = 1 - clip(5.5 * np.maximum(hollow, 0) + 7 * np.maximum(fine, 0), 0, 0.7)
    cells[4:] = margins
    return Surface(*(torch.from_numpy(maps)[None] for maps in (radius[None], skin[None], cells)))


def _slope(points: np.ndarray, axis: int) -> np.ndarray:
    """Central differences along one axis of the chart; the rim repeats its neighbour."""
    out = np.empty_like(points)
    if axis == 2:
        out[..., 1:-1] = points[..., 2:] - points[..., :-2]
        out[..., 0], out[..., -1] = out[..., 1], out[..., -2]
    else:
        out[:, 1:-1] = points[:, 2:] - points[:, :-2]
        out[:, 0], out[:, -1] = out[:, 1], out[:, -2]
    return out


def skin_points(shape: Surface, x, y) -> np.ndarray:
    """Points [..., 3] of the bare skin at face coordinates, relative to CENTRE, head axes."""
    direction = to_direction(np.asarray(x, np.float64), np.asarray(y, np.float64))
    flat = direction.reshape(3, -1)
    return (flat * sample(shape.skin, flat)).T.reshape(*direction.shape[1:], 3)


# --- Curves of the features, used for paint and landmarks alike ---


def eye_frame(m: Measures, side: int, x, y):
    """Eye coordinates: (a, b), a from -1 at the inner to 1 at the outer corner, b upwards in face units."""
    u, v = side * x - m.eye_x, y - m.eye_y
    c, s = math.cos(m.eye_tilt), math.sin(m.eye_tilt)
    return (c * u + s * v) * (1 / m.eye_width), c * v - s * u


def lids(m: Measures, a):
    """Heights of the upper and the lower lid's edge at ``a`` in [-1, 1]."""
    arch = 1 - a * a
    up = m.lid_up * arch * (1.06 - 0.18 * a) * (1 + 0.25 * a * a) - 0.004 * (1 - a)
    return up, -m.lid_down * arch * (0.92 + 0.2 * a) - 0.004 * (1 - a)


def brow_line(m: Measures, t):
    """Height of the eyebrow's middle at ``t`` from 0 (inner end) to 1 (outer end)."""
    peak = t * (1.55 - 0.95 * t) * 1.5
    return m.brow_y - 0.02 - 0.028 * m.frown * (1 - t) ** 2 + m.brow_arch * (peak - 0.95 * np.maximum(t - 0.55, 0) * 2)


def lip_lines(m: Measures, a):
    """Heights at ``a`` in [-1, 1] across the mouth: top of the upper lip, both inner edges, bottom of the lower lip."""
    arch = np.maximum(1 - a * a, 0)
    round_, full = np.sqrt(arch), arch * (1 + 0.5 * a * a)
    line = m.mouth_y + m.corner * a * a
    upper, lower = line + m.gap_up * full, line - m.gap_down * (0.4 * round_ + 0.6 * arch)
    dip = m.bow * np.exp(-((a / 0.15) ** 2))
    top = upper + m.lip_up * (0.35 * round_ + 0.75 * full - 0.10 * arch) * (1 - dip) / 1.0
    return top, upper, lower, lower - m.lip_down * (0.5 * round_ + 0.5 * full)


_JAW = np.array(
    ((0.74, 0.0, 0.02), (0.735, -0.20, 0.05), (0.715, -0.40, 0.10), (0.67, -0.60, 0.16), (0.59, -0.79, 0.24),
     (0.46, -0.94, 0.36), (0.31, -1.03, 0.49), (0.155, -1.075, 0.58), (0.0, -1.09, 0.62))
)  # fmt: skip


def landmarks(m: Measures, shape: Surface) -> tuple[np.ndarray, np.ndarray]:
    """The 68 iBUG landmarks [68, 3] and the skin over both eyes [2, 3], relative to CENTRE, head axes."""
    half = (_JAW - CENTRE) + (0.0, -0.5 * m.jaw_drop, 0.0) * np.linspace(0, 1, 9)[:, None]
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    jaw = np.concatenate((half * (-1, 1, 1), half[-2::-1])).T
    t = np.linspace(0.04, 0.96, 5)
    brow_x, brow_y = m.brow_in + t * (m.brow_out - m.brow_in), brow_line(m, t)
    bridge_y = np.linspace(0.02, m.nose_tip, 4)
    base_x = np.array((-0.75, -0.38, 0, 0.38, 0.75)) * m.nose_wing
    base_y = m.nose_base + np.array((0.022, 0.004, -0.008, 0.004, 0.022))
    a = np.array((-1, -0.36, 0.36, 1))
    up, low = lids(m, a[1:3])
    u = np.array((-1, -0.36, 0.36, 1, 0.36, -0.36)) * m.eye_width
    v = np.array((-0.008, up[0], up[1], 0, low[1], low[0]))
    c, s = math.cos(m.eye_tilt), math.sin(m.eye_tilt)
    eye_x, eye_y = m.eye_x + c * u - s * v, m.eye_y + s * u + c * v
    left, right = [3, 2, 1, 0, 5, 4], [0, 1, 2, 3, 4, 5]  # of the picture; iBUG starts at the picture's left corner
    outer_a = np.array((-1, -0.62, -0.24, 0, 0.24, 0.62, 1))
    inner_a = np.array((-0.84, -0.36, 0, 0.36, 0.84))
    top, _, _, bottom = lip_lines(m, outer_a)
    _, upper, lower, _ = lip_lines(m, inner_a)
    x = np.concatenate((
        -brow_x[::-1], brow_x, np.zeros(4), base_x, -eye_x[left], eye_x[right],
        m.mouth_width * np.concatenate((outer_a, outer_a[5:0:-1], inner_a, inner_a[3:0:-1])),
    ))  # fmt: skip
    y = np.concatenate((
        brow_y[::-1], brow_y, bridge_y, base_y, eye_y[left], eye_y[right],
        top, bottom[5:0:-1], upper, lower[3:0:-1],
    ))  # fmt: skip
    eyes = to_direction(np.array((-m.eye_x, m.eye_x)), np.full(2, m.eye_y + 0.008))
    direction = np.concatenate((jaw, to_direction(x, y), eyes), 1)
    points = (direction * sample(shape.skin, direction)).T
    return points[:68], points[68:]
