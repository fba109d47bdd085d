"""Depth of a face for HIDA: from a file, from a predictor, or the rough head that stands in for both.

Everywhere: Tensor[1, H, W] float32 in [0, 1], 0 is background, nearer is brighter.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyface.data.detect import Box
from pyface.data.plugins import find_plugin, installed
from pyface.errors import UserError

ENTRY_POINT_GROUP = "pyface.depth"
NONE, ROUGH = "none", "rough"

# The rough head in units of the detected box (hair to chin), measured on procedural faces.
_HEAD = (0.5, 0.38, 0.32, 0.465)  # centre x, y and half axes
_EARS = (0.5, 0.50, 0.36, 0.12)
_NECK = (0.5, 0.17)  # centre x, half width
_CHIN = 0.84
_SHOULDERS = (0.5, 1.38, 0.68, 0.44)
_NOSE = (0.5, 0.61, 0.05, 0.07)


class DepthPredictor(Protocol):
    """Sees how near everything is."""

    def __call__(self, photo: np.ndarray, box: Box | None, /) -> np.ndarray | Tensor:
        """ndarray[H, W, 3] uint8 RGB and the face's box (None: unknown) -> [H, W] floats in [0, 1], nearer = brighter,
        background 0."""


_REGISTRY: dict[str, Callable[[], DepthPredictor]] = {}


def register_depth(name: str, make: Callable[[], DepthPredictor]) -> None:
    """Add a predictor under ``name``; ``make()`` is called when it is used. UserError if the name is taken."""
    if name in _REGISTRY:
        raise UserError(f"depth predictor {name!r} is already registered; choose another name")
    _REGISTRY[name] = make


def list_depth() -> list[str]:
    """Names that :func:`get_depth` knows, sorted: registered ones and installed entry points."""
    return sorted({*_REGISTRY, *installed(ENTRY_POINT_GROUP)})


def get_depth(name: str) -> DepthPredictor:
    """The predictor called ``name``: registered, an entry point of ``pyface.depth``, or "module:function".

    Raises:
        UserError: there is none, or it cannot be imported.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]()
    predictor = find_plugin(name, ENTRY_POINT_GROUP, "depth predictor")
    if predictor is not None:
        if not callable(predictor):
            raise UserError(f"depth predictor {name!r} is not callable")
        return predictor
    raise UserError(
        f"{name!r} is neither a depth file nor a predictor; give a PNG or .npy, {NONE}, {', '.join(list_depth())}, or "
        f"module:function"
    )


def find_depth(source: str, photo: np.ndarray, box: Box | None) -> Tensor:
    """Depth of a photo from what a user names: a file, ``"none"``, or a predictor.

    Args:
        source: see :func:`read_depth` and :func:`get_depth`; ``"none"`` is no depth at all.
        photo: ndarray[H, W, 3] uint8, RGB.
        box: of the face, if there is one.

    Returns:
        Tensor[1, H, W].

    Raises:
        UserError: no such thing, the wrong size, or brightness that runs the wrong way.
    """
    height, width = photo.shape[:2]
    if source == NONE:
        return torch.zeros(1, height, width)
    if os.path.isfile(source) or Path(source).suffix.lower() in (".png", ".npy"):
        depth = read_depth(source)
        if depth.shape[1:] != (height, width):
            raise UserError(
                f"{source} is {depth.shape[2]} x {depth.shape[1]} pixels and the photo {width} x {height}; they must "
                f"cover the same area pixel by pixel"
            )
        return depth
    found = torch.as_tensor(get_depth(source)(photo, box))
    if not found.is_floating_point() or found.shape != (height, width) or not bool(((found >= 0) & (found <= 1)).all()):
        raise UserError(
            f"depth predictor {source!r} must return floats [{height}, {width}] in [0, 1], got {found.dtype} "
            f"{list(found.shape)}"
        )
    return _checked(found[None].float(), source)


def read_depth(path: str | os.PathLike) -> Tensor:
    """A depth map from a file, Tensor[1, H, W].

    PNG of 8 or 16 bits, grey or (as 3DDFA_V2 writes it) with three equal channels, other picture files of 8 bits, or a
    NumPy array [H, W] (or with one more dimension of size 1): whole numbers are divided by their type's largest value;
    floats must be in [0, 1].

    Raises:
        UserError: missing or damaged, colours, values out of range, or nearer is darker.
    """
    path = Path(path)
    values = _read_array(path) if path.suffix.lower() == ".npy" else _read_picture(path)
    return _checked(torch.from_numpy(np.ascontiguousarray(values, np.float32))[None], os.fspath(path))


def _read_array(path: Path) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a NumPy array of numbers ({error})") from error
    values = np.squeeze(values)
    if values.ndim != 2 or values.dtype.kind not in "fu":
        raise UserError(
            f"{path} must hold floats in [0, 1] or unsigned whole numbers [H, W], got {values.dtype} "
            f"{list(values.shape)}"
        )
    if values.dtype.kind == "u":
        return values / np.iinfo(values.dtype).max
    if not ((values >= 0) & (values <= 1)).all():
        raise UserError(
            f"{path} holds values from {np.min(values):g} to {np.max(values):g}; scale depth to [0, 1], nearer = "
            f"brighter, background 0"
        )
    return values


def _read_picture(path: Path) -> np.ndarray:
    from pyface.data.images import PNG_SIGNATURE, read_photo

    try:
        with open(path, "rb") as file:
            head = file.read(26)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if head.startswith(PNG_SIGNATURE) and len(head) > 25 and head[24] == 16:
        return _read_png16(path, head)
    pixels = read_photo(path).pixels
    if int(np.ptp(pixels.astype(np.int16), axis=2).max()) > 8:  # JPEG may tint grey a little
        raise UserError(f"{path} is a colour picture; a depth map is grey, nearer = brighter, background 0")
    return pixels.mean(2) / 255


def _read_png16(path: Path, head: bytes) -> np.ndarray:
    from PIL import Image

    if head[25] != 0:  # Pillow cuts 16-bit colour to 8 bits
        raise UserError(f"{path} has 16-bit colour; save depth as 16-bit grey or as 8 bits")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return np.asarray(image).astype(np.float64) / 65535
    except Exception as error:  # a parser fed with hostile bytes may raise anything at all
        raise UserError(f"{path} is cut off or damaged and cannot be decoded ({error})") from error


def _checked(depth: Tensor, source: str) -> Tensor:
    """The map, if what lies inside is nearer than its rim, as with a head; a map of zeros with a warning."""
    step = math.ceil(max(depth.shape) / 100)
    small = depth[:, ::step, ::step]
    there = small > 0
    if not there.any():
        warnings.warn(f"depth from {source} is 0 everywhere: the drawing will be flat", stacklevel=3)
        return depth
    missing = F.pad((~there).float(), (3, 3, 3, 3), value=1.0)
    rim = there & (F.max_pool2d(missing[None], 7, 1)[0] > 0)
    inside = there & ~rim
    if inside.any() and small[inside].mean() < small[rim].mean():
        raise UserError(
            f"depth from {source} is darker inside than at the rim; nearer must be brighter and the background 0: "
            f"invert it"
        )
    return depth


def rough_head(height: int, width: int, box: Box | tuple[float, float, float, float]) -> Tensor:
    """A head with neck and shoulders, seen from the front: what stands in for depth where nothing else knows it.

    An ellipsoid with a nose, a cylinder and a mound, as large as the box says, in the scale of the procedural faces'
    depth (about 0.9 at the nose, 0.5 at the neck).

    Args:
        height, width: of the result, pixels.
        box: of the face as detectors give it (x, y, width, height, from hair to chin), pixels.

    Returns:
        Tensor[1, height, width].
    """
    x, y, w, h = box
    v, u = torch.meshgrid(
        (torch.arange(height) + 0.5 - y) / max(h, 1), (torch.arange(width) + 0.5 - x) / max(w, 1), indexing="ij"
    )

    def mound(shape: tuple[float, float, float, float], base: float, rise: float) -> Tensor:
        cx, cy, a, b = shape
        inside = 1 - ((u - cx) / a).square() - ((v - cy) / b).square()
        return torch.where(inside > 0, base + rise * inside.clamp(min=0).sqrt(), torch.zeros(()))

    head = mound(_HEAD, 0.50, 0.34)
    cx, cy, a, b = _NOSE
    nose = 0.1 * torch.exp(-0.5 * (((u - cx) / a).square() + ((v - cy) / b).square()))
    head = torch.where(head > 0, head + nose, head)
    across = 1 - ((u - _NECK[0]) / _NECK[1]).square()
    neck = torch.where((across > 0) & (v > _CHIN - 0.25), 0.42 + 0.12 * across.clamp(min=0).sqrt(), torch.zeros(()))
    parts = torch.stack((head, mound(_EARS, 0.42, 0.1), neck, mound(_SHOULDERS, 0.36, 0.1)))
    return parts.amax(0).clamp(0, 1)[None]


def _rough(photo: np.ndarray, box: Box | None) -> Tensor:
    if box is None:
        return torch.zeros(photo.shape[:2])
    return rough_head(*photo.shape[:2], box)[0]


register_depth(ROUGH, lambda: _rough)
