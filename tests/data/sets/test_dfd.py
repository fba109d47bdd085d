"""DFD: what is written in its layout is read back, beside FaceForensics++ in the same folder too."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from pyface.data.images import write_png
from pyface.data.sets.clips import Evenly, Take, couple, film
from pyface.data.sets.dfd import ACTORS, DFD, FORGED, SCENES, synthesize
from pyface.data.sets.synthesis import Progress
from pyface.data.video import Video
from pyface.errors import UserError

COUNT, FRAMES, SIZE, SEED = 4, 2, 64, 8


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "dfd"
    synthesize(out, COUNT, seed=SEED, image_size=SIZE, frames=FRAMES, progress=Progress())
    return out


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def test_names_are_those_of_the_real_data_set(written):
    real = sorted(path.name for path in (written / ACTORS / "c23/videos").iterdir())
    assert real == [f"{actor:02d}__{scene}.mp4" for actor in (1, 2) for scene in SCENES[:2]]
    fake = sorted(path.name for path in (written / FORGED / "c23/videos").iterdir())
    assert [re.sub("[A-Z0-9]{8}(?=.mp4)", "CODE", name) for name in fake] == [
        f"{pair}__{scene}__CODE.mp4" for pair in ("01_02", "02_01") for scene in SCENES[:2]
    ]
    codes = {name[:5]: name[-12:-4] for name in fake}
    assert all(name.endswith(f"__{codes[name[:5]]}.mp4") for name in fake)
    assert codes["01_02"] != codes["02_01"]
    assert sorted(path.name for path in (written / FORGED / "masks/videos").iterdir()) == fake
    assert len(SCENES) == len(set(SCENES)) == 16


def test_labels_come_back(written):
    records = DFD(written).records
    assert [(r.id.rsplit("__", r.label)[0], r.label, r.method, r.identity, r.source, r.split) for r in records] == [
        *((f"actors/{a}__{s}", 0, "real", a, None, "test") for a in ("01", "02") for s in SCENES[:2]),
        *(
            (f"DeepFakeDetection/{a}_{b}__{s}", 1, "DeepFakeDetection", a, b, "test")
            for a, b in (("01", "02"), ("02", "01"))
            for s in SCENES[:2]
        ),
    ]
    assert DFD.parts(written) == [{"split": "test", "compression": "c23"}]
    assert DFD(written).summary()["labels"] == {"real": COUNT, "fake": COUNT}


def test_frames_come_back_as_good_as_the_codec(written):
    reader = DFD(written, sampling=Evenly(FRAMES))
    # Actor 2 in the second scene, and with the appearance of actor 1.
    one, two = couple(SEED, 20_000)
    for index, take in ((3, Take(two, 20_017, {})), (7, Take(two, 20_017, {}, "colour_transfer", one))):
        drawn = film(take, seed=SEED, frames=FRAMES, image_size=SIZE)["images"]
        assert -10 * torch.log10(((reader[index]["frames"] - drawn) ** 2).mean()) > 27


def test_a_larger_count_keeps_what_is_there(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.mp4")}
    synthesize(copy, COUNT + 1, seed=SEED, image_size=SIZE, frames=FRAMES, progress=Progress())
    assert len(list(copy.rglob("*.mp4"))) == len(before) + 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_extracted_frames_are_read_like_videos(written, tmp_path):
    videos = DFD(written, sampling=Evenly(FRAMES))
    for record in videos.records:
        place = (FORGED if record.label else ACTORS) + "/c23/images"
        for number, pixels in enumerate(Video(record.path).pixels(range(FRAMES))):
            write_png(tmp_path / "ff" / place / record.path.stem / f"{number:04d}.png", pixels)
    pictures = DFD(tmp_path / "ff", sampling=Evenly(FRAMES))
    assert [r.id for r in pictures.records] == [r.id for r in videos.records]
    assert torch.equal(pictures[5]["frames"], videos[5]["frames"])


def test_other_layouts_and_names_are_refused(copy):
    with pytest.raises(UserError, match="one level too high; give .*copy"):
        DFD(copy.parent)
    with pytest.raises(UserError, match="no compression 'c24'"):
        DFD(copy, compression="c24")
    with pytest.raises(UserError, match="no split 'train'; there are test"):
        DFD(copy, "train")
    with pytest.raises(UserError, match=r"actors/c40/videos is missing; expected\n  original_sequences/actors"):
        DFD(copy, compression="c40")
    videos = copy / FORGED / "c23/videos"
    first = sorted(videos.iterdir())[0]
    first.rename(videos / "01_02__exit_phone_room.mp4")
    with pytest.raises(UserError, match="01_02__exit_phone_room.mp4 is not a name of manipulated_sequences/DeepF"):
        DFD(copy)
    shutil.rmtree(copy / FORGED)
    with pytest.raises(UserError, match="has no manipulated_sequences/DeepFakeDetection"):
        DFD(copy)
