"""Following faces: who is who, in which frames, and how little is searched and held."""

from __future__ import annotations

import numpy as np
import pytest
from blocks import find, frame
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data

from pyface.data.crop import FaceCrop
from pyface.data.detect import CascadeDetector, detect_faces
from pyface.data.follow import Follow
from pyface.data.images import write_png
from pyface.data.video import FrameFolder
from pyface.errors import UserError


class Counting:
    """The detector of blocks, counting what it is asked."""

    def __init__(self):
        self.wholes, self.sizes = 0, []

    def __call__(self, photo):
        self.wholes += 1
        self.sizes.append(photo.shape[:2])
        return find(photo)


class Near(Counting):
    """The same, which can also look near a box."""

    def __init__(self):
        super().__init__()
        self.nears = 0

    def near(self, photo, box):
        self.nears += 1
        x, y, w, h = (round(value) for value in box)
        left, top = max(0, x - w), max(0, y - h)
        return [(left + x, top + y, w, h) for x, y, w, h in find(photo[top : y + 2 * h, left : x + 2 * w])]


def settings_of(detector=find, *, scale=1.0, size=16, **options):
    return Follow(FaceCrop(scale, size, detector), **({"stride": 5, "longest": None} | options))


def followed(frames, detector=find, **options):
    """{number: {frame: (left, top, side)}}"""
    squares = {}
    for index, faces in enumerate(settings_of(detector, **options)(frames)):
        for number, face in faces.items():
            assert face.crop.shape == (16, 16, 3)
            squares.setdefault(number, {})[index] = face.square
    return squares


def test_with_every_frame_searched_it_is_the_face_crop_step(tmp_path):
    """One face that jitters, and is gone twice: squares and crops of FaceCrop.follow, to the last bit."""
    rng = np.random.default_rng(3)
    for index in range(23):
        left, top = 40 + 2 * index + rng.integers(-1, 2), 30 + rng.integers(-2, 3)
        blocks = [] if index in (4, 11, 12) else [("red", left, top, 20 + rng.integers(0, 3), 0.3)]
        write_png(tmp_path / f"{index}.png", frame(*blocks))
    footage = FrameFolder(tmp_path)
    expected = FaceCrop(1.3, 16, find).follow(footage)
    mine = list(Follow(FaceCrop(1.3, 16, find), stride=1, longest=None)(footage.pixels(range(23))))
    assert [index for index, faces in enumerate(mine) if faces] == expected.positions
    crops = np.stack([faces[1].crop for faces in mine if faces])
    np.testing.assert_array_equal(crops, expected.pixels(range(len(expected))))


def test_two_faces_keep_their_numbers_though_their_order_turns_round():
    """The larger one is first. They pass above each other, and detections come in another order each time."""

    def shuffled(photo):
        boxes = find(photo)
        return boxes[::-1] if photo[..., 0].sum() % 2 else boxes

    frames = [frame(("blue", 4 + 2 * i, 10, 24, 0), ("red", 94 - 2 * i, 60, 20, 0)) for i in range(46)]
    squares = followed(frames, shuffled)
    assert sorted(squares) == [1, 2]
    for index in range(3, 43):
        assert squares[1][index] == (4 + 2 * index, 10, 24)
        assert squares[2][index] == (94 - 2 * index, 60, 20)


def test_between_looks_a_face_is_on_a_straight_line_and_nothing_is_searched():
    detector = Counting()
    frames = [frame(("red", 10 + 2 * i, 20 + i, 24, 0)) for i in range(26)]
    squares = followed(frames, detector)
    assert list(squares) == [1]
    assert list(squares[1]) == list(range(26))
    assert all(squares[1][i] == (10 + 2 * i, 20 + i, 24) for i in range(2, 24))
    assert detector.wholes == 6  # frames 0, 5, ..., 25


@pytest.mark.parametrize("detector", [Counting, Near])
@pytest.mark.parametrize("shown", [range(7, 33), range(0, 13), range(8, 9), range(26, 40), range(0)])
def test_frames_without_a_face_are_known_though_not_all_are_searched(detector, shown):
    """From the first look that finds it, a face is traced back and on to the very frame."""
    there = set(shown)
    frames = [frame(("red", 40, 30, 24, 0)) if i in there else frame() for i in range(40)]
    found = {index for face in followed(frames, detector()).values() for index in face}
    looked = {i for i in range(40) if i % 5 == 0 or i == 39}
    assert found == (there if there & looked else set())  # shorter than a stride, and between two looks: unseen


@pytest.mark.parametrize("detector", [Counting, Near])
def test_a_flash_between_two_looks_is_no_face(detector):
    frames = [frame() if i in (7, 8, 21) else frame(("red", 40 + i, 30, 24, 0)) for i in range(30)]
    (face,) = followed(frames, detector()).values()
    assert set(range(30)) - set(face) == {7, 8, 21}


def test_whoever_returns_soon_is_the_same_later_another():
    def gone(first, last):
        return [frame() if first <= i < last else frame(("red", 40, 30, 24, 0)) for i in range(60)]

    assert {number: len(face) for number, face in followed(gone(10, 30)).items()} == {1: 40}
    assert {number: len(face) for number, face in followed(gone(10, 41)).items()} == {1: 10, 2: 19}


def test_a_face_elsewhere_after_a_cut_is_another():
    frames = [frame(("red", 10, 10, 24, 0)) if i < 17 else frame(("red", 90, 60, 24, 0)) for i in range(40)]
    squares = followed(frames)
    assert [(min(face), max(face)) for face in squares.values()] == [(0, 16), (17, 39)]


def test_a_detector_that_looks_near_rarely_searches_everything():
    detector = Near()
    frames = [frame(("red", 10 + i, 20, 24, 0)) for i in range(76)]
    assert len(followed(frames, detector)[1]) == 76
    assert detector.wholes == 2  # frames 0 and 50
    assert detector.nears >= 15


def test_a_further_face_is_noticed_by_the_next_search():
    frames = [frame(("red", 10, 20, 24, 0), *([("blue", 80, 50, 20, 0)] if i > 11 else [])) for i in range(60)]
    squares = followed(frames, Near(), search=25)
    assert min(squares[2]) == 21  # traced back from the search in frame 25 to the look before it
    assert max(squares[2]) == 59
    assert min(followed(frames, Counting())[2]) == 12


def test_a_reduced_search_gives_boxes_of_the_whole_picture():
    detector = Counting()
    frames = [np.asarray(frame(("red", 40 + 4 * i, 40, 80, 0), height=240, width=320)) for i in range(11)]
    squares = followed(frames, detector, longest=80)
    assert set(detector.sizes) == {(60, 80)}
    for index, square in squares[1].items():
        if 2 <= index < 9:
            np.testing.assert_allclose(square, (40 + 4 * index, 40, 80), atol=4)


def test_only_the_largest_are_followed():
    frames = [frame(("red", 10, 20, 20, 0), ("blue", 80, 50, 26, 0))] * 11
    squares = followed(frames, most=1)
    assert list(squares) == [1]
    assert squares[1][5] == (80, 50, 26)


def test_few_frames_are_held():
    drawn, most = 0, 0

    def frames():
        nonlocal drawn
        for i in range(50):
            drawn += 1
            yield frame(("red", 10 + i, 20, 24, 0))

    for given_, _ in enumerate(settings_of()(frames())):
        most = max(most, drawn - given_)
    assert drawn == 50
    assert most <= 5 + 4


@settings(max_examples=30)
@given(
    stride=st.integers(1, 9), search=st.integers(1, 30), length=st.integers(0, 20), near=st.booleans(),
    move=st.integers(-1, 1),
)  # fmt: skip
def test_how_often_is_looked_does_not_matter_to_steady_motion(stride, search, length, near, move):
    frames = [frame(("red", 50 + move * i, 20, 24, 0), ("blue", 30, 60, 20, 0)) for i in range(length)]
    detector = Near() if near else find
    assert followed(frames, detector, stride=stride, search=search) == followed(frames, stride=1)


def test_the_cascade_finds_the_astronaut_again():
    photo = data.astronaut()
    ((x, y, w, h),) = detect_faces(photo)
    shifted = np.roll(photo, (9, -14), (0, 1))
    ((left, top, width, height),) = CascadeDetector().near(shifted, (x, y, w, h))
    assert abs(left + width / 2 - (x + w / 2 - 14)) < 8
    assert abs(top + height / 2 - (y + h / 2 + 9)) < 8
    assert 0.8 < width / w < 1.25
    assert CascadeDetector().near(photo, (300, 300, w, h)) == []
    assert CascadeDetector().near(photo, (510, 510, 2, 2)) == []


def test_a_moving_astronaut_is_followed():
    """A real cascade, 640 by 480 pixels: one face in all frames, its square in the middle of the head."""
    photo, still = data.astronaut(), np.full((480, 640, 3), 110, np.uint8)
    frames = []
    for i in range(0, 60, 2):
        pixels = still.copy()
        pixels[20:276, 40 + 4 * i : 296 + 4 * i] = photo[:256, 96:352]
        frames.append(pixels)
    squares = {}
    for index, faces in enumerate(Follow(FaceCrop(1.3, 32))(frames)):
        for number, face in faces.items():
            squares.setdefault(number, {})[index] = face.square
    longest = max(squares.values(), key=len)
    assert len(longest) == 30
    for index, (left, top, side) in longest.items():
        assert abs(left + side / 2 - (40 + 8 * index + 128)) < 14
        assert abs(top + side / 2 - (20 + 125)) < 25


@pytest.mark.parametrize("wrong", [{"stride": 0}, {"search": 0}, {"patience": 0}, {"most": 0}, {"longest": 10}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(UserError, match="at least"):
        Follow(**wrong)
