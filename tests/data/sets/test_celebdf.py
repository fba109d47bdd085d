"""Celeb-DF v2: its test list counts the other way round, and what is written in its layout is read back."""

from __future__ import annotations

import shutil

import pytest
import torch

from pyface.data.images import write_png
from pyface.data.sets.celebdf import LIST, CelebDF, recording, synthesize
from pyface.data.sets.clips import Evenly, FrameDataset, Take, couple, film
from pyface.data.sets.synthesis import Progress
from pyface.data.video import Video
from pyface.errors import UserError

COUNT, FRAMES, SIZE, SEED = 10, 2, 64, 2
REAL = ["id0_0000", "id0_0001", "id0_0002", "id0_0003", "id1_0000", "id1_0001", "id1_0002", "id1_0003",
        "id2_0000", "id3_0000"]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "Celeb-DF-v2"
    synthesize(out, COUNT, seed=SEED, image_size=SIZE, frames=FRAMES, progress=Progress())
    return out


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def test_files_are_those_of_the_real_data_set(written):
    partner = {"id0": "id1", "id1": "id0", "id2": "id3", "id3": "id2"}
    expected = {LIST, *(f"YouTube-real/{number:05d}.mp4" for number in range(5))}
    for name in REAL:
        person, take = name.split("_")
        expected |= {f"Celeb-real/{name}.mp4", f"Celeb-synthesis/{person}_{partner[person]}_{take}.mp4"}
    assert {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()} == expected


def test_in_the_list_one_is_real(written):
    assert (written / LIST).read_text().splitlines() == [
        "1 YouTube-real/00001.mp4",
        "1 Celeb-real/id1_0001.mp4",
        "1 Celeb-real/id0_0001.mp4",
        "0 Celeb-synthesis/id1_id0_0001.mp4",
        "0 Celeb-synthesis/id0_id1_0001.mp4",
    ]
    records = CelebDF(written, "test").records
    assert [(r.id, r.label, r.method, r.identity, r.source) for r in records] == [
        ("Celeb-real/id0_0001", 0, "real", "id0", None),
        ("Celeb-real/id1_0001", 0, "real", "id1", None),
        ("YouTube-real/00001", 0, "real", "youtube00001", None),
        ("Celeb-synthesis/id0_id1_0001", 1, "Celeb-synthesis", "id0", "id1"),
        ("Celeb-synthesis/id1_id0_0001", 1, "Celeb-synthesis", "id1", "id0"),
    ]


def test_all_others_are_for_training(written):
    train, test, both = (CelebDF(written, split).records for split in ("train", "test", None))
    assert len(both) == len(train) + len(test) == 2 * COUNT + COUNT // 2
    assert {r.id for r in train}.isdisjoint(r.id for r in test)
    assert {r.split for r in train} == {"train"}
    summary = CelebDF(written, "train").summary()
    assert (summary["videos"], summary["labels"]) == (20, {"real": 12, "fake": 8})
    assert CelebDF.parts(written) == [{"split": "train"}, {"split": "test"}]


def test_frames_come_back_as_good_as_the_codec(written):
    reader = CelebDF(written, "test", sampling=Evenly(FRAMES))
    zero, one = couple(SEED, 10_000)
    for index, take in ((1, Take(one, 10_005, {})), (4, Take(one, 10_005, {}, "blend_swap", zero))):
        drawn = film(take, seed=SEED, frames=FRAMES, image_size=SIZE)["images"]
        read = reader[index]["frames"]
        assert read.shape == drawn.shape == (FRAMES, 3, SIZE, SIZE)
        assert -10 * torch.log10(((read - drawn) ** 2).mean()) > 27


def test_recordings_that_are_tested_can_be_kept_out_of_training(copy):
    """As in the real list, a fake is tested whose recording is not."""
    with open(copy / LIST, "a") as file:
        file.write("0 Celeb-synthesis/id0_id1_0003.mp4\n")
    leaking = {r.id for r in CelebDF(copy, "train").records}
    clean = CelebDF(copy, "train", disjoint=True)
    assert leaking - {r.id for r in clean.records} == {"Celeb-real/id0_0003"}
    tested = {recording(r) for r in CelebDF(copy, "test", disjoint=True).records}
    assert tested == {"id0_0001", "id1_0001", "00001", "id0_0003"}
    assert tested.isdisjoint(recording(r) for r in clean.records)


def test_writing_goes_on_where_it_stopped(copy):
    paths = sorted(copy.rglob("*.mp4"))
    before = {path: path.read_bytes() for path in paths}
    for path in paths[::6]:
        path.unlink()
    synthesize(copy, COUNT, seed=SEED, image_size=SIZE, frames=FRAMES, progress=Progress())
    assert {path: path.read_bytes() for path in sorted(copy.rglob("*.mp4"))} == before


def test_frames_of_the_test_videos_are_read_like_videos(written, tmp_path):
    videos = CelebDF(written, "test", sampling=Evenly(FRAMES))
    for record in videos.records:
        folder = tmp_path / "cdf" / ("fake_test" if record.label else "real_test") / "images" / record.path.stem
        for number, pixels in enumerate(Video(record.path).pixels(range(FRAMES))):
            write_png(folder / f"{number:04d}.png", pixels)
    pictures = CelebDF(tmp_path / "cdf", "test", sampling=Evenly(FRAMES))

    def content(reader):
        return {r.id: (r.label, r.identity, r.source, reader[i]["frames"]) for i, r in enumerate(reader.records)}

    a, b = content(videos), content(pictures)
    assert a.keys() == b.keys()
    assert all(a[id][:3] == b[id][:3] and torch.equal(a[id][3], b[id][3]) for id in a)
    assert CelebDF.parts(tmp_path / "cdf") == [{"split": "test"}]
    assert len(FrameDataset(pictures, every=2, limit=50)) == 5
    with pytest.raises(UserError, match="has no videos for the split 'train'"):
        CelebDF(tmp_path / "cdf", "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 Celeb-real/id0_0000.mp4", "line 6: '2 Celeb-real/id0_0000.mp4'; it should be .* 1 = real and 0 = fake"),
        ("Celeb-real/id0_0000.mp4", "line 6"),
        ("1 celeb-real/id0_0000.mp4", "line 6"),
        ("0 Celeb-real/id0_0000.mp4", "line 6: label 0, but Celeb-real is real, so 1"),
        ("1 Celeb-synthesis/id0_id1_0000.mp4", "line 6: label 1, but Celeb-synthesis is fake, so 0"),
        ("1 Celeb-real/id9_0000.mp4", "lacks Celeb-real/id9_0000.mp4, which List_of_testing_videos.txt names"),
    ],
)
def test_wrong_lines_of_the_list_are_refused(copy, line, message):
    with open(copy / LIST, "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=message):
        CelebDF(copy)


def test_other_layouts_are_refused(copy):
    with pytest.raises(UserError, match="one level too low"):
        CelebDF(copy / "Celeb-real")
    with pytest.raises(UserError, match="one level too high; give .*copy"):
        CelebDF(copy.parent)
    for video in (copy / "YouTube-real").iterdir():
        video.unlink()
    with pytest.raises(UserError, match="YouTube-real holds no videos"):
        CelebDF(copy)
    (copy / LIST).unlink()
    with pytest.raises(UserError, match=f"has no {LIST}"):
        CelebDF(copy)


def test_names_that_are_not_of_celeb_df_are_refused(copy):
    (copy / "Celeb-synthesis/id0_id1_0000.mp4").rename(copy / "Celeb-synthesis/größe.mp4")
    with pytest.raises(UserError, match="größe.mp4 is not a name of Celeb-synthesis"):
        CelebDF(copy)
