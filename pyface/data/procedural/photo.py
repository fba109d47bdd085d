"""From a person and a view to a picture and everything that is known about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pyface.data.procedural import hair, head, light, paint, wear
from pyface.data.procedural.canvas import Canvas, meet_head
from pyface.data.procedural.describe import attributes, caption
from pyface.data.procedural.head import CENTRE
from pyface.data.procedural.parameters import Person, View, check
from pyface.errors import UserError

_ANCHOR = np.array((0.0, -0.33, 0.45)) - CENTRE  # the point of the head that the framing holds
_ANCHOR_AT = (0.5, 0.605)
_DEPTH_SCALE, _DEPTH_ZERO = 0.4, 0.5


def check_size(image_size: int) -> int:
    """``image_size``, or a UserError if it is not an integer from 16 to 1024."""
    if isinstance(image_size, bool) or not isinstance(image_size, (int, np.integer)) or not 16 <= image_size <= 1024:
        raise UserError(f"procedural faces: image_size must be an integer from 16 to 1024 pixels, got {image_size!r}")
    return int(image_size)


def render(people: Sequence[Person], views: Sequence[View], image_size: int = 128) -> list[dict[str, Any]]:
    """Photos of ``people[i]`` under ``views[i]``, each independent of the others in the list.

    Args:
        people, views: of equal length; repeat a person for several views.
        image_size: H = W in pixels, 16 to 1024.

    Returns:
        One dict per pair:
        ``image`` Tensor[3, H, W] float32 in [0, 1], multiples of 1/255;
        ``identity`` int;
        ``attributes`` dict[str, bool] by CelebA's names;
        ``caption`` str;
        ``gaze`` Tensor[2] float32, pitch and yaw of the eyes in camera coordinates, radians;
        ``head_pose`` Tensor[3] float32, pitch, yaw and roll, radians (conventions: ``parameters``);
        ``landmarks`` Tensor[68, 2] float32, (x, y) in pixels, iBUG order, pixel centres at integers; also where hidden;
        ``depth`` Tensor[1, H, W] float32 in [0, 1], 0 on the background, else 0.5 + 0.4 z within [0.02, 1], where z is
        the distance in front of the head's centre in units of 10 cm;
        ``parsing`` Tensor[H, W] uint8, CelebAMask-HQ's ids, 19 is an occluder;
        ``occluder`` Tensor[1, H, W] bool.

    Raises:
        UserError: lists of different lengths, a size out of range, or parameters that cannot be drawn.
    """
    size = check_size(image_size)
    if len(people) != len(views):
        raise UserError(f"render: needs as many people as views, got {len(people)} and {len(views)}")
    for person, view in zip(people, views):
        check(person, view)
    return [_photo(person, view, size) for person, view in zip(people, views)]


def _photo(person: Person, view: View, size: int) -> dict[str, Any]:
    m = head.measure(person, view)
    axes = head.rotation(view.pose)
    canvas = _canvas(view, axes, size)
    towards = light.towards_light(view.light)
    shape = head.surface(person, view, m, hair.cover)
    wear.body(canvas, person, view, m, axes)
    wear.ears(canvas, person, view, m, axes, shape)
    hair.hanging(canvas, person, view, m, axes, towards)
    landmarks, eyes = head.landmarks(m, shape)
    paint.paint_head(canvas, meet_head(canvas, axes, shape), person, view, m, axes, towards, eyes)
    wear.visor(canvas, person, view, m, axes)
    block = wear.glasses(canvas, person, view, m, axes, shape)
    wear.occlude(canvas, person, view, m, axes, shape)
    background = light.backdrop(view.background, size)
    image = light.shade(canvas, view, towards, background, block)
    image = light.develop(image, view.camera, light.meter(view.light, paint.skin_colour(person)))
    image = np.clip(np.rint(image * 255), 0, 255).astype(np.float32) / np.float32(255)
    depth = np.clip(_DEPTH_ZERO + _DEPTH_SCALE * canvas.z, 0.02, 1) * (canvas.ident > 0)
    points = canvas.project(landmarks @ axes.T)
    return {
        "image": torch.from_numpy(image),
        "identity": person.identity,
        "attributes": attributes(person, view),
        "caption": caption(person, view),
        "gaze": torch.tensor(view.gaze, dtype=torch.float32),
        "head_pose": torch.tensor(view.pose, dtype=torch.float32),
        "landmarks": torch.from_numpy(points.astype(np.float32)),
        "depth": torch.from_numpy(depth[None].astype(np.float32)),
        "parsing": torch.from_numpy(canvas.ident),
        "occluder": torch.from_numpy(canvas.ident[None] == 19),
    }


def _canvas(view: View, axes: np.ndarray, size: int) -> Canvas:
    framing, distance = view.framing, view.camera.distance
    unit = framing.scale * size
    anchor = (axes @ _ANCHOR).tolist()
    scale = unit / (1 - anchor[2] / distance)
    origin = (
        (_ANCHOR_AT[0] + framing.x) * size - 0.5 - anchor[0] * scale,
        (_ANCHOR_AT[1] + framing.y) * size - 0.5 + anchor[1] * scale,
    )
    return Canvas(size, unit, distance, origin)
