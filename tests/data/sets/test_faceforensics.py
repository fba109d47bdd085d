"""FaceForensics++: what is written in its layout is read back, and folders that are not quite it are refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pyface.data.images import write_png
from pyface.data.sets.clips import Evenly, FrameDataset, Take, couple, film
from pyface.data.sets.faceforensics import FORGERIES, METHODS, FaceForensics, synthesize
from pyface.data.sets.synthesis import Progress
from pyface.data.video import Video
from pyface.errors import UserError

COUNT, FRAMES, SIZE, SEED = 6, 2, 64, 4
SETTINGS = {"seed": SEED, "image_size": SIZE, "frames": FRAMES}
PAIRS = {"train": [("000", "001")], "val": [("002", "003")], "test": [("004", "005")]}


class Counted(Progress):
    def __init__(self):
        self.total = self.files = 0

    def start(self, total):
        self.total = total

    def advance(self, files=1):
        self.files += files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "Gesichter 顔"
    progress = Counted()
    synthesize(out, COUNT, progress=progress, **SETTINGS)
    assert progress.files == progress.total == COUNT * (2 + 4 * 3)
    return out


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def test_files_are_those_of_the_real_data_set(written):
    expected = {f"splits/{split}.json" for split in PAIRS}
    for a, b in (pair for pairs in PAIRS.values() for pair in pairs):
        for target, source in ((a, b), (b, a)):
            for compression in ("c23", "c40"):
                expected.add(f"original_sequences/youtube/{compression}/videos/{target}.mp4")
                for method in METHODS:
                    expected.add(f"manipulated_sequences/{method}/{compression}/videos/{target}_{source}.mp4")
            for method in METHODS:
                expected.add(f"manipulated_sequences/{method}/masks/videos/{target}_{source}.mp4")
    assert {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()} == expected
    for split, pairs in PAIRS.items():
        assert json.loads((written / f"splits/{split}.json").read_text()) == [list(pair) for pair in pairs]


@pytest.mark.parametrize("split", list(PAIRS))
def test_labels_come_back(written, split):
    ((a, b),) = PAIRS[split]
    expected = {(f"original/{name}", 0, "real", name, None, split) for name in (a, b)}
    for target, source in ((a, b), (b, a)):
        expected |= {(f"{m}/{target}_{source}", 1, m, target, source, split) for m in METHODS}
    records = FaceForensics(written, split).records
    assert {(r.id, r.label, r.method, r.identity, r.source, r.split) for r in records} == expected
    assert len(records) == len(expected)
    assert all(record.path.is_file() for record in records)


def quality(a: torch.Tensor, b: torch.Tensor) -> float:
    """PSNR in dB."""
    return float(-10 * torch.log10(((a - b) ** 2).mean()))


def test_frames_come_back_as_good_as_the_codec(written):
    for compression, least in (("c23", 27), ("c40", 20)):
        reader = FaceForensics(written, "val", compression=compression, sampling=Evenly(FRAMES))
        for sample in (reader[0], *(reader[i] for i in range(2, len(reader), 2))):
            target = int(sample["identity"])
            person, other = couple(SEED, 1)[:: 1 if target == 2 else -1]
            take = Take(person, target, {}, FORGERIES.get(sample["method"]), other)
            drawn = film(take, seed=SEED, frames=FRAMES, image_size=SIZE)
            assert sample["frames"].shape == (FRAMES, 3, SIZE, SIZE)
            assert quality(sample["frames"], drawn["images"]) > least, (sample["video"], compression)


def test_a_fake_differs_from_its_original_where_the_mask_is_white(written):
    reader = FaceForensics(written, "train", sampling=Evenly(FRAMES))
    originals = {record.identity: i for i, record in enumerate(reader.records) if record.label == 0}
    for index, record in enumerate(reader.records):
        if record.label == 0:
            continue
        change = (reader[index]["frames"] - reader[originals[record.identity]]["frames"]).abs().mean(1)
        mask = reader.mask(index).frames().mean(1)
        assert mask.shape == change.shape
        assert 0.002 < (mask > 0.5).float().mean() < 0.5, record.id
        assert change[mask > 0.5].mean() > 2 * change[mask < 0.05].mean(), record.id
    with pytest.raises(UserError, match="is real and has no mask"):
        reader.mask(0)


def test_writing_goes_on_where_it_stopped(written, copy):
    files = sorted(path for path in copy.rglob("*.mp4"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    gone = [path for path in files if path.name in ("002.mp4", "003_002.mp4")]
    assert len(gone) == 2 + 4 * 3
    for path in gone:
        path.unlink()
    progress = Counted()
    synthesize(copy, COUNT, progress=progress, **SETTINGS)
    assert progress.files == progress.total
    for path, (content, time) in before.items():
        assert path.read_bytes() == content, path
        assert path in gone or path.stat().st_mtime_ns == time


def test_processes_write_the_same_files(written, tmp_path):
    progress = Counted()
    synthesize(tmp_path, 2, progress=progress, workers=2, **SETTINGS)
    assert progress.files == progress.total == 2 * (2 + 4 * 3)
    videos = list(tmp_path.rglob("*.mp4"))
    assert len(videos) == progress.total
    for path in videos:
        assert path.read_bytes() == (written / path.relative_to(tmp_path)).read_bytes(), path


def test_an_odd_count_grows_and_a_larger_one_keeps_what_is_there(tmp_path):
    synthesize(tmp_path, 1, progress=Progress(), compressions=("raw",), **SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert len(before) == 2 * (1 + 4 * 2)
    synthesize(tmp_path, 3, progress=Progress(), compressions=("raw",), **SETTINGS)
    assert len(list(tmp_path.rglob("*.mp4"))) == 2 * len(before)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(FaceForensics(tmp_path, None, compression="raw")) == 4 * 5


def test_first_order_only(written):
    records = FaceForensics(written, None, first_only=True, methods=["FaceSwap"]).records
    assert [r.id for r in records] == [
        "original/000", "original/002", "original/004", "FaceSwap/000_001", "FaceSwap/002_003", "FaceSwap/004_005"
    ]  # fmt: skip
    assert [r.split for r in records] == ["train", "val", "test"] * 2


def test_parts_are_splits_by_compression(written):
    parts = FaceForensics.parts(written)
    assert parts == [{"split": s, "compression": c} for c in ("c23", "c40") for s in ("train", "val", "test")]
    summary = FaceForensics(written, **parts[0]).summary()
    assert (summary["videos"], summary["labels"], summary["identities"]) == (10, {"real": 2, "fake": 8}, 2)
    assert summary["methods"] == {**dict.fromkeys(METHODS, 2), "real": 2}
    assert (summary["frames"], summary["sizes"]) == ({"fewest": FRAMES, "most": FRAMES}, {"64x64": 10})


def extract(video, folder) -> None:
    for number, pixels in enumerate(Video(video).pixels(range(FRAMES))):
        write_png(folder / f"{number:04d}.png", pixels)


@pytest.fixture
def frames(written, tmp_path):
    """ACMF's layout: extracted frames, and no folder named youtube."""
    for video in (written / "original_sequences/youtube/c23/videos").iterdir():
        extract(video, tmp_path / "ff/original_sequences/c23/images" / video.stem)
    for method in METHODS:
        for video in (written / "manipulated_sequences" / method / "c23/videos").iterdir():
            extract(video, tmp_path / "ff/manipulated_sequences" / method / "c23/images" / video.stem)
    shutil.copytree(written / "splits", tmp_path / "ff/splits")
    return tmp_path / "ff"


def test_extracted_frames_are_read_like_videos(written, frames):
    videos = FaceForensics(written, "test", sampling=Evenly(FRAMES))
    pictures = FaceForensics(frames, "test", sampling=Evenly(FRAMES))
    assert [r.id for r in videos.records] == [r.id for r in pictures.records]
    assert all(torch.equal(a["frames"], b["frames"]) for a, b in zip(videos, pictures, strict=True))
    training = FrameDataset(FaceForensics(frames, "train", first_only=True), every=(1, 4))
    assert [sample["label"] for sample in training] == [0] * FRAMES + [1] * 4
    batch = next(iter(DataLoader(training, batch_size=FRAMES + 4)))
    assert batch["image"].shape == (FRAMES + 4, 3, SIZE, SIZE)
    assert set(batch["method"]) == {"real", *METHODS}


def test_an_unreadable_frame_is_named(frames):
    path = frames / "manipulated_sequences/Face2Face/c23/images/004_005/0001.png"
    path.write_bytes(path.read_bytes()[:300])
    reader = FaceForensics(frames, "test", methods=["Face2Face"], sampling=Evenly(FRAMES))
    assert reader.records[2].id == "Face2Face/004_005"
    with pytest.raises(UserError, match=r"frame 1 of .*004_005: .*0001\.png is cut off or damaged"):
        reader[2]


def test_a_video_cut_off_is_named(copy):
    path = copy / "manipulated_sequences/Deepfakes/c23/videos/000_001.mp4"
    path.write_bytes(path.read_bytes()[:800])
    reader = FaceForensics(copy, "train", methods=["Deepfakes"])
    assert reader[0]["label"] == 0
    with pytest.raises(UserError, match=r"000_001\.mp4 is not a video that can be read, or it is cut off"):
        reader[2]


def test_a_missing_split_file_says_where_it_comes_from(copy, tmp_path):
    shutil.move(copy / "splits", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"train\.json is missing; .*copy dataset/splits from https://github\.com/ond"):
        FaceForensics(copy, "train")
    assert len(FaceForensics(copy, "train", splits=tmp_path / "elsewhere")) == 10


@pytest.mark.parametrize("content", ["[", '{"a": 1}', '[["000"]]', '[["000", "001", "002"]]', "[[0, 1]]", "[3]", "3"])
def test_a_damaged_split_file_is_refused(copy, content):
    (copy / "splits/train.json").write_text(content)
    with pytest.raises(UserError, match=r"train\.json.*list of pairs"):
        FaceForensics(copy, "train")


def test_one_level_too_high_or_low_is_said(written):
    with pytest.raises(UserError, match="one level too high; give .*Gesichter 顔, which holds"):
        FaceForensics(written.parent)
    with pytest.raises(UserError, match="one level too low; give .*Gesichter 顔, which holds"):
        FaceForensics(written / "original_sequences")
    with pytest.raises(UserError, match="does not exist; give the folder that holds\n  original_sequences"):
        FaceForensics(written / "nothing")


def test_missing_videos_and_folders_are_named(copy):
    with pytest.raises(UserError, match=r"youtube/raw/videos is missing; expected\n  original_sequences"):
        FaceForensics(copy, compression="raw")
    with pytest.raises(UserError, match=r"FaceShifter/c23/videos is missing"):
        FaceForensics(copy, methods=["FaceShifter"])
    videos = copy / "manipulated_sequences/NeuralTextures/c23/videos"
    (videos / "001_000.mp4").unlink()
    with pytest.raises(UserError, match=r"NeuralTextures/c23/videos lacks the video 001_000, which the split lists"):
        FaceForensics(copy, "train")
    assert len(FaceForensics(copy, "train", partial=True)) == 9
    for video in videos.iterdir():
        video.unlink()
    with pytest.raises(UserError, match="NeuralTextures/c23/videos holds no videos and no folders of frames"):
        FaceForensics(copy, "train", partial=True)


def test_unknown_choices_are_refused(written):
    for settings in ({"split": "dev"}, {"compression": "c30"}, {"methods": ["Faceswap"]}, {"source": "zip"}):
        with pytest.raises(UserError, match=r"FaceForensics\+\+: no .*; there are "):
            FaceForensics(written, **settings)


def test_a_loop_of_links_does_no_harm(copy):
    (copy / "original_sequences/youtube/c23/videos/loop").symlink_to(copy)
    (copy / "loop").symlink_to(copy)
    assert np.array_equal([r.id for r in FaceForensics(copy, None).records][:2], ["original/000", "original/001"])


def test_a_masks_folder_that_was_not_downloaded_is_named(copy):
    shutil.rmtree(copy / "manipulated_sequences/FaceSwap/masks")
    reader = FaceForensics(copy, "train", methods=["FaceSwap"])
    with pytest.raises(UserError, match="FaceSwap/masks/videos/000_001.mp4 is missing; download the masks of FaceSwap"):
        reader.mask(2)
