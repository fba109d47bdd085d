"""Obfuscators: what a protected face is made to look like.

Every one maps a picture Tensor[B, 3, H, W] in [-1, 1] to the same shape and range, for any H and W. Strengths are
given in pixels of a face 256 pixels high (as PRO-Face S does) and scaled with the shorter side of the picture, so
that a face is hidden equally well at any size.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyface.data.plugins import find_plugin, installed
from pyface.errors import UserError

REFERENCE_SIZE = 256
ENTRY_POINT_GROUP = "pyface.obfuscators"


@dataclass(frozen=True)
class Obfuscator:
    """One entry of the registry.

    Attributes:
        apply: ``apply(image, strength_in_pixels_of_this_picture) -> obfuscated``.
        strength: the fixed strength used for tests and deployment, at 256 pixels.
        training_range: strengths are drawn uniformly from this closed range while training, at 256 pixels.
        scaled: whether strength is a length that follows the size of the face.
    """

    apply: Callable[[Tensor, float], Tensor]
    strength: float
    training_range: tuple[float, float]
    scaled: bool = True


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of standard deviation ``sigma`` pixels, separable, mirrored borders, support of +-2 sigma.

    The released kernel has 61 taps for a sigma of 15: it stops at two standard deviations, and so does this one.
    """
    radius = max(1, round(2 * sigma))
    taps = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    taps = torch.exp(-0.5 * (taps / sigma) ** 2)
    taps = taps / taps.sum()
    batch, channels, height, width = image.shape
    flat = image.reshape(batch * channels, 1, height, width)
    flat = F.conv2d(_mirror(flat, 0, radius), taps.view(1, 1, 1, -1))
    flat = F.conv2d(_mirror(flat, radius, 0), taps.view(1, 1, -1, 1))
    return flat.view_as(image)


def pixelate(image: Tensor, block: float, legacy: bool = False) -> Tensor:
    """Mosaic with cells of about ``block`` pixels: the average of each cell, spread over it.

    With ``legacy`` the cell takes a bilinear sample at its centre, as the released code does; that aliases.
    """
    height, width = image.shape[-2:]
    rows, cols = (max(1, int(size / block)) for size in (height, width))
    if legacy:
        small = F.interpolate(image, (rows, cols), mode="bilinear", align_corners=False)
    row_of, col_of = _cells(height, rows, image), _cells(width, cols, image)
    if not legacy:
        # Averages over exactly the pixels that show the cell; adaptive pooling would let neighbours overlap.
        by_row = F.one_hot(row_of, rows).to(image.dtype)
        by_col = F.one_hot(col_of, cols).to(image.dtype)
        small = (by_row / by_row.sum(0)).T @ image @ (by_col / by_col.sum(0))
    return small[..., row_of, :][..., col_of]


def median_blur(image: Tensor, kernel: float) -> Tensor:
    """Median over a square of about ``kernel`` pixels (made odd, at least 3), mirrored borders, on 8-bit values.

    A sliding histogram per row: memory does not grow with the kernel, unlike an unfolded sort.
    """
    from skimage.filters.rank import median

    radius = max(1, int(kernel) // 2)
    side = 2 * radius + 1
    footprint = np.ones((side, side), np.uint8)
    padded = _mirror(image.detach().float().cpu(), radius, radius)
    levels = ((padded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    planes = levels.reshape(-1, *levels.shape[-2:])
    inside = (slice(radius, -radius), slice(radius, -radius))
    result = np.stack([median(plane, footprint)[inside] for plane in planes])
    result = torch.from_numpy(result).view(image.shape)
    return (result.to(image.device, image.dtype) / 127.5 - 1).clamp(-1, 1)


def sticker(picture: Tensor) -> Obfuscator:
    """An obfuscator that lays an RGBA picture over the face; register it under a name of your own.

    Args:
        picture: Tensor[4, h, w], colours in [-1, 1] and alpha in [0, 1]; it is resized to the face. Strength is alpha's
            factor in [0, 1].
    """
    if picture.ndim != 3 or picture.shape[0] != 4:
        raise UserError(f"sticker: expected an RGBA picture Tensor[4, h, w], got shape {tuple(picture.shape)}")

    def apply(image: Tensor, opacity: float) -> Tensor:
        layer = F.interpolate(
            picture[None].to(image), image.shape[-2:], mode="bilinear", align_corners=False, antialias=True
        )
        alpha = (layer[:, 3:] * opacity).clamp(0, 1)
        return image * (1 - alpha) + layer[:, :3].clamp(-1, 1) * alpha

    return Obfuscator(apply, strength=1.0, training_range=(1.0, 1.0), scaled=False)


def face_swap(swap: Callable[[Tensor], Tensor]) -> Obfuscator:
    """An obfuscator that puts another face in place of this one, with a face swapping network of the user's own.

    Args:
        swap: faces Tensor[B, 3, H, W] in [-1, 1] -> swapped faces of the same shape and range. Strength is their share
            in the result, at most 1; the default of 1 shows the swapped face alone.
    """

    def apply(image: Tensor, share: float) -> Tensor:
        swapped = swap(image)
        if not isinstance(swapped, Tensor) or swapped.shape != image.shape:
            got = tuple(swapped.shape) if isinstance(swapped, Tensor) else type(swapped).__name__
            raise UserError(f"face_swap: the plug-in must return a Tensor of shape {tuple(image.shape)}, got {got}")
        return torch.lerp(image, swapped.to(image), min(share, 1.0))

    return Obfuscator(apply, strength=1.0, training_range=(1.0, 1.0), scaled=False)


_REGISTRY: dict[str, Obfuscator] = {
    "blur": Obfuscator(gaussian_blur, 15.0, (9.0, 21.0)),
    "pixelate": Obfuscator(pixelate, 20.0, (14.0, 26.0)),
    "median": Obfuscator(median_blur, 23.0, (17.0, 29.0)),
}


def list_obfuscators() -> list[str]:
    """Names that :func:`obfuscate` knows, sorted: registered ones and installed entry points."""
    return sorted({*_REGISTRY, *installed(ENTRY_POINT_GROUP)})


def register_obfuscator(name: str, obfuscator: Obfuscator) -> None:
    """Add ``obfuscator`` under ``name``; UserError if the name is taken."""
    if name in _REGISTRY:
        raise UserError(f"obfuscator {name!r} is already registered; choose another name")
    _REGISTRY[name] = obfuscator


def obfuscator(name: str) -> Obfuscator:
    """The obfuscator called ``name``: a registered name, an entry point of ``pyface.obfuscators``, or "module:name".

    What an entry point or "module:name" leads to is an :class:`Obfuscator`, or a face swapping function as
    :func:`face_swap` takes it.

    Raises:
        UserError: there is none (the message has the nearest known name), or it cannot be imported.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    found = find_plugin(name, ENTRY_POINT_GROUP, "obfuscator")
    if isinstance(found, Obfuscator):
        return found
    if callable(found):
        return face_swap(found)
    if found is not None:
        raise UserError(f"obfuscator {name!r} is neither an Obfuscator nor a function from faces to faces")
    known = list_obfuscators()
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}, or give module:name"
    raise UserError(f"unknown obfuscator {name!r}; {hint}")


def obfuscate(
    image: Tensor, name: str, strength: float | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Obfuscate a batch of faces.

    Args:
        image: Tensor[B, 3, H, W] in [-1, 1], floating point, any H and W from 1 on. Gets no gradient.
        name: one of :func:`list_obfuscators`.
        strength: blur's sigma, pixelate's block or median's kernel, in pixels of a face of 256 pixels; it is multiplied
            by ``min(H, W) / 256``. None takes the fixed deployment strength, or, with a ``generator``, a random one.
        generator: source of a random strength from the training range, one for the whole batch.

    Returns:
        Tensor[B, 3, H, W] in [-1, 1], same dtype and device.

    Raises:
        UserError: unknown name, wrong shape or dtype, a strength that is not positive and finite, or a plug-in that
            returns another shape.
    """
    entry = obfuscator(name)
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape or not image.is_floating_point():
        raise UserError(
            f"obfuscate: image must be a floating point Tensor[B, 3, H, W] that is not empty, "
            f"got {image.dtype} {tuple(image.shape)}"
        )
    if strength is None:
        strength = entry.strength
        if generator is not None:
            low, high = entry.training_range
            strength = low + (high - low) * torch.rand((), generator=generator).item()
    if not (math.isfinite(strength) and strength > 0):
        raise UserError(f"obfuscate: strength must be positive and finite, got {strength}")
    scale = min(image.shape[-2:]) / REFERENCE_SIZE if entry.scaled else 1.0
    with torch.no_grad():
        return entry.apply(image, strength * scale).clamp(-1, 1)


def _cells(size: int, cells: int, like: Tensor) -> Tensor:
    """Index of the mosaic cell of each of ``size`` pixels, Tensor[size] int64."""
    return torch.arange(size, device=like.device) * cells // size


def _mirror(x: Tensor, pad_rows: int, pad_cols: int) -> Tensor:
    """Reflect padding (edge pixel not repeated) that also works when the padding exceeds the picture."""
    for dim, pad in ((-2, pad_rows), (-1, pad_cols)):
        if pad:
            size = x.shape[dim]
            period = max(1, 2 * (size - 1))
            index = torch.arange(-pad, size + pad, device=x.device).remainder(period)
            x = x.index_select(dim, torch.minimum(index, period - index) if size > 1 else index)
    return x
