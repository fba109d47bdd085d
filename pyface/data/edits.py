"""Faces edited in steps, as in Seq-DeepFake: up to five edits of components, or of attributes, in any order.

A step behaves like a generative editor that pastes back what it changed. It re-renders the person with the component
of somebody else (or with the attribute toggled), softened by its decoder, and lays that over the picture through a soft
mask of the region, with the slight colour cast that decoders leave; whatever earlier steps had generated goes through
the decoder once more. So the order can be read off the picture: where regions overlap the later step's cast and border
are on top, and everywhere else the earlier a region was generated, the softer it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyface.data.obfuscators import gaussian_blur
from pyface.errors import UserError

if TYPE_CHECKING:
    from pyface.data.procedural import Person, View

COMPONENTS = ("nose", "eye", "eyebrow", "lip", "hair")
ATTRIBUTES = ("Bangs", "Eyeglasses", "Beard", "Smiling", "Young")
"""An edit's label is its place in :data:`COMPONENTS` or :data:`ATTRIBUTES`, from 1 on; 0 is no edit."""
STEPS = 5
ORIGINAL = "original"
"""The name of the empty sequence."""

BORDER = 0.07
"""A mask reaches this part of the picture's height beyond the region it changes."""
DECODER_BLUR = 0.5
"""Standard deviation of the decoder's blur, in pixels of a picture 128 pixels high."""
COLOUR_CAST = 0.01
"""Standard deviation of a step's colour cast, per channel, one draw per step."""

# CelebAMask-HQ ids that a component's mask covers, before or after the edit. The mouth goes with the lips, a hat with
# the hair under it.
_REGIONS = {"nose": (2,), "eye": (4, 5), "eyebrow": (6, 7), "lip": (10, 11, 12), "hair": (13, 14)}
_FIELDS = {"nose": "nose", "eye": "eyes", "eyebrow": "brows", "lip": "lips", "hair": "hair"}
_BACKDROP = (0, 16, 18)  # background, necklace and clothes: no edit changes them
_VISIBLE = 0.04  # mean change of the region below which another donor is asked


@dataclass(frozen=True)
class Edited:
    """A face after a sequence of edits.

    Attributes:
        image: Tensor[3, H, W] float32, multiples of 1/255 in [0, 1]; equal to ``original`` for the empty sequence.
        original: Tensor[3, H, W], the face before the first step.
        labels: five integers, the edits in order, 0 after the last.
        steps: the picture after each step, a Tensor[3, H, W] each; the last one is ``image``.
        masks: for each step Tensor[1, H, W] float32 in [0, 1], where its own edit was laid over the picture. Outside
            all of them ``image`` is ``original``.
    """

    image: Tensor
    original: Tensor
    labels: list[int]
    steps: list[Tensor]
    masks: list[Tensor]


def edit(sequence: str | Sequence[str], person: Person, view: View, *, seed: int = 0, image_size: int = 128) -> Edited:
    """Edit a face of the procedural world.

    A component step takes the component from another person, of the same sex where one is found soon. An attribute
    step toggles: glasses come or go, a smiling face stops smiling, a young one ages. What hides the thing to be edited
    goes with it inside the mask: a hat for hair and bangs, dark glasses and closed lids for eyes, an occluder for the
    rest.

    Args:
        sequence: at most five different steps, all of :data:`COMPONENTS` or all of :data:`ATTRIBUTES`; or its name,
            such as ``"nose-eye-lip"``.
        person, view: who is seen, and how.
        seed: non-negative, of the donors and of the strength of the edits.
        image_size: side of the picture in pixels.

    Raises:
        UserError: an unknown or repeated step, steps of both kinds, or a negative seed.
    """
    from pyface.data.procedural import render

    sequence = parse_sequence(sequence)
    if seed < 0:
        raise UserError(f"edit: seed must be at least 0, got {seed}")
    before = render([person], [view], image_size)[0]
    image = original = before["image"]
    blur = DECODER_BLUR * image_size / 128
    generated = torch.zeros(1, image_size, image_size)
    steps, masks = [], []
    for name in sequence:
        # A step draws the same donor and the same cast wherever it comes in the sequence.
        rng = np.random.default_rng((seed, (COMPONENTS + ATTRIBUTES).index(name)))
        change = _change_component if name in COMPONENTS else _change_attribute
        person, view, after, mask = change(name, person, view, before, rng)
        image = _lay(image, gaussian_blur(image[None], blur)[0], generated)
        cast = torch.from_numpy(rng.normal(0, COLOUR_CAST, (3, 1, 1))).float()
        image = _lay(image, gaussian_blur(after["image"][None], blur)[0] + cast, mask)
        generated = torch.maximum(generated, mask)
        before = after
        steps.append(image)
        masks.append(mask)
    return Edited(image, original, sequence_labels(sequence), steps, masks)


def parse_sequence(sequence: str | Sequence[str]) -> list[str]:
    """The steps of ``"nose-eye-lip"`` (or of a sequence of names), checked; ``"original"`` has none.

    Raises:
        UserError: an unknown or repeated step, more than five, or steps of both kinds.
    """
    if isinstance(sequence, str):
        sequence = [] if sequence in (ORIGINAL, "") else sequence.split("-")
    steps = list(sequence)
    for name in steps:
        if name not in COMPONENTS and name not in ATTRIBUTES:
            known = f"{', '.join(COMPONENTS)}; or {', '.join(ATTRIBUTES)}"
            raise UserError(f"edit: unknown step {name!r}; known: {known}")
        if steps.count(name) > 1:
            raise UserError(f"edit: step {name!r} comes twice; every edit is made at most once")
    if any(name in COMPONENTS for name in steps) and any(name in ATTRIBUTES for name in steps):
        raise UserError(f"edit: {'-'.join(steps)} mixes edits of components and of attributes; use one kind")
    return steps


def sequence_labels(sequence: str | Sequence[str]) -> list[int]:
    """Five labels: ``"nose-eye-lip"`` is [1, 2, 4, 0, 0]. UserError as :func:`parse_sequence`."""
    steps = parse_sequence(sequence)
    kinds = ATTRIBUTES if steps and steps[0] in ATTRIBUTES else COMPONENTS
    return [kinds.index(name) + 1 for name in steps] + [0] * (STEPS - len(steps))


def sequence_name(labels: Sequence[int], kinds: Sequence[str] = COMPONENTS) -> str:
    """The name of the sequence with these labels: [1, 2, 4, 0, 0] is ``"nose-eye-lip"``, zeros are ``"original"``.

    Args:
        labels: integers from 0 to 5, zeros at the end only.
        kinds: :data:`COMPONENTS` or :data:`ATTRIBUTES`.

    Raises:
        UserError: a label out of range, an edit after a 0, or a repeated edit.
    """
    labels = [int(label) for label in labels]
    length = len(labels) - labels.count(0)
    if not all(0 <= label <= len(kinds) for label in labels) or 0 in labels[:length]:
        raise UserError(f"labels must be from 0 to {len(kinds)} with zeros at the end only, got {labels}")
    return "-".join(parse_sequence([kinds[label - 1] for label in labels[:length]])) or ORIGINAL


def _change_component(
    name: str, person: Person, view: View, before: dict[str, Any], rng: np.random.Generator
) -> tuple[Person, View, dict[str, Any], Tensor]:
    """(person, view, sample, mask) after the component came from another person."""
    from pyface.data.procedural import draw_person

    view = _uncovered(name, view)
    world = int(rng.integers(1 << 31))
    donors = [draw_person(world, identity) for identity in range(12)]
    donors.sort(key=lambda donor: (donor.female > 0.5) != (person.female > 0.5))  # stable: own sex first
    dark = name == "eye" and not _shows(before, _REGIONS["eye"]).any()
    ids = _REGIONS[name] + (3,) * dark  # the dark glasses over the eyes
    best = None
    for donor in donors[:4]:
        changed = replace(person, **{_FIELDS[name]: getattr(donor, _FIELDS[name])})
        after = _render_like(before, changed, view)
        region = _shows(before, ids) | _shows(after, ids)
        difference = (after["image"] - before["image"]).abs().amax(0)
        visible = float(difference[region].mean()) if region.any() else 0.0
        if best is None or visible > best[0]:
            best = (visible, changed, after, region)
        if visible > _VISIBLE:
            break
    _, changed, after, region = best
    return changed, view, after, _soft(region)


def _change_attribute(
    name: str, person: Person, view: View, before: dict[str, Any], rng: np.random.Generator
) -> tuple[Person, View, dict[str, Any], Tensor]:
    """(person, view, sample, mask) after the attribute was toggled; the mask is where that changes the head."""
    has = before["attributes"]
    view = _uncovered(name, view)
    if name == "Bangs":
        if not has["Bangs"] and person.hair.style in ("bald", "buzz", "afro"):
            style = "short" if person.female <= 0.5 else "bob"  # bangs need hair that falls
            person = replace(person, hair=replace(person.hair, style=style, recession=0.0))
        view = replace(view, bangs=not has["Bangs"])
    elif name == "Eyeglasses":
        view = replace(view, glasses="none" if has["Eyeglasses"] else "glasses")
    elif name == "Beard":
        if has["No_Beard"]:
            beard = replace(person.beard, amount=float(rng.uniform(0.8, 1)), style=str(rng.choice(("goatee", "full"))))
            person = replace(person, beard=beard, female=min(person.female, 0.5))
            view = replace(view, beard=1.0, years=max(view.years, 22.0 - person.age))
        else:
            view = replace(view, beard=0.0)
    elif name == "Smiling":
        smile, opened = (0.0, 0.0) if has["Smiling"] else (rng.uniform(0.75, 1), rng.uniform(0.2, 0.5))
        view = replace(view, smile=float(smile), mouth_open=float(opened))
    else:
        age = rng.uniform(64, 78) if has["Young"] else rng.uniform(20, 32)
        view = replace(view, years=float(age) - person.age)
    after = _render_like(before, person, view)
    change = (after["image"] - before["image"]).abs().amax(0)
    region = gaussian_blur(change[None, None], 0.012 * change.shape[0])[0, 0] > 0.02
    region &= ~(_shows(before, _BACKDROP) & _shows(after, _BACKDROP))
    if name == "Beard":
        region &= _lower_face(before["landmarks"], region.shape) & _shows(before, (1, 2, 10, 11, 12))
    return person, view, after, _soft(_without_holes(region))


def _render_like(before: dict[str, Any], person: Person, view: View) -> dict[str, Any]:
    """The person under the view, exposed as ``before`` was: a camera that meters on the face would make the edit show
    all over the picture."""
    from pyface.data.procedural import render

    after = render([person], [view], before["image"].shape[-1])[0]
    same = _shows(before, _BACKDROP) & _shows(after, _BACKDROP)
    gain = before["image"][:, same].sum(1) / after["image"][:, same].sum(1).clamp(min=1e-3)
    if same.any():
        after["image"] = (after["image"] * gain.clamp(0.7, 1.4).view(3, 1, 1)).clamp(0, 1)
    return after


def _shows(sample: dict[str, Any], ids: Sequence[int]) -> Tensor:
    """Where the parsing has one of the ids, bool [H, W]."""
    return torch.isin(sample["parsing"], torch.tensor(ids))


def _uncovered(name: str, view: View) -> View:
    """The view without what would hide the edit."""
    if name in ("hair", "Bangs"):
        return replace(view, hat="none")
    if name == "Young":
        return view
    if name in ("eye", "eyebrow") and view.glasses == "sunglasses":
        view = replace(view, glasses="glasses")
    if name == "eye" and view.eye_open < 0.5:
        view = replace(view, eye_open=1.0)
    return replace(view, occluder=None)


def _lower_face(landmarks: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bool [H, W]: below the base of the nose, across the line from ear to ear (iBUG landmarks 33, 0 and 16)."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    across = landmarks[16] - landmarks[0]
    from_nose = torch.stack((x, y), -1) - landmarks[33]
    return (across[0] * from_nose[..., 1] - across[1] * from_nose[..., 0]) > 0


def _without_holes(region: Tensor) -> Tensor:
    """Bool [H, W] with gaps closed that are narrower than :data:`BORDER`, and holes filled."""
    from scipy.ndimage import binary_fill_holes, distance_transform_edt

    if not region.any():
        return region
    radius = BORDER / 2 * region.shape[0]
    grown = distance_transform_edt(~region.numpy()) <= radius
    closed = distance_transform_edt(np.pad(grown, 1, mode="edge"))[1:-1, 1:-1] > radius
    return torch.from_numpy(binary_fill_holes(closed))


def _soft(region: Tensor) -> Tensor:
    """Bool [H, W] -> Tensor[1, H, W] that is 1 on the region and falls to 0 over :data:`BORDER` around it."""
    from scipy.ndimage import distance_transform_edt

    if not region.any():
        return torch.zeros(1, *region.shape)
    distance = torch.from_numpy(distance_transform_edt(~region.numpy())).float()
    fade = (1 - distance / (BORDER * region.shape[0])).clamp(min=0)
    return (fade * fade * (3 - 2 * fade))[None]


def _lay(image: Tensor, layer: Tensor, mask: Tensor) -> Tensor:
    """The layer over the picture, rounded to 8 bits; exactly the picture where the mask is 0."""
    mixed = (image + mask * (layer - image)).clamp(0, 1)
    return torch.where(mask > 0, (mixed * 255).round() / 255, image)
