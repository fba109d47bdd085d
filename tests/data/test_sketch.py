from functools import cache

import numpy as np
import pytest
import torch
from skimage import data, transform

from pyface.data.procedural import draw_person, draw_view, render
from pyface.data.sketch import STYLES, sketch
from pyface.errors import UserError

SIZE, COUNT = 96, 24


@cache
def faces():
    return render([draw_person(2, i) for i in range(COUNT)], [draw_view(2, i) for i in range(COUNT)], SIZE)


@cache
def drawings(style):
    return [sketch(sample, style, seed=index) for index, sample in enumerate(faces())]


def photo(height, width):
    """A real face, with the depth of an ellipsoid before nothing; no parsing."""
    picture = transform.resize(data.astronaut()[:220, 110:330], (height, width), anti_aliasing=True)
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    depth = np.sqrt(np.clip(1 - ((x - 0.52) / 0.33) ** 2 - ((y - 0.45) / 0.42) ** 2, 0, None))
    return {
        "image": torch.from_numpy(picture).permute(2, 0, 1).float(),
        "depth": torch.from_numpy(depth)[None].float(),
    }


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [(16, 16), (64, 96), (250, 250), (333, 330)])
def test_a_real_photo_with_depth_is_enough(style, size):
    sample = photo(*size)
    before = {key: value.clone() for key, value in sample.items()}
    drawing = sketch(sample, style)
    assert drawing.shape == (1, *size)
    assert drawing.dtype == torch.float32
    assert 0 <= drawing.min() < 0.6
    assert drawing.max() <= 1
    paper = drawing[0, : size[0] // 4, -size[1] // 8 :]  # a corner far from the head
    assert paper.mean() > 0.9
    assert paper.std() < 0.05
    assert all(torch.equal(sample[key], before[key]) for key in sample)


@pytest.mark.parametrize("style", STYLES)
def test_without_any_depth_the_whole_picture_is_drawn(style):
    sample = photo(96, 96)
    flat = sketch({**sample, "depth": torch.zeros(1, 96, 96)}, style)
    body = flat[0, 80:]  # off the ellipsoid; the astronaut's suit
    assert body.mean() < sketch(sample, style)[0, 80:].mean() - 0.02


@pytest.mark.parametrize("style", STYLES)
def test_same_arguments_same_drawing_and_another_hand_draws_alike(style):
    sample = faces()[0]
    one, again, other = (sketch(sample, style, seed=seed).flatten() for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.corrcoef(torch.stack((one, other)))[0, 1] > 0.5


def statistics(drawing):
    values = drawing.flatten()
    steps = (drawing.diff(dim=-1).abs().mean() + drawing.diff(dim=-2).abs().mean()) / 2
    ink = values[values < 0.9]
    return torch.stack([values.mean(), values.std(), steps, (values > 0.97).float().mean(), ink.mean()])


def test_three_artists_can_be_told_apart_by_simple_statistics():
    """Nearest centroid of five numbers per drawing, learnt on one half of the people, tried on the other."""
    features = torch.stack([torch.stack([statistics(d) for d in drawings(style)]) for style in STYLES])
    learn, check = features[:, ::2], features[:, 1::2]
    centroids, spread = learn.mean(1), learn.var(1).mean(0).sqrt()  # in units of the spread within a style
    guesses = torch.cdist(check / spread, (centroids / spread).expand(3, -1, -1)).argmin(-1)
    truth = torch.arange(3)[:, None].expand_as(guesses)
    assert (guesses == truth).float().mean() > 0.95


def borders(parsing):
    edge = torch.zeros(parsing.shape, dtype=torch.bool)
    edge[:, 1:] |= parsing[:, 1:] != parsing[:, :-1]
    edge[1:] |= parsing[1:] != parsing[:-1]
    return torch.nn.functional.max_pool2d(edge[None].float(), 3, 1, 1)[0] > 0


@pytest.mark.parametrize("style", STYLES)
def test_lines_follow_the_geometry_of_this_face(style):
    """More ink on the borders of the face's own parsing than off them, and than on the borders of somebody else's."""
    factor = 1.0 if style == 3 else 1.2  # charcoal is tone before it is lines
    own = others = 0
    for index, (sample, drawing) in enumerate(zip(faces(), drawings(style))):
        ink = 1 - drawing[0]
        inside = sample["depth"][0] > 0
        here, elsewhere = borders(sample["parsing"]), borders(faces()[index - 1]["parsing"])
        own += ink[here].mean() > factor * ink[inside & ~here].mean()
        others += ink[here].mean() > ink[elsewhere].mean()
    assert own >= 0.85 * COUNT
    assert others >= 0.9 * COUNT


@pytest.mark.parametrize("style", STYLES)
def test_depth_alone_draws_the_outline(style):
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    radius = torch.hypot(x - 48, y - 48)
    depth = (1 - (radius / 30).square()).clamp(min=0).sqrt()[None]
    ink = 1 - sketch({"image": torch.full((3, 96, 96), 0.5), "depth": depth}, style)[0]
    outline = ink[(radius > 28.5) & (radius < 31)].mean()
    assert outline > 1.3 * ink[radius < 20].mean()
    assert outline > 3 * ink[radius > 40].mean()


def test_dark_skin_is_not_drawn_as_a_black_patch():
    """Tone is relative to the skin: styles 1 and 2 leave most of any face white."""
    for style in (1, 2):
        for sample, drawing in zip(faces(), drawings(style)):
            skin = drawing[0][sample["parsing"] == 1]
            assert (skin > 0.5).float().mean() > 0.75


@pytest.mark.parametrize(
    ("changes", "style", "message"),
    [
        ({}, 0, "style must be 1, 2 or 3, got 0"),
        ({"depth": None}, 1, "needs a Tensor 'depth'"),
        ({"depth": torch.zeros(1, 32, 33)}, 1, r"depth must be Tensor\[1, 32, 32\], got \(1, 32, 33\)"),
        ({"image": torch.zeros(1, 32, 32)}, 1, r"image must be Tensor\[3, H, W\]"),
        ({"image": torch.zeros(3, 8, 8), "depth": torch.zeros(1, 8, 8)}, 1, "sides from 16 on"),
        ({"parsing": torch.zeros(1, 32, 32)}, 1, r"parsing must be Tensor\[32, 32\]"),
    ],
)
def test_mistakes_are_explained(changes, style, message):
    with pytest.raises(UserError, match=message):
        sketch({**photo(32, 32), **changes}, style)
