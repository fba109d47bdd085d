"""From a photograph to a sketch of the face in it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyface.data.detect import Box, Detector, detect_faces
from pyface.errors import UserError
from pyface.methods.hida.depth import NONE, ROUGH, find_depth
from pyface.methods.hida.model import HIDA, style_weights
from pyface.methods.hida.recipe import PHOTO_SHARE, draw

CROP_SCALE = 1.3  # side of the crop over the longer side of the box, as much as FS2K and the procedural faces show
CROP_RAISE = 0.06  # how far the crop's centre lies above the box's, in sides of the box


@dataclass(frozen=True)
class Drawing:
    """A sketch and where it was taken from.

    Attributes:
        sketch: ndarray[S, S] uint8, white paper = 255.
        depth: ndarray[S, S] uint8, what the network was told; 0 background, nearer = brighter.
        crop: left, top, side of the square of the photo, in pixels.
        face: the face's box (x, y, width, height), or None where none was found.
    """

    sketch: np.ndarray
    depth: np.ndarray
    crop: tuple[int, int, int]
    face: Box | None


@lru_cache(maxsize=1)
def default_model() -> HIDA:
    """The network with the weights that come with the package, on the GPU if there is one."""
    from pyface.methods import create_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return create_model("hida", pretrained=True).to(device).eval()


def sketch_photo(
    photo: np.ndarray,
    style: int | Sequence[float] = 1,
    *,
    depth: str | Tensor = ROUGH,
    model: HIDA | None = None,
    box: Box | None = None,
    detector: str | Detector = "cascade",
    whole: bool = False,
    resize: bool = False,
) -> Drawing:
    """Draw the largest face of a photo.

    A square around the face, framed as in training, is brought to 250 pixels (at a network of 256), padded with zeros
    and drawn. Where no face is found the largest square in the middle is drawn without depth, and a warning says so.

    Args:
        photo: ndarray[H, W, 3] uint8, RGB.
        style: see :func:`~pyface.methods.hida.model.style_weights`.
        depth: Tensor[1, H, W] in [0, 1]; or a file, a predictor's name, ``"none"`` or ``"rough"``, see
            :func:`~pyface.methods.hida.depth.find_depth`.
        model: a network in evaluation mode; None takes the shipped one.
        box: the face (x, y, width, height) from hair to chin, instead of detection.
        detector: a name for :func:`pyface.data.detect.get_detector`, or the detector itself.
        whole: the photo is an aligned face crop already, as in FS2K: take all of it.
        resize: stretch the crop to the network's full side instead of padding it, and the sketch back to the crop's
            side, as the authors' test script does.

    Raises:
        UserError: a box outside the photo, ``whole`` with sides that differ, or what style and depth raise.
    """
    model = default_model() if model is None else model
    height, width = photo.shape[:2]
    weights = style_weights(style)
    face = _face(photo, box, detector)
    if whole:
        if height != width:
            raise UserError(f"a whole face crop must be square, got {width} x {height} pixels; crop it, or give a box")
        left, top, side = 0, 0, width
    elif face is not None:
        left, top, side = _square(face, height, width)
    else:
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
    if face is None and isinstance(depth, str) and depth == ROUGH:
        warnings.warn("no face was found, so there is no depth; give its box x,y,width,height (--box)", stacklevel=2)
        depth = NONE
    relief = find_depth(depth, photo, face) if isinstance(depth, str) else depth
    if relief.shape != (1, height, width):
        raise UserError(f"depth must be Tensor[1, {height}, {width}], got {tuple(relief.shape)}")

    pixels = torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1))).float() / 255
    both = torch.cat((pixels, relief))[:, top : top + side, left : left + side]
    size = model.image_size if resize else round(model.image_size * PHOTO_SHARE)
    both = _resized(both[None], size, antialias=not resize)
    drawn = draw(model, both[:, :3], both[:, 3:], weights)
    if resize:
        drawn = _resized(drawn, side, antialias=False)
    return Drawing(_to_bytes(drawn), _to_bytes(both[:, 3:]), (left, top, side), face)


def _face(photo: np.ndarray, box: Box | None, detector: str | Detector) -> Box | None:
    height, width = photo.shape[:2]
    if box is None:
        return max(detect_faces(photo, detector), key=lambda one: one[2] * one[3], default=None)
    x, y, w, h = box
    if w < 1 or h < 1 or x + w <= 0 or y + h <= 0 or x >= width or y >= height:
        raise UserError(f"the box {x},{y},{w},{h} lies outside the photo of {width} x {height} pixels")
    return box


def _square(face: Box, height: int, width: int) -> tuple[int, int, int]:
    """Left, top, side of the crop; moved into the photo, and no larger than its shorter side."""
    x, y, w, h = face
    long = max(w, h)
    side = min(round(CROP_SCALE * long), height, width)
    left, top = round(x + w / 2 - side / 2), round(y + h / 2 - CROP_RAISE * long - side / 2)
    return min(max(left, 0), width - side), min(max(top, 0), height - side), side


def _resized(image: Tensor, side: int, antialias: bool) -> Tensor:
    if image.shape[-2:] == (side, side):
        return image
    return F.interpolate(image, (side, side), mode="bilinear", align_corners=False, antialias=antialias)


def _to_bytes(image: Tensor) -> np.ndarray:
    return image[0, 0].clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
