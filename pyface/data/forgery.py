"""Forged clips of procedural people: five families of manipulation, each with the traces of the real one.

=================  ==================  =============================================================================
``method``         like                trace
=================  ==================  =============================================================================
blend_swap         Deepfakes           a face of low (decoder) resolution, colour-matched, behind a feathered border;
                                       slight jitter of its place
reenactment        Face2Face           the person's own face with another clip's expression, rendered a little too
                                       smooth; a gaze that agrees with neither head nor source
texture            NeuralTextures      lower face from an up-sampling generator: periodic peaks in the spectrum
colour_transfer    (no border at all)  another person's appearance in the low frequencies of the whole head
splice             FaceSwap            a photo warped over the landmarks, hard edge, another JPEG history
=================  ==================  =============================================================================

:func:`forge` renders and forges people of :mod:`pyface.data.procedural`. The steps that need no renderer take images
and landmarks, so they serve for real photos too: :func:`blend_face`, :func:`generate_texture`,
:func:`transfer_appearance`, :func:`splice_face`. All run on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyface.data.obfuscators import gaussian_blur
from pyface.errors import UserError

if TYPE_CHECKING:
    from pyface.data.procedural import Person, View

FORGERIES = ("blend_swap", "reenactment", "texture", "colour_transfer", "splice")

GAZE_OFFSET = (0.22, 0.45)
"""Radians (about 13 to 26 degrees) by which the gaze of a re-enacted clip is off, uniform, one draw per clip. Its
direction is one that also turns the eyes off the head's direction, by at least the lower number and less than
GAZE_LIMIT, as far as there is one."""
GAZE_LIMIT = 0.6
"""Radians between gaze and head beyond which eyes would leave their sockets."""
GAZE_JITTER = 0.02
"""Standard deviation in radians of the slow wander of that offset, per angle."""
DECODER_SIDE = 64
"""Pixels per side of what the decoder of a swapped face puts out, for a box a quarter larger than the landmarks'."""
RIPPLE = (0.025, 0.015)
"""Uneven gain of the texture generator's transposed convolutions: relative amplitude at period 2 and at period 4."""
SPLICE_QUALITY = (55, 75)
"""JPEG quality of the spliced face, uniform, one draw per clip; the finished frames are saved at FINAL_QUALITY."""
FINAL_QUALITY = 95

# Landmarks of the iBUG order: the jaw and the base of the nose.
_LOWER_FACE = np.r_[3:14, 31, 35]
_HEAD_IDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)


@dataclass(frozen=True)
class Forgery:
    """A forged clip of T frames.

    Attributes:
        images: Tensor[T, 3, H, W] float32, multiples of 1/255 in [0, 1].
        masks: Tensor[T, 1, H, W] float32 in [0, 1], share of forged content; where it is 0 the frame is the original
            (after one JPEG compression at :data:`FINAL_QUALITY` for ``splice``).
        originals: Tensor[T, 3, H, W], the same views before the forgery.
        method: one of :data:`FORGERIES`.
        identity, source_identity: of the person in the frames, and of whose face or expression was used.
        gaze: Tensor[T, 2] radians (pitch, yaw), camera coordinates: what the eyes in ``images`` show.
        original_gaze: Tensor[T, 2], what the eyes in ``originals`` show; other than ``gaze`` for ``reenactment`` only.
    """

    images: Tensor
    masks: Tensor
    originals: Tensor
    method: str
    identity: int
    source_identity: int
    gaze: Tensor
    original_gaze: Tensor


def forge(
    method: str, person: Person, views: Sequence[View], source: Person, *, seed: int = 0, image_size: int = 128
) -> Forgery:
    """Forge a clip.

    What characterises the forger (mask, colour, qualities, offset of the gaze) is drawn once for the clip; only the
    place of the face jitters from frame to frame, as landmark detectors do.

    Args:
        method: one of :data:`FORGERIES`.
        person: who is seen in the original.
        views: one per frame, at least one.
        source: another person: whose face is put in, or whose expression is put on (reenactment, texture).
        seed: non-negative; the same arguments give the same clip.
        image_size: side of the frames in pixels.

    Raises:
        UserError: unknown method, no view, source and person are the same, or a negative seed.
    """
    from pyface.data.procedural import render

    if method not in FORGERIES:
        raise UserError(f"forge: unknown method {method!r}; known: {', '.join(FORGERIES)}")
    if not views:
        raise UserError("forge: a clip needs at least one view")
    if person == source:
        raise UserError("forge: source must be another person than the one in the clip")
    if seed < 0:
        raise UserError(f"forge: seed must be at least 0, got {seed}")
    rng = np.random.default_rng((seed, FORGERIES.index(method)))
    samples = render([person] * len(views), views, image_size)
    clip = _Clip(person, list(views), source, image_size, samples, rng)
    images, masks, gaze = _FAMILIES[method](clip)
    originals, original_gaze = clip.stack("image"), clip.stack("gaze")
    return Forgery(
        images=images,
        masks=masks,
        originals=originals,
        method=method,
        identity=person.identity,
        source_identity=source.identity,
        gaze=original_gaze.clone() if gaze is None else gaze,
        original_gaze=original_gaze,
    )


def blend_face(
    target: Tensor, face: Tensor, landmarks: Tensor, face_landmarks: Tensor, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Swap faces as autoencoder tools do: align, decode at low resolution, match colours, blend behind a soft border.

    Args:
        target: Tensor[T, 3, H, W] in [0, 1], the frames.
        face: Tensor[T, 3, H, W] in [0, 1], what takes the place of the face, in a similar pose.
        landmarks, face_landmarks: Tensor[T, 68, 2], (x, y) pixels in ``target`` and in ``face``.
        seed: of border, decoder and jitter.

    Returns:
        (images Tensor[T, 3, H, W], masks Tensor[T, 1, H, W]), as :class:`Forgery` has them.
    """
    frames, size = _check_frames("blend_face", target, face=face)
    _check("blend_face", (frames, 68, 2), landmarks=landmarks, face_landmarks=face_landmarks)
    rng = np.random.default_rng((seed, 0))
    points, face_points = _points(landmarks), _points(face_landmarks)
    extent = _extent(points)
    jitter = _wander(rng, frames, 2) * 0.007 * extent
    maps = np.stack([_similarity(p, q) for p, q in zip(points + jitter[:, None], face_points)])
    aligned = _affine(face, maps)
    # Where the decoder has more pixels than the frame, resampling still costs a little sharpness.
    scale = max(1.25 * extent / DECODER_SIDE, 1.3) * rng.uniform(0.9, 1.2)
    small = [max(8, round(length / scale)) for length in size]
    decoded = F.interpolate(aligned, small, mode="bilinear", antialias=True, align_corners=False)
    decoded = F.interpolate(decoded, size, mode="bicubic", align_corners=False).clamp(0, 1)
    feather = extent * rng.uniform(0.09, 0.16)
    masks = _hulls(_outline(points), size, feather)
    matched = _match_colours(decoded, target, masks > 0.5)
    return _compose(target, matched, masks), masks


def generate_texture(target: Tensor, texture: Tensor, masks: Tensor, *, seed: int = 0) -> Tensor:
    """Put ``texture`` through an up-sampling generator and show it where ``masks`` say.

    The generator keeps the finest band of its input (a skip connection) and rebuilds the two coarser ones by transposed
    convolutions of kernel 3 and stride 2. Their overlap is uneven (Odena et al., "Deconvolution and Checkerboard
    Artifacts", 2016), so gain depends on the parity of the pixel: peaks at periods 2 and 4 in the spectrum.

    Args:
        target, texture: Tensor[T, 3, H, W] in [0, 1].
        masks: Tensor[T, 1, H, W] in [0, 1].
        seed: of the generator's weights.

    Returns:
        Tensor[T, 3, H, W], multiples of 1/255.
    """
    frames, (height, width) = _check_frames("generate_texture", target, texture=texture)
    _check("generate_texture", (frames, 1, height, width), masks=masks)
    rng = np.random.default_rng((seed, 2))
    padded = F.pad(texture, (0, -width % 4, 0, -height % 4), mode="replicate")
    half = _halve(padded)
    quarter = _halve(half)
    finest = padded - _double(half, rng, 0.0)
    middle = half - _double(quarter, rng, 0.0)
    rebuilt = _double(_double(quarter, rng, RIPPLE[1]) + middle, rng, RIPPLE[0])
    rebuilt = (rebuilt + 0.6 * finest)[..., :height, :width].clamp(0, 1)
    return _compose(target, rebuilt, masks)


def transfer_appearance(target: Tensor, source: Tensor, heads: Tensor, source_heads: Tensor) -> tuple[Tensor, Tensor]:
    """Give a head the low-frequency colours of another in CIE Lab: no geometry moves and there is no border.

    The lowest level of a Laplacian pyramid is exchanged, what lies above keeps its place and takes on the source's
    contrast. The change fades out towards the edge of the head.

    Args:
        target, source: Tensor[T, 3, H, W] in [0, 1], heads in about the same place.
        heads, source_heads: Tensor[T, 1, H, W], true or 1 on the head, hair included.

    Returns:
        (images Tensor[T, 3, H, W], masks Tensor[T, 1, H, W]), as :class:`Forgery` has them.
    """
    frames, size = _check_frames("transfer_appearance", target, source=source)
    _check("transfer_appearance", (frames, 1, *size), heads=heads, source_heads=source_heads)
    heads, source_heads = heads.float(), source_heads.float()
    extent = float(heads.sum((1, 2, 3)).mean()) ** 0.5
    masks = _fade(heads, 0.15 * extent)
    lab, source_lab = _to_lab(target), _to_lab(source)
    low, source_low = (_masked_blur(x, m, extent / 10) for x, m in ((lab, heads), (source_lab, source_heads)))
    detail, source_detail = lab - low, source_lab - source_low
    gain = (_spread(source_detail, source_heads) / _spread(detail, heads)).clamp(0.75, 1.35)
    return _compose(target, _from_lab(source_low + gain * detail), masks), masks


def splice_face(
    target: Tensor, photo: Tensor, landmarks: Tensor, photo_landmarks: Tensor, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Warp a photo over the landmarks, cut it in with a hard edge, and save.

    The warp is affine on each of the landmarks' Delaunay triangles. The layer with the warped face was saved as JPEG
    of a quality from :data:`SPLICE_QUALITY` before the frame was saved at :data:`FINAL_QUALITY`: inside the mask the
    file is compressed twice, outside once (a "JPEG ghost", Farid 2009).

    Args:
        target: Tensor[T, 3, H, W] in [0, 1].
        photo: Tensor[3, H', W'] in [0, 1].
        landmarks, photo_landmarks: Tensor[T, 68, 2] and Tensor[68, 2], (x, y) pixels.
        seed: of the qualities and the jitter of the landmarks.

    Returns:
        (images Tensor[T, 3, H, W], masks Tensor[T, 1, H, W] of zeros and ones), as :class:`Forgery` has them.
    """
    from scipy.interpolate import LinearNDInterpolator

    frames, (height, width) = _check_frames("splice_face", target)
    _check("splice_face", (frames, 68, 2), landmarks=landmarks)
    _check("splice_face", (68, 2), photo_landmarks=photo_landmarks)
    rng = np.random.default_rng((seed, 4))
    quality = int(rng.integers(SPLICE_QUALITY[0], SPLICE_QUALITY[1] + 1))
    points = _points(landmarks)
    points = points + _wander(rng, frames, 2)[:, None] * 0.005 * _extent(points)
    y, x = np.mgrid[0:height, 0:width]
    places = np.stack([LinearNDInterpolator(p, _points(photo_landmarks))(x, y) for p in points])  # NaN off the hull
    masks = torch.from_numpy(np.isfinite(places[..., 0])).float()[:, None]
    warped = _sample(photo.expand(frames, -1, -1, -1), np.nan_to_num(places))
    # A crude colour correction, as the tool has: half of the difference of the means.
    shift = ((target - warped) * masks).sum((0, 2, 3)) / masks.sum().clamp(min=1)
    warped = (warped + 0.5 * shift.view(1, 3, 1, 1)).clamp(0, 1)
    layer = _saved(torch.where(masks > 0, warped, target), quality)
    return _saved(torch.where(masks > 0, layer, target), FINAL_QUALITY), masks


def _check_frames(step: str, target: Tensor, **others: Tensor) -> tuple[int, tuple[int, int]]:
    """Number and size of the frames, once ``target`` is a clip and ``others`` have its shape."""
    if target.ndim != 4 or target.shape[1] != 3 or 0 in target.shape or not target.is_floating_point():
        raise UserError(
            f"{step}: target must be a floating point Tensor[T, 3, H, W] that is not empty, "
            f"got {target.dtype} {tuple(target.shape)}"
        )
    _check(step, tuple(target.shape), **others)
    return len(target), tuple(target.shape[-2:])


def _check(step: str, shape: tuple[int, ...], **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape:
            raise UserError(f"{step}: {name} must be Tensor{list(shape)}, got {tuple(tensor.shape)}")


@dataclass(frozen=True)
class _Clip:
    """What a family needs to forge one clip; ``rng`` is the clip's own."""

    person: Person
    views: list[View]
    source: Person
    size: int
    samples: list[dict]
    rng: np.random.Generator

    def stack(self, key: str, samples: list[dict] | None = None) -> Tensor:
        return torch.stack([torch.as_tensor(sample[key]) for sample in samples or self.samples])

    def seed(self) -> int:
        return int(self.rng.integers(1 << 31))

    def driven(self) -> list[View]:
        """The views with the expression of another clip."""
        from pyface.data.procedural import draw_clip

        others = draw_clip(self.seed(), self.source.identity, len(self.views))
        return [
            replace(view, smile=other.smile, mouth_open=other.mouth_open, brow_raise=other.brow_raise)
            for view, other in zip(self.views, others)
        ]


def _blend_swap(clip: _Clip) -> tuple:
    from pyface.data.procedural import render

    faces = render([clip.source] * len(clip.views), clip.views, clip.size)
    images, masks = blend_face(
        clip.stack("image"), clip.stack("image", faces), clip.stack("landmarks"), clip.stack("landmarks", faces),
        seed=clip.seed(),
    )  # fmt: skip
    return images, masks, None


def _reenactment(clip: _Clip) -> tuple:
    from pyface.data.procedural import render

    rng, views = clip.rng, clip.driven()
    angles, size = rng.uniform(0, 2 * np.pi, 64), rng.uniform(*GAZE_OFFSET)
    choices = np.stack((0.5 * np.sin(angles), np.cos(angles)), 1)  # eyes turn sideways more than up and down
    choices *= size / np.linalg.norm(choices, axis=1, keepdims=True)
    from_head = np.mean([np.subtract(view.gaze, view.pose[:2]) for view in views], 0) + choices
    from_head = np.linalg.norm(from_head, axis=1)
    offset = choices[np.argmax((from_head > GAZE_OFFSET[0]) & (from_head < GAZE_LIMIT))]
    offsets = offset + GAZE_JITTER * _wander(rng, len(views), 2)
    views = [replace(view, gaze=tuple(float(v) for v in view.gaze + off)) for view, off in zip(views, offsets)]
    acted = render([clip.person] * len(views), views, clip.size)
    both = np.concatenate([_outline(_points(clip.stack("landmarks", s))) for s in (clip.samples, acted)], 1)
    masks = _hulls(both, (clip.size, clip.size), 0.05 * _extent(both))
    # The face model's albedo is smooth and its estimate of the light is slightly off.
    rendered = gaussian_blur(clip.stack("image", acted), 0.45 * clip.size / 128) * rng.uniform(0.96, 1.04)
    return _compose(clip.stack("image"), rendered.clamp(0, 1), masks), masks, clip.stack("gaze", acted)


def _texture(clip: _Clip) -> tuple:
    from pyface.data.procedural import render

    acted = render([clip.person] * len(clip.views), clip.driven(), clip.size)
    both = np.concatenate([_points(clip.stack("landmarks", s))[:, _LOWER_FACE] for s in (clip.samples, acted)], 1)
    masks = _hulls(both, (clip.size, clip.size), 0.07 * _extent(both))
    images = generate_texture(clip.stack("image"), clip.stack("image", acted), masks, seed=clip.seed())
    return images, masks, None


def _colour_transfer(clip: _Clip) -> tuple:
    from pyface.data.procedural import render

    others = render([clip.source] * len(clip.views), clip.views, clip.size)
    heads = [
        torch.isin(clip.stack("parsing", samples), torch.tensor(_HEAD_IDS))[:, None]
        for samples in (clip.samples, others)
    ]
    images, masks = transfer_appearance(clip.stack("image"), clip.stack("image", others), *heads)
    return images, masks, None


def _splice(clip: _Clip) -> tuple:
    from pyface.data.procedural import draw_view, render

    view = draw_view(clip.seed(), clip.source.identity)
    pose = tuple(float(v) for v in np.mean([v.pose for v in clip.views], 0))
    gaze = tuple(float(v) for v in np.mean([v.gaze for v in clip.views], 0))
    view = replace(view, pose=pose, gaze=gaze, eye_open=1.0, mouth_open=0.0, framing=clip.views[0].framing)
    view = replace(view, glasses="none", bangs=False, hat="none", occluder=None)
    photo = render([clip.source], [view], clip.size)[0]
    images, masks = splice_face(
        clip.stack("image"), photo["image"], clip.stack("landmarks"), photo["landmarks"], seed=clip.seed()
    )
    return images, masks, None


_FAMILIES = dict(zip(FORGERIES, (_blend_swap, _reenactment, _texture, _colour_transfer, _splice)))


def _points(landmarks: Tensor) -> np.ndarray:
    return landmarks.double().cpu().numpy()


def _wander(rng: np.random.Generator, frames: int, width: int) -> np.ndarray:
    """A slow random walk that stays around 0 with variance 1, ndarray[frames, width]."""
    walk, memory = rng.standard_normal((frames, width)), 0.8
    for t in range(1, frames):
        walk[t] = memory * walk[t - 1] + (1 - memory**2) ** 0.5 * walk[t]
    return walk


def _similarity(points: np.ndarray, onto: np.ndarray) -> np.ndarray:
    """The similarity [2, 3] that takes points [N, 2] closest to ``onto`` [N, 2] (Umeyama, without reflection)."""
    centre, goal = points.mean(0), onto.mean(0)
    a, b = (points - centre) @ (1, 1j), (onto - goal) @ (1, 1j)
    turn = (a.conj() @ b) / (a.conj() @ a).real
    linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    return np.concatenate((linear, (goal - linear @ centre)[:, None]), 1)


def _affine(images: Tensor, maps: np.ndarray) -> Tensor:
    """Each image seen through its map [2, 3] from pixels of the result to its own pixels."""
    y, x = np.mgrid[0 : images.shape[-2], 0 : images.shape[-1]]
    pixels = np.stack((x, y, np.ones_like(x)), -1).astype(np.float64)
    return _sample(images, np.einsum("hwk,tck->thwc", pixels, maps))


def _sample(images: Tensor, places: np.ndarray) -> Tensor:
    """Bicubic samples of images [T, 3, h, w] at places [T, H, W, 2], (x, y) pixels: Tensor[T, 3, H, W] in [0, 1]."""
    size = np.array([images.shape[-1], images.shape[-2]])
    grid = torch.from_numpy((places + 0.5) / size * 2 - 1).to(images.dtype)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1)


def _extent(points: np.ndarray) -> float:
    """How many pixels a face with landmarks [T, N, 2] measures, from side to side or from top to bottom."""
    return float((points.max(1) - points.min(1)).max(1).mean())


def _outline(points: np.ndarray) -> np.ndarray:
    """Jaw, brows and the forehead just above them, [T, 37, 2], of landmarks [T, 68, 2]."""
    brows = points[:, 17:27]
    up = brows.mean(1, keepdims=True) - points[:, 36:48].mean(1, keepdims=True)
    return np.concatenate((points[:, :27], brows + 0.8 * up), 1)


def _hulls(points: np.ndarray, size: tuple[int, int], feather: float) -> Tensor:
    """Soft masks of convex hulls of points [T, N, 2]: 0 at the border, 1 from ``feather`` pixels inside it on."""
    from scipy.spatial import ConvexHull

    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    pixels = np.stack((x, y, np.ones_like(x)), -1).astype(np.float64)
    inside = np.stack([-(pixels @ ConvexHull(p).equations.T).max(-1) for p in points])
    return _ease(torch.from_numpy(inside).float()[:, None] / feather)


def _ease(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _fade(masks: Tensor, reach: float) -> Tensor:
    """Soft masks [T, 1, H, W]: 0 off the given ones, whose holes are filled, growing to 1 over ``reach`` pixels."""
    from scipy.ndimage import binary_fill_holes, distance_transform_edt

    filled = [binary_fill_holes(mask) for mask in masks[:, 0].numpy()]
    # The picture's edge is no edge of the head: only distances to pixels off the head count.
    inside = [distance_transform_edt(mask) if not mask.all() else mask * reach for mask in filled]
    return _ease(torch.from_numpy(np.stack(inside)).float()[:, None] / reach)


def _compose(target: Tensor, layer: Tensor, masks: Tensor) -> Tensor:
    """The layer over the target, rounded to 8 bits; exactly the target where the mask is 0."""
    mixed = (target + masks * (layer - target)).clamp(0, 1)
    return torch.where(masks > 0, (mixed * 255).round() / 255, target)


def _match_colours(layer: Tensor, target: Tensor, where: Tensor) -> Tensor:
    """Mean and standard deviation of CIE Lab as the target's (Reinhard et al., 2001), over all frames: no flicker."""
    lab, goal = _to_lab(layer), _to_lab(target)
    where = where.expand_as(lab).float()
    count = where.sum((0, 2, 3), keepdim=True).clamp(min=1)
    mean, goal_mean = ((x * where).sum((0, 2, 3), keepdim=True) / count for x in (lab, goal))
    gain = _spread(goal - goal_mean, where) / _spread(lab - mean, where)
    return _from_lab((lab - mean) * gain.clamp(0.7, 1.4) + goal_mean)


def _spread(x: Tensor, where: Tensor) -> Tensor:
    """Root mean square of zero-mean [T, 3, H, W] over masked pixels of all frames, [1, 3, 1, 1]."""
    where = where.expand_as(x)
    power = (x.square() * where).sum((0, 2, 3), keepdim=True) / where.sum((0, 2, 3), keepdim=True).clamp(min=1)
    return power.sqrt().clamp(min=1e-3)


def _masked_blur(x: Tensor, where: Tensor, sigma: float) -> Tensor:
    """Gaussian average over masked pixels only."""
    return gaussian_blur(x * where, sigma) / gaussian_blur(where, sigma).clamp(min=1e-4)


def _to_lab(images: Tensor) -> Tensor:
    from skimage.color import rgb2lab

    return torch.from_numpy(rgb2lab(images.float().numpy(), channel_axis=1)).float()


def _from_lab(lab: Tensor) -> Tensor:
    import warnings

    from skimage.color import lab2rgb

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # colours outside sRGB are clipped, which is what is wanted
        return torch.from_numpy(lab2rgb(lab.numpy(), channel_axis=1)).float().clamp(0, 1)


def _halve(x: Tensor) -> Tensor:
    """Half the size: binomial filter, then the pixels of even place, where :func:`_double` puts them back."""
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype)
    weight = (taps[:, None] * taps).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight, stride=2, groups=3)


def _double(x: Tensor, rng: np.random.Generator, ripple: float) -> Tensor:
    """Twice the size by a transposed convolution (kernel 3, stride 2); ``ripple`` is the unevenness of its gain.

    Taps (1/2, 1, 1/2) are linear interpolation, of equal gain everywhere; a larger middle tap favours every second
    pixel.
    """
    taps = np.empty((3, 1, 3, 3))
    for channel in range(3):
        rows, cols = (1 + ripple * rng.choice((-1, 1)) * rng.uniform(0.8, 1.2) for _ in range(2))
        row, col = (np.array([1 - middle / 2, middle, 1 - middle / 2]) for middle in (rows, cols))
        taps[channel, 0] = np.outer(row, col)
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    weight = torch.from_numpy(taps).to(x.dtype)
    return F.conv_transpose2d(padded, weight, stride=2, padding=1, groups=3)[..., : 2 * x.shape[-2], : 2 * x.shape[-1]]


def _saved(images: Tensor, quality: int) -> Tensor:
    """What is left of [T, 3, H, W] after JPEG at ``quality``, chroma at full resolution."""
    from PIL import Image

    frames = []
    for frame in (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy():
        file = BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality, subsampling=0)
        with Image.open(file) as picture:
            frames.append(np.array(picture))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
