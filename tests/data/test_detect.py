"""Face detection: the default cascade, and detectors of others."""

import sys
import types
from importlib import metadata

import numpy as np
import pytest
from skimage import data

from pyface.data import detect
from pyface.data.detect import CascadeDetector, detect_faces, get_detector, list_detectors, register_detector
from pyface.errors import UserError

GREY = np.full((40, 60, 3), 128, np.uint8)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(detect, "_REGISTRY", dict(detect._REGISTRY))


def test_cascade_finds_the_astronaut_once_with_hair_and_chin():
    ((x, y, w, h),) = detect_faces(data.astronaut())
    # Eyes, mouth and chin of this portrait, looked up by eye.
    for px, py in ((203, 101), (243, 103), (224, 143), (224, 170), (224, 50)):
        assert x < px < x + w
        assert y < py < y + h
    assert 120 < w < 190


def test_cascade_finds_faces_of_other_people():
    """lfw_subset's faces are 25 pixels, so they are shown enlarged; its second half has no faces."""
    from skimage.transform import resize

    pictures = data.lfw_subset()
    counts = []
    for picture in (*pictures[:100:5], *pictures[100::5]):
        canvas = np.full((160, 160), 0.5)
        canvas[40:115, 40:115] = resize(picture, (75, 75))
        counts.append(len(detect_faces(np.repeat((canvas * 255).astype(np.uint8)[..., None], 3, -1))))
    assert sum(count == 1 for count in counts[:20]) >= 18
    assert sum(counts[20:]) <= 1


@pytest.mark.parametrize("name", ["brick", "grass", "gravel", "coffee", "chelsea", "rocket", "coins"])
def test_cascade_is_silent_without_faces(name):
    picture = getattr(data, name)()
    assert detect_faces(picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, -1)) == []


def test_large_photo_is_searched_at_reduced_size():
    from PIL import Image

    large = np.asarray(Image.fromarray(data.astronaut()).resize((1536, 1536), Image.Resampling.BICUBIC))
    found = CascadeDetector(max_megapixels=0.5)(large)
    ((x0, y0, w0, h0),) = detect_faces(data.astronaut())
    assert sum(np.allclose(box, [3 * v for v in (x0, y0, w0, h0)], atol=50) for box in found) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (31, 31), (32, 32), (4000, 3)])
def test_tiny_and_thin_photos_have_no_face(shape):
    assert detect_faces(np.zeros((*shape, 3), np.uint8)) == []


def test_detectors_of_others(monkeypatch):
    module = types.ModuleType("their_faces")
    module.find = lambda photo: [(5.4, np.int64(6), 20, 20)]
    module.number = 3
    monkeypatch.setitem(sys.modules, "their_faces", module)
    assert detect_faces(GREY, "their_faces:find") == [(5, 6, 20, 20)]
    assert detect_faces(GREY, module.find) == [(5, 6, 20, 20)]
    for bad in ("their_faces:missing", "no_such_module:find", "their_faces:number", "their_faces:"):
        with pytest.raises(UserError, match="cannot load|not callable"):
            detect_faces(GREY, bad)


def test_registered_and_installed_detectors(monkeypatch):
    register_detector("mine", lambda: lambda photo: [(0, 0, 20, 20)])
    assert detect_faces(GREY, "mine") == [(0, 0, 20, 20)]
    with pytest.raises(UserError, match="already registered"):
        register_detector("mine", lambda: None)

    class Point:
        name = "installed"

        @staticmethod
        def load():
            return lambda photo: [(1, 1, 20, 20)]

    def entry_points(group, name=None):
        assert group == "pyface.detectors"
        return [Point] if name in (None, "installed") else []

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    assert list_detectors() == ["cascade", "installed", "mine"]
    assert get_detector("installed")(GREY) == [(1, 1, 20, 20)]
    with pytest.raises(UserError, match="unknown detector 'none'; known: cascade, installed, mine"):
        get_detector("none")


def test_boxes_are_cut_to_the_photo():
    boxes = [(-10, -10, 30, 30), (50, 30, 30, 30), (100, 0, 10, 10), (5, 5, 0, 10), (5, 5, -3, 10)]
    assert detect_faces(GREY, lambda photo: boxes) == [(0, 0, 20, 20), (50, 30, 10, 10)]


@pytest.mark.parametrize("box", [3, (1, 2, 3), (1, 2, 3, 4, 5), ("a", 1, 2, 3), (float("nan"), 1, 2, 3), None])
def test_what_is_not_a_box_is_refused(box):
    with pytest.raises(UserError, match="must return boxes"):
        detect_faces(GREY, lambda photo: [box])


def test_detector_that_returns_nothing_iterable_is_refused():
    with pytest.raises(UserError, match="must return boxes"):
        detect_faces(GREY, lambda photo: None)
