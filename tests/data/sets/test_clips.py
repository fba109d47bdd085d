"""Which frames are chosen of a video, and the two views over videos: whole videos and single frames."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pyface.data.crop import FaceCrop
from pyface.data.images import write_png
from pyface.data.procedural import draw_person
from pyface.data.sets.clips import Clip, Evenly, Every, FrameDataset, VideoSet, couple, spread
from pyface.data.video import open_video
from pyface.errors import UserError


class Numbered:
    """As much of a video as a sampling rule looks at."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)


class Small(VideoSet):
    title, layout = "Small", "  anything"


LENGTHS = (9, 5, 12)


@pytest.fixture
def reader(tmp_path):
    """A real and two fake videos of 16 x 24 frames; red is the video, green the frame's number."""
    records = []
    for video, length in enumerate(LENGTHS):
        for number in range(length):
            pixels = np.zeros((16, 24, 3), np.uint8)
            pixels[..., 0], pixels[..., 1] = video, number
            write_png(tmp_path / f"v{video}" / f"{number:04d}.png", pixels)
        label = int(video > 0)
        method, source = ("swap", "b") if label else ("real", None)
        records.append(Clip(f"x/v{video}", tmp_path / f"v{video}", label, method, "a", source, "train"))
    return Small(tmp_path, "train", records, Evenly(4), None)


def shown(images: torch.Tensor) -> list[tuple[int, int]]:
    """(video, number) that frames of ``reader`` show."""
    return [tuple(int(value) for value in (image[:2, 8, 8] * 255).round()) for image in images]


@given(length=st.integers(1, 400), count=st.integers(1, 60))
def test_evenly_is_even_and_symmetric(length, count):
    places = Evenly(count)(Numbered(range(length)))
    assert len(places) == min(count, length)
    assert 0 <= places[0]
    assert places[-1] < length
    steps = np.diff(places)
    assert len(steps) == 0 or steps.min() >= 1
    assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert abs(places[0] - (length - 1 - places[-1])) <= 1


def test_evenly_by_hand():
    """Ten frames in four parts of 2.5: middles at 1.25, 3.75, 6.25, 8.75."""
    assert Evenly(4)(Numbered(range(10))) == [1, 3, 6, 8]


def test_every_goes_by_the_number_in_the_name():
    assert Every(4)(Numbered(range(10))) == [0, 4, 8]
    assert Every(4, limit=2)(Numbered(range(10))) == [0, 4]
    assert Every(2)(Numbered([1, 2, 3, 6, 7, 8])) == [1, 3, 5]


@pytest.mark.parametrize("make", [lambda: Evenly(0), lambda: Every(0), lambda: Every(1, 0)])
def test_impossible_rules_are_refused(make):
    with pytest.raises(UserError, match="at least 1"):
        make()


@given(count=st.integers(0, 300), shares=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_spread_keeps_its_prefix_and_its_shares(count, shares):
    parts = spread(count, shares)
    assert len(parts) == count
    assert spread(count + 7, shares)[:count] == parts
    firsts = parts[: len(shares)]
    assert len(set(firsts)) == len(firsts)
    held = np.bincount(np.array(parts, int), minlength=len(shares))
    assert np.abs(held - count * np.array(shares) / sum(shares)).max() <= len(shares)


def test_official_shares_of_a_thousand_videos():
    assert np.bincount(spread(500, (36, 7, 7))).tolist() == [360, 70, 70]


def test_couples_are_alike_and_of_different_people():
    pairs = [tuple(draw_person(3, number) for number in couple(3, pair)) for pair in range(40)]
    assert all(a.identity != b.identity for a, b in pairs)
    assert len({person.identity for pair in pairs for person in pair}) == 80

    def apart(people):
        about = [[(person.skin.tone, person.female, person.age) for person in pair] for pair in people]
        return np.abs(np.diff(about, axis=1)).mean((0, 1))

    strangers = [(pairs[i][0], pairs[i - 1][0]) for i in range(40)]
    assert (apart(pairs) < 0.5 * apart(strangers)).all()


def test_a_video_is_a_sample(reader):
    assert len(reader) == 3
    sample = reader[2]
    assert sample["frames"].shape == (4, 3, 16, 24)
    assert sample["indices"].tolist() == [1, 4, 7, 10]
    assert shown(sample["frames"]) == [(2, 1), (2, 4), (2, 7), (2, 10)]
    about = {key: value for key, value in sample.items() if key not in ("frames", "indices")}
    assert about == {
        "video": "x/v2", "label": 1, "method": "swap", "identity": "a", "source": "b", "split": "train"
    }  # fmt: skip
    assert reader[0]["source"] == ""
    assert shown(reader.open(1).frames([4, 0])) == [(1, 4), (1, 0)]
    assert reader.open(1) is reader.open(1)


def test_videos_batch_in_workers(reader):
    batches = list(DataLoader(reader, batch_size=3, num_workers=1, multiprocessing_context="fork", timeout=60))
    assert batches[0]["frames"].shape == (3, 4, 3, 16, 24)
    assert batches[0]["label"].tolist() == [0, 1, 1]
    reader.open(1)
    assert torch.equal(pickle.loads(pickle.dumps(reader))[1]["frames"], reader[1]["frames"])


def test_summary_counts(reader):
    assert reader.summary() == {
        "name": "Small",
        "split": "train",
        "videos": 3,
        "labels": {"real": 1, "fake": 2},
        "methods": {"real": 1, "swap": 2},
        "identities": 1,
        "frames": {"fewest": 5, "most": 12},
        "sizes": {"24x16": 3},
    }


def test_an_empty_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no videos for the split 'val'; expected\n  anything"):
        Small(tmp_path, "val", [], Evenly(4), None)


def test_frames_of_real_and_fake_videos_at_their_own_steps(reader):
    frames = FrameDataset(reader, every=(1, 4))
    expected = [(0, n) for n in range(9)] + [(1, 0), (1, 4)] + [(2, 0), (2, 4), (2, 8)]
    assert [shown(sample["image"][None])[0] for sample in frames] == expected
    assert [(sample["label"], sample["frame"]) for sample in frames] == [(int(v > 0), n) for v, n in expected]
    assert frames[10]["video"] == "x/v1"
    assert [frames.place(index) for index in range(len(frames))] == expected


def test_frames_are_limited_per_video(reader):
    assert len(FrameDataset(reader, limit=6)) == 6 + 5 + 6
    assert len(FrameDataset(reader, every=2, limit=4)) == 4 + 3 + 4


def test_a_frame_outside_is_an_index_error(reader):
    frames = FrameDataset(reader)
    for index in (-1, sum(LENGTHS)):
        with pytest.raises(IndexError):
            frames[index]


def finds(videos: dict[int, tuple[int, ...]]):
    """A detector that finds a face of 8 pixels in these frames of these videos of ``reader``."""

    def detector(photo):
        video, number = (int(value) for value in photo[0, 0, :2])
        return [(8, 4, 8, 8)] if number in videos[video] else []

    return detector


def test_the_crop_step_of_a_reader_drops_frames(reader):
    reader.crop = FaceCrop(scale=1.0, size=8, detector=finds({0: (2, 3), 1: (), 2: tuple(range(12))}))
    sample = reader[0]
    assert sample["frames"].shape == (2, 3, 8, 8)
    assert shown(reader.open(0).footage.frames(reader.open(0).positions)) == [(0, 2), (0, 3)]
    assert [int(value) for value in (sample["frames"][:, 1, 0, 0] * 255).round()] == [2, 3]
    assert reader[2]["frames"].shape == (4, 3, 8, 8)
    with pytest.raises(UserError, match=r"no face was found in any of the 5 frames of .*v1"):
        reader[1]


def test_the_crop_step_of_frames_takes_the_nearest_with_a_face(reader):
    crop = FaceCrop(scale=1.0, size=8, detector=finds({0: (0, 6), 1: (4,), 2: ()}))
    frames = FrameDataset(reader, every=2, crop=crop)
    chosen = {0: 0, 2: 0, 4: 6, 6: 6, 8: 6}
    for index, nearest in enumerate(chosen.values()):
        sample = frames[index]
        assert (sample["frame"], sample["image"].shape) == (nearest, (3, 8, 8))
        assert round(float(sample["image"][1, 0, 0] * 255)) == nearest
    with pytest.raises(UserError, match="no face was found"):
        frames[len(frames) - 1]


def test_what_was_found_is_kept_by_video_id(reader, tmp_path):
    crop = FaceCrop(scale=1.0, size=8, detector=finds({0: (0, 6), 1: (4,), 2: ()}), cache=tmp_path / "faces")
    FrameDataset(reader, crop=crop)[3]
    reader.crop = crop
    reader[0]
    assert [str(path.relative_to(tmp_path / "faces")) for path in Path(tmp_path / "faces").rglob("*.json")] == [
        "x/v0.json"
    ]


def test_numbers_come_from_the_names_of_frames(tmp_path):
    for number in (3, 4, 8):
        write_png(tmp_path / "v" / f"{number:04d}.png", np.full((8, 8, 3), number, np.uint8))
    reader = Small(tmp_path, "test", [Clip("v", tmp_path / "v", 0, "real", "a", None, "test")], Every(4), None)
    assert reader[0]["indices"].tolist() == [1, 2]
    assert [sample["frame"] for sample in FrameDataset(reader, every=4)] == [4, 8]
    assert len(open_video(tmp_path / "v")) == 3
