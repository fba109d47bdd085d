"""Who a face belongs to, and what one photo of it looks like: the numbers that the renderer turns into pixels.

Everything that stays from photo to photo is in :class:`Person`, grouped by component, so that a component edit is
``dataclasses.replace(person, nose=other.nose)``. Everything that differs between two photos is in :class:`View`.
Numbers without a stated unit are deviations from the average: 0 is average, -1 and 1 are far out, and the draws stay
within [-1.6, 1.6].

Conventions. Camera coordinates are x right, y down, z away from the camera. Angles are radians in the convention of
Gaze360 and L2CS-Net: a direction is (-cos(pitch) sin(yaw), -sin(pitch), -cos(pitch) cos(yaw)), so (0, 0) looks into
the camera, pitch > 0 looks up, and yaw > 0 looks to the left side of the picture. Head pose uses the same pitch and
yaw for the direction of the face; roll > 0 turns the face clockwise in the picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from pyface.errors import UserError

HAIR_STYLES = ("bald", "buzz", "short", "parted", "bob", "long", "tied", "afro")
BEARD_STYLES = ("stubble", "moustache", "goatee", "full")
GLASSES = ("none", "glasses", "sunglasses")
HATS = ("none", "beanie", "cap")
OCCLUDERS = ("hand", "mask", "paper", "microphone")
BACKGROUNDS = ("plain", "gradient", "bokeh", "leaves", "indoor")
CLOTHES = ("crew", "v", "collar", "high")

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Shape:
    """The skull and what lies on it."""

    width: float = 0.0
    height: float = 0.0
    jaw: float = 0.0
    chin: float = 0.0
    cheekbones: float = 0.0
    fullness: float = 0.0
    forehead: float = 0.0
    ears: float = 0.0


@dataclass(frozen=True)
class Nose:
    length: float = 0.0
    width: float = 0.0
    bridge: float = 0.0
    tip: float = 0.0
    """Upturned above 0, hooked below."""
    depth: float = 0.0


@dataclass(frozen=True)
class Eyes:
    size: float = 0.0
    spacing: float = 0.0
    tilt: float = 0.0
    fold: float = 0.0
    """Height of the upper lid's crease; below -0.6 there is none."""
    roundness: float = 0.0
    iris: RGB = (0.30, 0.18, 0.08)
    """sRGB in [0, 1]."""


@dataclass(frozen=True)
class Brows:
    thickness: float = 0.0
    height: float = 0.0
    arch: float = 0.0
    length: float = 0.0


@dataclass(frozen=True)
class Lips:
    upper: float = 0.0
    lower: float = 0.0
    width: float = 0.0
    bow: float = 0.0
    redness: float = 0.0
    height: float = 0.0


@dataclass(frozen=True)
class Hair:
    style: str = "short"
    """One of :data:`HAIR_STYLES`."""
    length: float = 0.0
    curl: float = 0.0
    """0 straight to 1 curly."""
    volume: float = 0.0
    recession: float = 0.0
    """0 none to 1 strong."""
    part: float = 0.0
    """Side of the parting, negative is the picture's left."""
    colour: RGB = (0.12, 0.08, 0.05)
    """sRGB in [0, 1], before greying."""
    greys_at: float = 55.0
    """Age in years at which half of the hair is grey."""
    fringe: float = 0.0
    """How far bangs reach down when ``View.bangs`` is set."""


@dataclass(frozen=True)
class Beard:
    amount: float = 0.0
    """0 (nothing grows) to 1."""
    style: str = "full"
    """One of :data:`BEARD_STYLES`."""


@dataclass(frozen=True)
class Skin:
    tone: float = 0.3
    """0 (very light) to 1 (very dark)."""
    warmth: float = 0.0
    freckles: float = 0.0
    """0 to 1."""
    blush: float = 0.0
    roughness: float = 0.0
    moles: int = 0
    """Seed of the moles' places; 0 has none."""


@dataclass(frozen=True)
class Frames:
    """The spectacles this person owns."""

    roundness: float = 0.5
    """0 rectangular to 1 round."""
    size: float = 0.0
    thickness: float = 0.0
    colour: RGB = (0.05, 0.05, 0.06)


@dataclass(frozen=True)
class Person:
    """What stays the same in every photo of one person."""

    identity: int
    female: float
    """0 male to 1 female; drawn near the ends."""
    age: float
    """Years."""
    shape: Shape = Shape()
    nose: Nose = Nose()
    eyes: Eyes = Eyes()
    brows: Brows = Brows()
    lips: Lips = Lips()
    hair: Hair = Hair()
    beard: Beard = Beard()
    skin: Skin = Skin()
    frames: Frames = Frames()
    seed: int = 0
    """Of the fine texture: strands, pores, freckles."""


@dataclass(frozen=True)
class Light:
    azimuth: float = -0.6
    """Radians from the camera's direction; positive comes from the picture's right."""
    elevation: float = 0.6
    """Radians above the horizon."""
    strength: float = 1.0
    ambient: float = 0.45
    softness: float = 0.5
    """0 hard shadows to 1 very soft."""
    warmth: float = 0.0
    rim: float = 0.0
    """Strength of a light from behind."""


@dataclass(frozen=True)
class Background:
    kind: str = "plain"
    """One of :data:`BACKGROUNDS`."""
    colour: RGB = (0.6, 0.62, 0.65)
    accent: RGB = (0.4, 0.42, 0.45)
    seed: int = 0


@dataclass(frozen=True)
class Camera:
    distance: float = 9.0
    """From the head's centre in units of 10 cm."""
    exposure: float = 0.0
    """Stops."""
    balance: float = 0.0
    """White balance; positive is warmer."""
    blur: float = 0.4
    """Standard deviation in pixels of a 128-pixel picture."""
    noise: float = 0.008
    vignette: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Framing:
    """Where the head is in the picture. The default is CelebA's aligned square crop."""

    scale: float = 0.325
    """Picture heights per 10 cm at the head."""
    x: float = 0.0
    """Shift to the right in picture heights."""
    y: float = 0.0
    """Shift down in picture heights."""


@dataclass(frozen=True)
class Clothes:
    kind: str = "crew"
    """One of :data:`CLOTHES`."""
    colour: RGB = (0.2, 0.25, 0.35)
    accent: RGB = (0.8, 0.8, 0.8)
    pattern: float = 0.0
    """0 plain to 1 striped."""
    seed: int = 0


@dataclass(frozen=True)
class View:
    """What differs between two photos of the same person."""

    pose: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Pitch, yaw, roll of the head in radians, see the module's conventions."""
    gaze: tuple[float, float] = (0.0, 0.0)
    """Pitch, yaw of the eyes in camera coordinates (not relative to the head), radians."""
    smile: float = 0.0
    """-0.4 (sad) to 1 (laughing)."""
    mouth_open: float = 0.0
    """0 to 1."""
    brow_raise: float = 0.0
    """-1 (frown) to 1."""
    eye_open: float = 1.0
    """0 (closed) to 1.2."""
    light: Light = Light()
    background: Background = Background()
    camera: Camera = Camera()
    framing: Framing = Framing()
    clothes: Clothes = Clothes()
    years: float = 0.0
    """Added to the person's age."""
    glasses: str = "none"
    """One of :data:`GLASSES`."""
    beard: float = 1.0
    """0 (shaven) to 1 (as the person wears it); without effect where nothing grows."""
    bangs: bool = False
    hat: str = "none"
    """One of :data:`HATS`."""
    makeup: float = 0.0
    """0 to 1; without effect on men and children."""
    earrings: bool = False
    """Without effect on men, and where hair covers the ears."""
    occluder: str | None = None
    """One of :data:`OCCLUDERS`, or None."""
    occluder_seed: int = 0


def effective_age(person: Person, view: View) -> float:
    """Years at the time of the photo, within [4, 90]."""
    return float(min(max(person.age + view.years, 4.0), 90.0))


def beard_amount(person: Person, view: View) -> float:
    """What is seen of the beard, 0 to 1. None grows on women and before about 17 years."""
    grown = min(max((effective_age(person, view) - 16.0) / 4.0, 0.0), 1.0)
    return 0.0 if person.female > 0.5 else float(person.beard.amount * view.beard * grown)


def makeup_amount(person: Person, view: View) -> float:
    """What is seen of the make-up, 0 to 1."""
    return float(view.makeup) if person.female > 0.5 and effective_age(person, view) >= 15 else 0.0


def grey_share(person: Person, view: View) -> float:
    """Share of grey hair, 0 to 1, from the age at the time of the photo."""
    return 1.0 / (1.0 + math.exp(-(effective_age(person, view) - person.hair.greys_at) / 4.0))


def check(person: Person, view: View) -> None:
    """UserError if a photo with these parameters cannot be drawn: an unknown name, or a number out of its range."""
    names = (
        ("hair.style", person.hair.style, HAIR_STYLES),
        ("beard.style", person.beard.style, BEARD_STYLES),
        ("glasses", view.glasses, GLASSES),
        ("hat", view.hat, HATS),
        ("occluder", view.occluder, (None, *OCCLUDERS)),
        ("background.kind", view.background.kind, BACKGROUNDS),
        ("clothes.kind", view.clothes.kind, CLOTHES),
    )
    for name, value, known in names:
        if value not in known:
            raise UserError(f"procedural faces: unknown {name} {value!r}; known: {', '.join(map(str, known))}")
    pitch, yaw, roll = view.pose
    numbers = (
        ("age", person.age, 0, 120),
        ("skin.tone", person.skin.tone, 0, 1),
        ("pose: pitch", pitch, -0.6, 0.6),
        ("pose: yaw", yaw, -1.0, 1.0),
        ("pose: roll", roll, -1.6, 1.6),
        ("gaze: pitch", view.gaze[0], -1.2, 1.2),
        ("gaze: yaw", view.gaze[1], -1.6, 1.6),
        ("smile", view.smile, -1, 1.2),
        ("mouth_open", view.mouth_open, 0, 1),
        ("brow_raise", view.brow_raise, -1.2, 1.2),
        ("eye_open", view.eye_open, 0, 1.3),
        ("beard", view.beard, 0, 1),
        ("makeup", view.makeup, 0, 1),
        ("framing.scale", view.framing.scale, 0.02, 3),
        ("framing.x", view.framing.x, -10, 10),
        ("framing.y", view.framing.y, -10, 10),
        ("camera.distance", view.camera.distance, 4, 1000),
    )
    for name, value, low, high in numbers:
        if not low <= value <= high:
            raise UserError(f"procedural faces: {name} must be from {low} to {high}, got {value}")


# Natural hair colours (sRGB) and how often they come at light, medium and dark skin.
HAIR_COLOURS: Mapping[str, tuple[RGB, RGB]] = MappingProxyType(
    {
        "black": ((0.105, 0.09, 0.085), (0.9, 1.0, 1.0)),
        "brown": ((0.25, 0.155, 0.09), (1.6, 0.9, 0.12)),
        "light brown": ((0.40, 0.265, 0.155), (0.9, 0.2, 0.02)),
        "blond": ((0.72, 0.56, 0.33), (1.1, 0.1, 0.02)),
        "red": ((0.46, 0.19, 0.08), (0.3, 0.02, 0.0)),
    }
)
_IRISES: tuple[tuple[RGB, float], ...] = (  # colour, how much it belongs to light skin
    ((0.26, 0.15, 0.07), 0.0),
    ((0.36, 0.22, 0.10), 0.15),
    ((0.40, 0.36, 0.18), 0.7),
    ((0.34, 0.47, 0.33), 0.9),
    ((0.33, 0.47, 0.60), 1.0),
    ((0.46, 0.52, 0.56), 1.0),
)
_CLOTHES: tuple[RGB, ...] = (
    (0.12, 0.13, 0.16), (0.85, 0.85, 0.83), (0.16, 0.22, 0.38), (0.45, 0.10, 0.12), (0.20, 0.32, 0.24),
    (0.55, 0.56, 0.58), (0.62, 0.50, 0.36), (0.30, 0.18, 0.32), (0.75, 0.52, 0.20), (0.45, 0.62, 0.74),
    (0.78, 0.48, 0.52), (0.30, 0.30, 0.30),
)  # fmt: skip
_PEOPLE, _VIEWS, _CLIPS = 1, 2, 3


def stream(kind: int, seed: int, index: int) -> np.random.Generator:
    """Random numbers that depend on (kind, seed, index) alone. UserError for a negative or non-integer one."""
    _check("seed", seed)
    _check("index", index)
    return np.random.default_rng((kind, int(seed), int(index)))


def _check(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise UserError(f"procedural faces: {name} must be an integer of at least 0, got {value!r}")


def _about(rng: np.random.Generator, spread: float = 0.6, centre: float = 0.0, limit: float = 1.6) -> float:
    return min(max(centre + spread * rng.standard_normal(), -limit), limit)


def _near(rng: np.random.Generator, centre: float, spread: float, low: float, high: float) -> float:
    return min(max(centre + spread * rng.standard_normal(), low), high)


def _pick(rng: np.random.Generator, chances) -> int:
    """An index, in proportion to ``chances``."""
    point = rng.random() * sum(chances)
    for index, chance in enumerate(chances):
        point -= chance
        if point < 0:
            return index
    return len(chances) - 1


def _tint(rng: np.random.Generator, colour: RGB, spread: float) -> RGB:
    factor = math.exp(rng.normal(0, spread))
    return tuple(float(np.clip(c * factor * math.exp(rng.normal(0, spread / 3)), 0.0, 1.0)) for c in colour)


def draw_person(seed: int, identity: int) -> Person:
    """Person number ``identity`` of the world ``seed``: sexes in balance, ages 5 to 85 years, skin of the full range.

    Raises:
        UserError: a negative or non-integer number.
    """
    for name, value in (("seed", seed), ("identity", identity)):
        _check(name, value)
    return _person(int(seed), int(identity))


@lru_cache(maxsize=4096)
def _person(seed: int, identity: int) -> Person:
    rng = stream(_PEOPLE, seed, identity)
    female = float(rng.random() < 0.5)
    man = 1.0 - female
    female = abs(female - abs(_near(rng, 0, 0.08, -0.3, 0.3)))
    age = float(rng.uniform(5, 18) if rng.random() < 0.14 else rng.uniform(18, 60) if rng.random() < 0.82
                else rng.uniform(60, 85))  # fmt: skip
    tone = float(rng.beta(0.9, 1.2))
    return Person(
        identity=identity,
        female=female,
        age=age,
        shape=_draw_shape(rng, man),
        nose=Nose(
            length=_about(rng, 0.7, 0.1 * man),
            width=_about(rng, 0.65, 0.55 * tone - 0.25 + 0.15 * man),
            bridge=_about(rng, 0.65, 0.15 * man - 0.5 * tone + 0.15),
            tip=_about(rng, 0.65, -0.1 * man),
            depth=_about(rng, 0.65, 0.1 * man),
        ),
        eyes=_draw_eyes(rng, man, tone),
        brows=Brows(
            thickness=_about(rng, 0.5, 0.8 * man - 0.4),
            height=_about(rng, 0.5, -0.5 * man + 0.15),
            arch=_about(rng, 0.5, -0.4 * man + 0.3),
            length=_about(rng, 0.4),
        ),
        lips=Lips(
            upper=_about(rng, 0.5, 0.7 * tone - 0.35 - 0.2 * man),
            lower=_about(rng, 0.5, 0.6 * tone - 0.25 - 0.2 * man),
            width=_about(rng, 0.5, 0.1 * man),
            bow=_about(rng, 0.5),
            redness=_about(rng, 0.5, 0.2 - 0.4 * man),
            height=_about(rng, 0.4),
        ),
        hair=_draw_hair(rng, man, tone, age),
        beard=_draw_beard(rng, man),
        skin=Skin(
            tone=tone,
            warmth=_about(rng, 0.5),
            freckles=_near(rng, 0.75, 0.25, 0, 1) if tone < 0.35 and rng.random() < 0.2 else 0.0,
            blush=_about(rng, 0.5, 0.1 * (1 - man)),
            roughness=_about(rng, 0.5, 0.2 * man),
            moles=int(rng.integers(1, 1 << 20)) if rng.random() < 0.4 else 0,
        ),
        frames=Frames(
            roundness=float(rng.random()),
            size=_about(rng, 0.5),
            thickness=_about(rng, 0.6),
            colour=_tint(rng, ((0.04, 0.04, 0.045), (0.20, 0.11, 0.06), (0.45, 0.40, 0.32), (0.35, 0.08, 0.10),
                               (0.10, 0.14, 0.28))[_pick(rng, (0.5, 0.2, 0.15, 0.08, 0.07))], 0.15),
        ),
        seed=int(rng.integers(1 << 30)),
    )  # fmt: skip


def _draw_shape(rng: np.random.Generator, man: float) -> Shape:
    return Shape(
        width=_about(rng, 0.7),
        height=_about(rng, 0.7),
        jaw=_about(rng, 0.6, 0.9 * man - 0.45),
        chin=_about(rng, 0.5, 0.5 * man - 0.25),
        cheekbones=_about(rng, 0.5, 0.2 - 0.4 * man),
        fullness=_about(rng, 0.7),
        forehead=_about(rng, 0.45),
        ears=_about(rng, 0.5, 0.2 * man),
    )


def _draw_eyes(rng: np.random.Generator, man: float, tone: float) -> Eyes:
    lightness = min(max(1.1 - 2.6 * tone, 0.0), 1.0)
    weights = [(1 - share) * (1.6 - lightness) + share * lightness for _, share in _IRISES]
    iris = _IRISES[_pick(rng, weights)][0]
    narrow = rng.random() < 0.28 and 0.12 < tone < 0.6
    return Eyes(
        size=_about(rng, 0.5, 0.2 - 0.4 * man),
        spacing=_about(rng, 0.7),
        tilt=_about(rng, 0.5, 0.5 if narrow else 0.1 - 0.2 * man),
        fold=_about(rng, 0.25, -0.8) if narrow else _about(rng, 0.45, 0.15),
        roundness=_about(rng, 0.4, -0.6 if narrow else 0.1),
        iris=_tint(rng, _IRISES[0][0] if narrow else iris, 0.12),
    )


def _draw_hair(rng: np.random.Generator, man: float, tone: float, age: float) -> Hair:
    weights = [np.interp(tone, (0.1, 0.4, 0.75), w) for _, w in HAIR_COLOURS.values()]
    colour = list(HAIR_COLOURS.values())[_pick(rng, weights)][0]
    old = float(np.clip((age - 30) / 40, 0, 1)) * man
    if man:
        styles = {"bald": 0.03 + 0.22 * old, "buzz": 0.2, "short": 0.42, "parted": 0.25, "long": 0.05, "bob": 0.03,
                  "afro": 0.16 * (tone > 0.55)}  # fmt: skip
    else:
        styles = {"buzz": 0.02, "short": 0.08 + 0.12 * (age > 55), "parted": 0.05, "bob": 0.26, "long": 0.45,
                  "tied": 0.16, "afro": 0.2 * (tone > 0.55)}  # fmt: skip
    if man and age < 18:
        styles["bald"] = 0.0
    style = list(styles)[_pick(rng, list(styles.values()))]
    curl = float(np.clip(rng.beta(0.7, 1.6) + (0.45 if tone > 0.6 else 0.0), 0, 1))
    return Hair(
        style=style,
        length=_about(rng, 0.6),
        curl=1.0 if style == "afro" else curl,
        volume=_about(rng, 0.5),
        recession=_near(rng, 0.1 + 0.6 * old, 0.2, 0, 1) * (0.25 + 0.75 * man),
        part=float(rng.choice((-1.0, 1.0)) * rng.uniform(0.2, 1.0)),
        colour=_tint(rng, colour, 0.14),
        greys_at=float(rng.normal(59, 8)),
        fringe=_about(rng, 0.5),
    )


def _draw_beard(rng: np.random.Generator, man: float) -> Beard:
    amount = float(rng.uniform(0.5, 1.0)) if rng.random() < 0.5 else 0.0
    style = BEARD_STYLES[_pick(rng, (0.35, 0.13, 0.2, 0.32))]
    return Beard(amount=amount * man, style=style)


def draw_view(seed: int, index: int) -> View:
    """The circumstances of photo number ``index`` of the world ``seed``, for whoever is in it.

    Raises:
        UserError: a negative or non-integer number.
    """
    rng = stream(_VIEWS, seed, index)
    yaw = _near(rng, 0, 0.26, -0.78, 0.78)
    pitch = _near(rng, 0, 0.12, -0.42, 0.42)
    roll = _near(rng, 0, 0.06, -0.35, 0.35)
    to_camera = rng.random() < 0.6
    gaze = (
        (float(rng.normal(0, 0.03)), float(rng.normal(0, 0.03)))
        if to_camera
        else (pitch + _near(rng, 0, 0.16, -0.35, 0.35),
              yaw + _near(rng, 0, 0.28, -0.6, 0.6))
    )  # fmt: skip
    smiling = rng.random() < 0.5
    smile = float(rng.uniform(0.45, 1.0)) if smiling else _near(rng, 0.03, 0.12, -0.4, 0.3)
    opened = rng.random() < (0.5 if smiling else 0.14)
    return View(
        pose=(pitch, yaw, roll),
        gaze=gaze,
        smile=smile,
        mouth_open=float(rng.uniform(0.25, 0.75)) if opened else float(abs(rng.normal(0, 0.03))),
        brow_raise=_near(rng, 0.05, 0.3, -1, 1),
        eye_open=_near(rng, 0.97, 0.08, 0.6, 1.15) if rng.random() < 0.97 else 0.0,
        light=_draw_light(rng),
        background=_draw_background(rng),
        camera=_draw_camera(rng),
        framing=Framing(
            scale=float(0.325 * np.exp(np.clip(rng.normal(0, 0.035), -0.1, 0.1))),
            x=_near(rng, 0, 0.012, -0.04, 0.04),
            y=_near(rng, 0, 0.012, -0.04, 0.04),
        ),
        clothes=_draw_clothes(rng),
        years=float(rng.uniform(-6, 6)),
        glasses=GLASSES[_pick(rng, (0.82, 0.14, 0.04))],
        beard=float(rng.random() < 0.85),
        bangs=bool(rng.random() < 0.16),
        hat=HATS[_pick(rng, (0.93, 0.035, 0.035))],
        makeup=float(rng.uniform(0.4, 1)) if rng.random() < 0.5 else 0.0,
        earrings=bool(rng.random() < 0.3),
        occluder=OCCLUDERS[rng.integers(len(OCCLUDERS))] if rng.random() < 0.06 else None,
        occluder_seed=int(rng.integers(1 << 30)),
    )


def _draw_light(rng: np.random.Generator) -> Light:
    ambient = float(rng.uniform(0.28, 0.7))
    return Light(
        azimuth=_near(rng, 0, 0.7, -1.4, 1.4),
        elevation=float(rng.uniform(0.15, 1.05)),
        strength=float(1.25 - 0.9 * ambient + 0.1 * rng.standard_normal()),
        ambient=ambient,
        softness=float(rng.random()),
        warmth=_about(rng, 0.5),
        rim=float(rng.uniform(0.2, 1)) if rng.random() < 0.3 else 0.0,
    )


def _draw_background(rng: np.random.Generator) -> Background:
    kind = BACKGROUNDS[_pick(rng, (0.2, 0.22, 0.2, 0.18, 0.2))]
    hue, value = rng.random(3), rng.uniform(0.12, 0.92)
    grey = rng.uniform(0.25, 0.95)
    colour = tuple(float(v) for v in np.clip(value * (grey + (1 - grey) * (0.4 + 1.2 * hue)), 0, 1))
    accent = tuple(float(v) for v in np.clip(np.array(colour) * rng.uniform(0.35, 1.6) + rng.normal(0, 0.05, 3), 0, 1))
    return Background(kind, colour, accent, int(rng.integers(1 << 30)))


def _draw_camera(rng: np.random.Generator) -> Camera:
    return Camera(
        distance=float(rng.uniform(6.5, 14)),
        exposure=_near(rng, 0, 0.2, -0.5, 0.5),
        balance=_about(rng, 0.4),
        blur=float(rng.uniform(0.3, 0.65)),
        noise=float(rng.uniform(0.002, 0.010)),
        vignette=float(rng.uniform(0, 0.25)),
        seed=int(rng.integers(1 << 30)),
    )


def _draw_clothes(rng: np.random.Generator) -> Clothes:
    first = int(rng.integers(len(_CLOTHES)))
    second = (first + 1 + int(rng.integers(len(_CLOTHES) - 1))) % len(_CLOTHES)
    return Clothes(
        kind=CLOTHES[_pick(rng, (0.4, 0.25, 0.25, 0.1))],
        colour=_tint(rng, _CLOTHES[first], 0.12),
        accent=_tint(rng, _CLOTHES[second], 0.12),
        pattern=float(rng.random()) if rng.random() < 0.3 else 0.0,
        seed=int(rng.integers(1 << 30)),
    )


FRAMES_PER_SECOND = 25.0


def draw_clip(seed: int, index: int, frames: int) -> list[View]:
    """Views of ``frames`` consecutive frames at 25 per second: what video ``index`` of the world ``seed`` shows.

    The head sways, the eyes jump (saccades) and follow the head's turn between jumps, blink every few seconds, and
    the mouth talks or smiles; light, background, clothes and camera stay. The framing is that of a loose face crop.

    Raises:
        UserError: ``frames`` below 1, or a negative or non-integer number.
    """
    if isinstance(frames, bool) or not isinstance(frames, (int, np.integer)) or frames < 1:
        raise UserError(f"draw_clip: frames must be an integer of at least 1, got {frames!r}")
    rng = stream(_CLIPS, seed, index)
    first = draw_view(seed, int(rng.integers(1 << 40)))
    time = np.arange(frames) / FRAMES_PER_SECOND

    def sway(amplitude: float, slowest: float = 0.08, fastest: float = 0.6) -> np.ndarray:
        rates, phases = rng.uniform(slowest, fastest, 3), rng.uniform(0, 2 * math.pi, 3)
        return amplitude * np.sin(2 * math.pi * rates * time[:, None] + phases).mean(1)

    pitch, yaw, roll = (c + sway(a) for c, a in zip(first.pose, (0.12, 0.28, 0.08)))
    raised, smile = first.brow_raise + sway(0.4), np.clip(first.smile + sway(0.25), -0.4, 1)
    talks = rng.random() < 0.6
    talk = np.clip(sway(1.1, 1.5, 4.5), 0, 1) * np.clip(0.5 + sway(1.2, 0.1, 0.4), 0, 1) if talks else sway(0.05)
    mouth = np.clip(first.mouth_open * 0.4 + 0.7 * talk, 0, 0.9)
    gaze = _saccades(rng, time, np.array(first.gaze))
    opened = first.eye_open if first.eye_open > 0 else 1.0
    lids = opened * _blinks(rng, time)
    if first.occluder is not None and rng.random() < 0.5:
        first = replace(first, occluder=None)
    framing = Framing(scale=0.29 * math.exp(0.1 * rng.standard_normal()), x=first.framing.x, y=first.framing.y + 0.01)
    shift_x, shift_y = sway(0.03), sway(0.02)
    return [
        replace(
            first,
            pose=(float(np.clip(pitch[t], -0.43, 0.43)), float(np.clip(yaw[t], -0.78, 0.78)), float(roll[t])),
            gaze=(float(gaze[t, 0]), float(gaze[t, 1])),
            smile=float(smile[t]),
            mouth_open=float(mouth[t]),
            brow_raise=float(np.clip(raised[t], -1, 1)),
            eye_open=float(lids[t]),
            framing=replace(framing, x=framing.x + float(shift_x[t]), y=framing.y + float(shift_y[t])),
            camera=replace(first.camera, seed=first.camera.seed + t),
        )
        for t in range(frames)
    ]


def _saccades(rng: np.random.Generator, time: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Gaze [T, 2]: fixations of 0.3 to 2 s, jumps of about 50 ms, a little drift between."""
    gaze, now, at = np.tile(start, (len(time), 1)), float(rng.uniform(0.2, 1.5)), start
    while now < time[-1]:
        target = start + rng.normal(0, (0.07, 0.14))
        gaze += np.clip((time - now) / 0.05, 0, 1)[:, None] * (target - at)
        at, now = target, now + float(rng.uniform(0.3, 2.0))
    return gaze + 0.004 * np.sin(time[:, None] * (5.1, 3.7))


def _blinks(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Openness [T] in [0, 1]: a blink of about 0.25 s every 2 to 5 s."""
    opened, now = np.ones(len(time)), float(rng.uniform(0.1, 4.0))
    while now < time[-1] + 0.2:
        opened = np.minimum(opened, np.clip(np.abs(time - now) / 0.12 - 0.25, 0, 1))
        now += float(rng.uniform(2.0, 5.0))
    return opened
