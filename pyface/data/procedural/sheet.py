"""Contact sheets: many pictures on one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyface.errors import UserError


def contact_sheet(images: Sequence, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Pictures side by side on white, row by row.

    Args:
        images: Tensor or ndarray[C, H, W] each, float in [0, 1] or uint8, all of one size, C = 1 or 3.
        columns: pictures in a row, at least 1.
        gap: white pixels between two pictures.

    Returns:
        uint8 array [rows * (H + gap) - gap, columns * (W + gap) - gap, 3].

    Raises:
        UserError: no pictures, different sizes, or ``columns`` below 1.
    """
    tiles = [_tile(np.asarray(image)) for image in images]
    if not tiles or columns < 1 or gap < 0:
        raise UserError(f"contact_sheet: need a picture, columns >= 1 and gap >= 0, got {len(tiles)}, {columns}, {gap}")
    if len({tile.shape for tile in tiles}) > 1:
        raise UserError(f"contact_sheet: pictures differ in size: {sorted({tile.shape[:2] for tile in tiles})}")
    height, width, _ = tiles[0].shape
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def _tile(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise UserError(f"contact_sheet: a picture must be [1 or 3, H, W], got {list(image.shape)}")
    if image.dtype != np.uint8:
        image = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
    return np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)
