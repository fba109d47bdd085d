"""The face crop step: which square is cut out, and which frames and faces it is cut from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage import data

from pyface.data.crop import FaceCrop, cut, place
from pyface.data.images import write_png
from pyface.data.sets.folders import to_tensor
from pyface.data.video import FrameFolder
from pyface.errors import UserError


class Planned:
    """A detector that reads the boxes out of a plan: the first pixel's red is the frame's number."""

    def __init__(self, plan):
        self.plan, self.calls = plan, 0

    def __call__(self, photo):
        self.calls += 1
        return self.plan.get(int(photo[0, 0, 0]), [])


@pytest.fixture
def footage(tmp_path):
    """Twelve frames of 60 x 80 pixels; the green value is x, the blue one is y."""
    y, x = np.mgrid[:60, :80]
    for number in range(12):
        pixels = np.stack((np.full_like(x, number), x, y), -1).astype(np.uint8)
        write_png(tmp_path / "frames" / f"{number}.png", pixels)
    return FrameFolder(tmp_path / "frames")


def corner_and_side(pixels: np.ndarray) -> tuple[int, int, int]:
    """What a cut-out of ``footage`` says about where it is from."""
    return int(pixels[0, 0, 1]), int(pixels[0, 0, 2]), pixels.shape[0]


def test_the_astronaut_is_cut_out_with_margin():
    face = FaceCrop(size=96)(to_tensor(data.astronaut()))
    assert face.shape == (3, 96, 96)
    photo = data.astronaut()
    tight = FaceCrop(scale=1.0, size=None)(to_tensor(photo)).shape[1]
    loose = FaceCrop(scale=1.3, size=None)(to_tensor(photo)).shape[1]
    assert abs(loose - 1.3 * tight) <= 1
    # The cut-out, detected again, has its face in the middle.
    again = FaceCrop(scale=1.0, size=None)(FaceCrop(scale=2.0, size=300)(to_tensor(photo)))
    assert again.shape[1] == pytest.approx(150, abs=30)


def test_square_has_the_longer_side_times_scale_plus_padding(footage):
    detector = Planned({0: [(30, 20, 10, 20)]})
    expected = {(1.0, 0): (25, 20, 20), (1.5, 0): (20, 15, 30), (1.0, 4): (21, 16, 28)}
    for (scale, padding), where in expected.items():
        crop = FaceCrop(scale=scale, padding=padding, size=None, detector=detector)
        assert corner_and_side(crop.frame(footage, [0])[1]) == where


@given(
    x=st.floats(-30, 110), y=st.floats(-30, 90), side=st.floats(0.1, 200), height=st.integers(1, 60),
    width=st.integers(1, 80),
)  # fmt: skip
def test_square_stays_in_the_picture(x, y, side, height, width):
    left, top, placed = place((x, y, side), height, width)
    assert 1 <= placed <= min(height, width)
    assert 0 <= left <= width - placed
    assert 0 <= top <= height - placed


def test_resizing_keeps_a_ramp_a_ramp():
    pixels = np.repeat(np.arange(80, dtype=np.uint8)[None, :, None] * 3, 60, 0).repeat(3, 2)
    small = cut(pixels, (40, 30, 40), 20)
    assert small.shape == (20, 20, 3)
    assert np.abs(small[5, 1:-1, 0] - (20 + np.arange(20) * 2 + 0.5)[1:-1] * 3).max() <= 1


def test_frames_without_a_face_are_left_out(footage):
    detector = Planned({number: [(30, 20, 16, 16)] for number in (1, 2, 5)})
    face = FaceCrop(scale=1.0, size=8, detector=detector).follow(footage)
    assert (len(face), face.positions, list(face.numbers), face.size) == (3, [1, 2, 5], [1, 2, 5], (8, 8))
    assert face.pixels([2, 0])[:, 0, 0, 0].tolist() == [5, 1]
    assert face.frames().shape == (3, 3, 8, 8)


def test_the_square_is_the_mean_of_near_frames(footage):
    """By hand: x is 20, 22, 24, 30, 24; frames are averaged with the two before and after that overlap by half."""
    xs = [20, 22, 24, 30, 24]
    detector = Planned({number: [(x, 20, 16, 16)] for number, x in enumerate(xs)})
    face = FaceCrop(scale=1.0, size=None, detector=detector).follow(footage)
    lefts = [square[0] - 8 for square in face.squares]
    # 20 and 30 overlap by 6 of 26; 22 and 30 by 8 of 24; 24 and 30 by 10 of 22, all below one half.
    assert lefts == pytest.approx([22, 22, 22.5, 30, 24])
    assert [corner_and_side(pixels)[0] for pixels in face.pixels(range(5))] == [22, 22, 22, 30, 24]


def test_a_jump_does_not_pull_the_square(footage):
    detector = Planned({number: [(5 if number < 6 else 60, 20, 16, 16)] for number in range(12)})
    face = FaceCrop(scale=1.0, size=None, detector=detector).follow(footage)
    assert [round(square[0]) for square in face.squares] == [13] * 6 + [68] * 6


def test_of_several_faces_the_one_near_the_mean_box_is_kept(footage):
    plan = {number: [(30, 20, 16, 16)] for number in range(12)}
    plan[4] = [(0, 0, 40, 40), (31, 20, 16, 16)]
    plan[7] = [(29, 20, 16, 16), (60, 30, 18, 18)]
    face = FaceCrop(scale=1.0, size=None, detector=Planned(plan)).follow(footage)
    assert all(abs(square[0] - 38) < 1 and square[2] == 16 for square in face.squares)


def test_without_a_size_all_frames_get_the_largest_square(footage):
    detector = Planned({0: [(10, 10, 12, 12)], 6: [(30, 20, 30, 30)]})
    face = FaceCrop(scale=1.0, size=None, detector=detector).follow(footage)
    assert face.size == (30, 30)
    assert face.frames().shape == (2, 3, 30, 30)


def test_a_single_frame_falls_back_on_the_next_choice(footage):
    detector = Planned({3: [(30, 20, 16, 16), (0, 0, 30, 30)]})
    place, pixels = FaceCrop(scale=1.0, size=None, detector=detector).frame(footage, [1, 2, 3, 4])
    assert place == 3
    assert corner_and_side(pixels) == (0, 0, 30)


def test_no_face_anywhere_is_said(footage):
    crop = FaceCrop(detector=Planned({}))
    with pytest.raises(UserError, match=r"no face was found in any of the 12 frames of .*frames"):
        crop.follow(footage)
    with pytest.raises(UserError, match="no face was found in any of 2 frames"):
        crop.frame(footage, [3, 4])
    with pytest.raises(UserError, match="no face was found in a picture of 80 x 60"):
        crop(torch.zeros(3, 60, 80))


@pytest.mark.parametrize("settings", [{"scale": 0}, {"padding": -1}, {"size": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match="face crop: need"):
        FaceCrop(**settings)


def test_what_was_found_is_kept_and_used_again(footage, tmp_path):
    detector = Planned({number: [(30, 20, 16, 16)] for number in range(3, 9)})
    crop = FaceCrop(scale=1.0, size=8, detector=detector, cache=tmp_path / "boxes")
    crop.frame(footage, [2, 4], "Deepfakes/000_001")
    assert detector.calls == 2
    face = crop.follow(footage, "Deepfakes/000_001")
    assert detector.calls == 12
    larger = FaceCrop(scale=2.0, size=8, detector=detector, cache=tmp_path / "boxes")
    again = larger.follow(footage, "Deepfakes/000_001")
    assert detector.calls == 12
    assert (face.positions, again.squares[0][2]) == ([3, 4, 5, 6, 7, 8], 32)
    assert [path.name for path in (tmp_path / "boxes").rglob("*") if path.is_file()] == ["000_001.json"]


def test_boxes_of_ones_own_are_used(footage, tmp_path):
    own = {"frames": {str(number): [[40, 30, 10, 10]] if number == 5 else [] for number in range(12)}}
    (tmp_path / "clip.json").write_text(json.dumps(own))
    face = FaceCrop(scale=1.0, size=None, detector=Planned({}), cache=tmp_path).follow(footage, "clip")
    assert (face.positions, corner_and_side(face.pixels([0])[0])) == ([5], (40, 30, 10))


def test_bad_box_files_are_refused(footage, tmp_path):
    crop = FaceCrop(cache=tmp_path)
    for content in ("{", "[]", '{"frames": {"a": []}}', '{"frames": {"0": [[1, 2, 3]]}}'):
        (tmp_path / "clip.json").write_text(content)
        with pytest.raises(UserError, match=r"face boxes: .*clip\.json"):
            crop.follow(footage, "clip")
    (tmp_path / "clip.json").write_text('{"detector": "mtcnn", "frames": {}}')
    with pytest.raises(UserError, match="'mtcnn' found, not 'cascade'; give another cache folder"):
        crop.follow(footage, "clip")
