"""What is around the head: neck and clothes, ears, glasses, ear-rings, the visor of a cap, and occluders."""

from __future__ import annotations

import math

import numpy as np

from pyface.data.procedural import head
from pyface.data.procedural.canvas import Canvas, ellipsoid, linear, material, texture
from pyface.data.procedural.describe import has_earrings, shows_ears
from pyface.data.procedural.hair import HANGING
from pyface.data.procedural.head import CENTRE, Measures, Surface, clip, length, rotation, smooth
from pyface.data.procedural.paint import skin_colour
from pyface.data.procedural.parameters import Person, View

_NECK = np.array((0.0, -0.75, -0.25))  # where head and neck turn, head coordinates


class Body:
    """Axes of the trunk, which follows the head only in part, and a way to place its points."""

    def __init__(self, view: View, axes: np.ndarray):
        pitch, yaw, roll = view.pose
        self.axes = rotation((0.15 * pitch, 0.45 * yaw, 0.25 * roll))
        self.pivot = axes @ (_NECK - CENTRE)

    def place(self, point) -> np.ndarray:
        """Head coordinates of an upright head -> camera-aligned axes."""
        return self.pivot + self.axes @ (np.asarray(point) - _NECK)


def body(canvas: Canvas, person: Person, view: View, m: Measures, axes: np.ndarray) -> None:
    """Trunk, shoulders and neck, far to near."""
    frame = Body(view, axes)
    broad = 1 + 0.10 * (m.man - 0.5) + 0.04 * person.shape.fullness - 0.22 * m.child
    thick = 1 + 0.20 * (m.man - 0.5) + 0.06 * person.shape.fullness - 0.2 * m.child
    drop = 0.12 + 0.10 * m.child
    skin = skin_colour(person)
    cloth, accent = linear(view.clothes.colour), linear(view.clothes.accent)
    parts = (
        ((0, -2.70 + drop, -0.30), (1.85 * broad, 1.18, 0.80)),
        ((0, -1.82 + drop, -0.36), (1.20 * broad, 0.52, 0.44)),
        ((0, -1.30, -0.26), (0.41 * thick, 1.35, 0.43 * thick)),
    )
    hidden = canvas.project(frame.place((0, -0.62, -0.1)))[1]  # rows above are behind the head
    for k, (centre, radii) in enumerate(parts):
        hit = ellipsoid(canvas, frame.axes, frame.place(centre), radii, max(int(hidden), 0))
        if hit is None:
            continue
        local, alpha = hit.local, hit.alpha
        px, py, pz = (local[i] * radii[i] + centre[i] for i in range(3))
        # Neckline: cloth below it.
        kind = view.clothes.kind
        if kind == "v":
            line = -1.62 + drop + 1.0 * np.abs(px) - 0.28 * smooth(0.42, 0.0, np.abs(px))
        elif kind == "high":
            line = -1.17 + drop + 0.05 * px * px
        else:
            line = -1.44 + drop + 0.10 * np.abs(px) - 0.10 * smooth(0.5, 0.0, np.abs(px)) * (pz > -0.3)
        line = np.minimum(line, -1.17 + drop)
        depth = line - py
        clothed = clip(depth * canvas.unit + 0.5, 0, 1)
        if k == 2 and kind != "high":
            clothed = clothed * smooth(-1.30, -1.42, py)
            alpha = alpha * (1 - clothed)
        fold = texture("cloud", px * 34 + view.clothes.seed % 251, py * 22 + view.clothes.seed % 83)
        weave = 1 + 0.035 * texture("grain", px * 230, py * 230) + 0.07 * fold
        stripe = np.float32(view.clothes.pattern) * (np.cos(py * 52) > 0.2) if view.clothes.pattern else 0.0
        trim = np.exp(-(((depth - 0.045) / 0.028) ** 2)) * (0.6 if kind in ("crew", "v") else 0.0)
        if kind == "collar":
            flap = smooth(0.03, 0.0, np.abs(depth - 0.16) - 0.15) * smooth(0.62, 0.55, np.abs(px))
            stripe, trim = stripe * (1 - flap), 0.35 * np.exp(-(((depth - 0.30) / 0.02) ** 2)) * (np.abs(px) < 0.6)
        albedo = cloth[:, None, None] + (0.8 * stripe) * (accent - cloth)[:, None, None]
        albedo = albedo * (weave * (1 - trim * 0.45))
        flesh = (skin * np.float32((1, 0.96, 0.95)))[:, None, None] * (0.88 + 0.10 * smooth(-0.95, -1.55, py))
        albedo = flesh + clothed * (albedo - flesh)
        normal = hit.normal.copy()
        if k == 2:  # the two muscles that meet above the breastbone
            cord = np.exp(-(((np.abs(px) - 0.20 - 0.22 * (py + 1.55)) / 0.06) ** 2)) * (1 - clothed)
            normal[0] += 0.25 * cord * np.sign(px)
            albedo *= 1 - 0.05 * cord
        normal[0] += 0.10 * fold * clothed
        under = smooth(-1.45, -0.98, py)  # the chin takes the sky's light
        ambient = np.where(clothed > 0.5, 0.95, 1 - 0.55 * under)
        ident = np.where(clothed > 0.5, 18, 17).astype(np.uint8)
        fill = material(hit.shape, albedo, normal, ambient, 0.12 * (1 - clothed), 1 - clothed)
        taken = canvas.put(hit.box, hit.z, alpha, 17, fill, soft=0.06)
        canvas.ident[hit.box] = np.where(taken > 0.5, ident, canvas.ident[hit.box])


def ears(canvas: Canvas, person: Person, view: View, m: Measures, axes: np.ndarray, shape: Surface) -> None:
    """Both ears, unless hair hides them, and ear-rings."""
    if not shows_ears(person):
        return
    size = (1 + 0.09 * person.shape.ears + 0.10 * m.old) * (1 - 0.08 * m.child)
    skin = skin_colour(person)
    for side in (-1, 1):
        direction = np.array((side * 0.985, 0.02, -0.10))
        direction = direction / np.linalg.norm(direction)
        radius = float(head.sample(shape.skin, direction[:, None])[0, 0])
        centre = direction * (radius + 0.005) + (0, 0.06, 0)
        turn = rotation((0.0, side * 0.42, 0.0)) @ rotation((0, 0, side * 0.12))
        hit = ellipsoid(canvas, axes @ turn, axes @ centre, (0.075 * size, 0.285 * size, 0.17 * size))
        if hit is None:
            continue
        u, v = hit.local[2], hit.local[1]
        rim = length(u, v * 0.95)
        bowl = smooth(0.80, 0.45, length((u + 0.05) / 0.8, (v - 0.05) / 0.85))
        ridge = np.exp(-(((length((u + 0.1) / 0.55, (v - 0.12) / 0.62) - 1) / 0.16) ** 2)) * smooth(-0.7, -0.1, v)
        shade = 1 - 0.45 * bowl + 0.12 * ridge
        hole = np.exp(-(((u - 0.25) / 0.3) ** 2) - ((v + 0.12) / 0.22) ** 2)
        shade = shade * (1 - 0.45 * hole)
        albedo = [skin[0] * shade, skin[1] * shade * 0.88, skin[2] * shade * 0.87]
        normal = hit.normal.copy()
        normal[1] += 0.25 * np.sin(rim * 9) * (rim < 1)
        fill = material(hit.shape, albedo, normal, 1 - 0.45 * bowl, 0.2, 1.0)
        canvas.put(hit.box, hit.z, hit.alpha, 8 if side < 0 else 9, fill, soft=0.04)
        if has_earrings(person, view):
            lobe = axes @ (centre + turn @ np.array((side * 0.04, -0.30 * size, 0.03)))
            drop = ellipsoid(canvas, np.eye(3), lobe, (0.035, 0.035 + 0.03 * (person.seed % 3), 0.035))
            if drop is not None:
                gold = linear(((0.83, 0.68, 0.35), (0.80, 0.80, 0.83))[person.seed % 2])
                fill = material(drop.shape, gold, drop.normal, 0.9, 1.5, 0.0, 0.25 * drop.normal[1])
                canvas.put(drop.box, drop.z, drop.alpha, 15, fill)


def visor(canvas: Canvas, person: Person, view: View, m: Measures, axes: np.ndarray) -> None:
    """The visor of a cap."""
    if view.hat != "cap":
        return
    lean = axes @ rotation((-0.34, 0, 0))
    hit = ellipsoid(canvas, lean, axes @ (np.array((0, 0.47, 0.80)) - CENTRE), (0.62, 0.05, 0.58))
    if hit is None:
        return
    colour = linear(view.clothes.accent) * 0.85
    shade = 1 + 0.04 * texture("grain", hit.local[0] * 80, hit.local[2] * 80)
    fill = material(hit.shape, [c * shade for c in colour], hit.normal, 0.9, 0.05, 0.0)
    canvas.put(hit.box, hit.z, hit.alpha, 14, fill)


def glasses(canvas: Canvas, person: Person, view: View, m: Measures, axes, shape: Surface) -> np.ndarray | None:
    """Glasses or sunglasses. Returns what they keep off the face of the key light, [H, W], or None."""
    if view.glasses == "none":
        return None
    frames, dark = person.frames, view.glasses == "sunglasses"
    half_w = 0.245 * (1 + 0.06 * frames.size + 0.06 * dark)
    half_h = half_w * (0.70 + 0.22 * frames.roundness + 0.05 * dark)
    corner = half_h * (0.35 + 0.6 * frames.roundness)
    rim = 0.020 * (1 + 0.45 * frames.thickness) + 0.004
    centre_x = max(m.eye_x, half_w + 0.075)
    eye = head.skin_points(shape, m.eye_x, m.eye_y)
    bridge = head.skin_points(shape, 0.0, 0.03)
    plane = float(max(eye[2] + 0.14, bridge[2] + 0.01))
    level = float(eye[1] - 0.02)
    corners = np.array([(sx * (centre_x + half_w + 0.05), level + sy * (half_h + 0.05), plane)
                        for sx in (-1, 1) for sy in (-1, 1)])  # fmt: skip
    box = canvas.box(corners @ axes.T, 0.05)
    if box is None:
        return None
    to_head = axes.T
    x, y = canvas.x[box[1]][None], canvas.y[box[0]][:, None]
    start = [float(to_head[i, 0]) * x + float(to_head[i, 1]) * y for i in range(3)]
    ray = [float(to_head[i, 2]) - s * (1 / canvas.distance) for i, s in enumerate(start)]
    curve = 0.10
    z = (plane - start[2]) / ray[2]
    for _ in range(2):  # the front is curved a little around the face
        gx = start[0] + z * ray[0]
        z = (plane - curve * gx * gx - start[2]) / ray[2]
    gx, gy = start[0] + z * ray[0], start[1] + z * ray[1] - level
    u, v = np.abs(np.abs(gx) - centre_x), np.abs(gy)
    qx, qy = u - half_w + corner, v - half_h + corner
    edge = length(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - corner
    pixel = 1 / canvas.unit
    frame = clip((rim / 2 - np.abs(edge)) / pixel + 0.5, 0, 1)
    inner = centre_x - half_w
    arch = clip((rim * 0.55 - np.abs(gy - 0.05 - 0.5 * (inner**2 - gx * gx))) / pixel + 0.5, 0, 1)
    frame = np.maximum(frame, arch * (np.abs(gx) < inner + 0.02))
    lens = clip(-edge / pixel + 0.5, 0, 1)
    colour = linear(frames.colour)
    normal = (axes[0, 2], axes[1, 2], axes[2, 2])
    if dark:
        tint = 0.985 - 0.06 * smooth(half_h, -half_h, gy) * (person.seed % 2)
        glare = 0.35 * np.exp(-(((gx * 1.2 + gy * 0.8 + 0.05 * np.sign(gx)) / 0.09) ** 2)) * (gy > -0.3 * half_h)
        fill = material(z.shape, [0.012 * np.ones_like(z)] * 3, normal, 1.0, 0.1, 0.0, 0.25 * glare)
        canvas.put(box, z - 0.005, lens * tint, 3, fill)
    else:
        glare = 0.10 * np.exp(-(((gx * 0.9 + gy * 1.1 - 0.12 * np.sign(gx)) / 0.05) ** 2))
        where = (slice(None), *box)
        front = z > canvas.z[box]
        canvas.material[where][9] += 0.35 * glare * lens * front
    shine = np.exp(-(((edge + 0.3 * rim) / (0.3 * rim)) ** 2)) * (0.5 + 0.5 * np.sign(gy))
    fill = material(z.shape, colour, normal, 1.0, 0.5, 0.0, 0.06 * shine)
    taken = canvas.put(box, z, frame, 3, fill)
    block = np.zeros((canvas.size, canvas.size), np.float32)
    block[box] = np.maximum(0.75 * taken, (0.75 if dark else 0.08) * lens)
    # Arms: from the outer edge of the frame back over the ear.
    for side in (-1, 1):
        hinge = np.array((side * (centre_x + half_w), level + 0.35 * half_h, plane - curve * (centre_x + half_w) ** 2))
        end = np.array((side * 0.80, level + 0.35 * half_h - 0.03, -0.12))
        rod(canvas, axes @ hinge, axes @ end, 0.6 * rim, colour, 3)
    return block


def rod(canvas: Canvas, start: np.ndarray, end: np.ndarray, radius: float, colour, ident: int) -> None:
    """A thin straight bar between two points."""
    box = canvas.box(np.stack((start, end)), radius)
    if box is None:
        return
    (ax, ay), (bx, by) = canvas.project(start), canvas.project(end)
    columns, rows = np.arange(box[1].start, box[1].stop)[None], np.arange(box[0].start, box[0].stop)[:, None]
    dx, dy = float(bx - ax), float(by - ay)
    t = clip(((columns - ax) * dx + (rows - ay) * dy) / (dx * dx + dy * dy + 1e-6), 0, 1)
    away = length(columns - ax - t * dx, rows - ay - t * dy)
    alpha = clip(radius * canvas.unit - away + 0.5, 0, 1).astype(np.float32)
    z = (start[2] + t * (end[2] - start[2])).astype(np.float32)
    fill = material(z.shape, colour, (0.0, 0.4, 0.9), 0.9, 0.4)
    canvas.put(box, z, alpha, ident, fill)


def occlude(canvas: Canvas, person: Person, view: View, m: Measures, axes: np.ndarray, shape: Surface) -> None:
    """Hand, paper or microphone in front of the face; a mask is part of the head's surface."""
    if view.occluder in (None, "mask"):
        if view.occluder == "mask" and person.hair.style not in HANGING:
            for side in (-1, 1):
                for y in (-0.22, -0.75):
                    point = head.skin_points(shape, side * 0.62, y) * 1.02
                    ear = np.array((side * 0.80, -0.12, -0.08)) - CENTRE
                    rod(canvas, axes @ point, axes @ ear, 0.012, (0.8, 0.8, 0.8), 19)
        return
    rng = np.random.default_rng(view.occluder_seed)
    {"hand": _hand, "paper": _paper, "microphone": _microphone}[view.occluder](canvas, person, m, axes, shape, rng)


def _hand(canvas: Canvas, person: Person, m: Measures, axes, shape: Surface, rng) -> None:
    """A hand laid on cheek, chin or mouth: palm, four fingers, thumb."""
    side = float(rng.choice((-1, 1)))
    place = np.array(((0.40, -0.55), (0.10, -0.72), (0.42, -0.15))[rng.integers(3)])
    skin = skin_colour(person)
    lean = float(rng.uniform(0.1, 0.8)) * -side
    scale = 0.9 - 0.25 * m.child - 0.06 * (1 - m.man)
    front = axes @ (head.skin_points(shape, side * place[0], place[1])) + (0, 0, 0.10)
    up = np.array((math.sin(lean), math.cos(lean), 0))
    across = np.array((math.cos(lean), -math.sin(lean), 0))
    frame = np.stack((across, up, (0, 0, 1)), 1)
    bones = [((0.0, -0.50, 0.02), (0.40, 0.52, 0.13), 0.0), ((0.0, -1.5, -0.12), (0.27, 1.0, 0.2), 0.0)]
    for k, (offset, long) in enumerate(((-0.29, 0.40), (-0.10, 0.48), (0.09, 0.46), (0.27, 0.36))):
        spread = 0.16 * (k - 1.5) / 1.5 * float(rng.uniform(0.5, 1.2))
        bones.append(((offset + spread * 0.5, 0.16 + 0.1 * long, 0.05), (0.098, long, 0.095), spread))
    bones.append(((-side * 0.42, -0.42, 0.10), (0.11, 0.34, 0.11), -side * 0.55))
    for k, (centre, radii, spread) in enumerate(bones):
        turned = frame @ rotation((0, 0, spread))
        where = front + frame @ (np.array(centre) * scale)
        hit = ellipsoid(canvas, turned, where, np.array(radii) * scale)
        if hit is None:
            continue
        u, v = hit.local[0], hit.local[1]
        shade = 1 + 0.03 * texture("mottle", u * 40 + 9 * k, v * 60)
        if k >= 2:
            joints = np.exp(-(((np.abs(v + 0.15) - 0.35) / 0.05) ** 2))
            shade = shade * (1 - 0.14 * joints) * (1 - 0.30 * smooth(0.75, 1.0, np.abs(u)))
        albedo = [skin[c] * shade * (1.0, 0.93, 0.92)[c] for c in range(3)]
        if k >= 2:
            nail = smooth(1.0, 0.8, length(u / 0.62, (v - 0.74) / 0.20))
            albedo = [a + 0.55 * nail * (np.float32(n) - a) for a, n in zip(albedo, skin * (1.05, 0.86, 0.84) + 0.05)]
        fill = material(hit.shape, albedo, hit.normal, 0.85, 0.2, 1.0)
        canvas.put(hit.box, hit.z, hit.alpha, 19, fill, soft=0.03)


def _paper(canvas: Canvas, person: Person, m: Measures, axes, shape: Surface, rng) -> None:
    """A printed sheet held in front of part of the face."""
    lean = float(rng.normal(0, 0.25))
    centre = axes @ np.array((rng.normal(0, 0.35), rng.uniform(-1.25, -0.85), 1.55))
    half = np.array((rng.uniform(0.6, 1.0), rng.uniform(0.55, 0.8)))
    x = canvas.x[None] * (1 - centre[2] / canvas.distance) - float(centre[0])
    y = canvas.y[:, None] * (1 - centre[2] / canvas.distance) - float(centre[1])
    u = math.cos(lean) * x - math.sin(lean) * y
    v = math.sin(lean) * x + math.cos(lean) * y
    alpha = clip(np.minimum(half[0] - np.abs(u), half[1] - np.abs(v)) * canvas.unit + 0.5, 0, 1).astype(np.float32)
    words = texture("mottle", u * 90, np.floor(v * 12) * 17) > -0.7
    lines = (np.cos(v * 75) > 0.3) * (np.abs(u) < half[0] - 0.12) * words
    shade = (0.80 - 0.30 * lines * (np.abs(v) < half[1] - 0.12) * min(1.0, 60 / canvas.unit)) * (1 + 0.06 * u / half[0])
    normal = (0.25 * np.sin(2.2 * u + 0.6), 0.1, np.ones_like(shade))
    z = np.full((canvas.size, canvas.size), float(centre[2]), np.float32) + np.float32(0.02) * u.astype(np.float32)
    everywhere = (slice(None), slice(None))
    canvas.put(everywhere, z, alpha, 19, material(shade.shape, [shade] * 3, normal, 1.0, 0.03))


def _microphone(canvas: Canvas, person: Person, m: Measures, axes, shape: Surface, rng) -> None:
    """A hand microphone at the mouth, from below."""
    side = float(rng.uniform(-0.8, 0.8))
    head_at = axes @ (head.skin_points(shape, 0.15 * side, m.mouth_y - 0.16) + (0, 0, 0.32))
    down = np.array((0.45 * side, -1.0, 0.12))
    down = down / np.linalg.norm(down)
    across = np.cross(down, (0, 0, 1.0))
    across = across / np.linalg.norm(across)
    frame = np.stack((across, down, np.cross(across, down)), 1)
    stick = ellipsoid(canvas, frame, head_at + 1.0 * down, (0.13, 0.95, 0.13))
    if stick is not None:
        fill = material(stick.shape, (0.02, 0.02, 0.022), stick.normal, 0.9, 0.8)
        canvas.put(stick.box, stick.z, stick.alpha, 19, fill)
    ball = ellipsoid(canvas, frame, head_at, (0.235, 0.26, 0.235))
    if ball is None:
        return
    mesh = np.cos(ball.local[0] * 34) * np.cos(ball.local[1] * 34) * min(1.0, 0.02 * canvas.unit)
    band = np.abs(ball.local[1] - 0.15) < 0.12
    metal = np.where(band, 0.35, 0.10 + 0.06 * mesh)
    fill = material(ball.shape, [metal] * 3, ball.normal, 0.9, 1.2 * (0.6 + 0.4 * mesh))
    canvas.put(ball.box, ball.z, ball.alpha, 19, fill)
