"""WildDeepfake: archives are read without unpacking them, and like the same files unpacked."""

from __future__ import annotations

import json
import shutil
import tarfile

import pytest
import torch
from torch.utils.data import DataLoader

from pyface.data.sets import wilddeepfake
from pyface.data.sets.clips import Evenly, FrameDataset, Take, couple, film
from pyface.data.sets.synthesis import Progress
from pyface.data.sets.wilddeepfake import WildDeepfake, synthesize
from pyface.errors import UserError

COUNT, FRAMES, SIZE, SEED = 6, 3, 48, 5


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "wild"
    synthesize(out, COUNT, seed=SEED, image_size=SIZE, frames=FRAMES, progress=Progress())
    return out


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


@pytest.fixture
def unpacked(written, tmp_path):
    for path in written.rglob("*.tar.gz"):
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "unpacked" / path.parent.name, filter="data")
    return tmp_path / "unpacked"


def test_files_are_those_of_the_real_data_set(written):
    names = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    places = {"train": (0, 2), "test": (1,)}
    assert names == {f"{k}_{s}/{n}.tar.gz" for k in ("real", "fake") for s, numbers in places.items() for n in numbers}
    with tarfile.open(written / "fake_test/1.tar.gz") as archive:
        assert archive.getnames() == [f"1/fake/{s}/{f}.png" for s in range(2) for f in range(FRAMES)]


def test_labels_come_back(written):
    records = WildDeepfake(written, "train").records
    assert [(r.id, r.label, r.method, r.identity, r.source, r.split) for r in records] == [
        (f"{kind}_train/{k}/{s}", int(kind == "fake"), "unknown" if kind == "fake" else "real", f"{kind}_train/{k}",
         None, "train")
        for kind in ("real", "fake") for k in (0, 2) for s in range(2)
    ]  # fmt: skip
    assert len(WildDeepfake(written, None)) == 12
    assert WildDeepfake.parts(written) == [{"split": "train"}, {"split": "test"}]
    assert WildDeepfake(written, "test").summary()["sizes"] == {f"{SIZE}x{SIZE}": 4}


def test_frames_come_back_exactly(written):
    reader = WildDeepfake(written, "test", sampling=Evenly(FRAMES))
    (real, _), (fake, source) = couple(SEED, 30_002), couple(SEED, 30_003)
    for index, take in ((1, Take(real, 30_005, {})), (3, Take(fake, 30_007, {}, "colour_transfer", source))):
        drawn = film(take, seed=SEED, frames=FRAMES, image_size=SIZE, framing=1.0)["images"]
        assert torch.equal(reader[index]["frames"], (drawn.clamp(0, 1) * 255).round() / 255)


def test_archives_and_folders_read_alike(written, unpacked):
    packed, loose = (WildDeepfake(root, None, sampling=Evenly(2)) for root in (written, unpacked))
    assert [r.id for r in packed.records] == [r.id for r in loose.records]
    # Backwards, so that the archive has to be opened again for every sequence.
    for index in reversed(range(len(packed))):
        assert torch.equal(packed[index]["frames"], loose[index]["frames"])
        assert packed.records[index].label == loose.records[index].label
    assert torch.equal(packed.open(3).frames([2, 0, 2]), loose.open(3).frames([2, 0, 2]))


def test_archives_are_read_in_forked_workers(written):
    reader = WildDeepfake(written, "train", sampling=Evenly(2))
    expected = torch.stack([sample["frames"] for sample in reader])
    loader = DataLoader(reader, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat([batch["frames"] for batch in loader]), expected)
    assert len(FrameDataset(reader, every=2)) == 8 * 2


def test_writing_goes_on_where_it_stopped(copy):
    paths = sorted(copy.rglob("*.tar.gz"))
    before = {path: path.read_bytes() for path in paths}
    paths[0].unlink()
    synthesize(copy, COUNT, seed=SEED, image_size=SIZE, frames=FRAMES, progress=Progress())
    assert {path: path.read_bytes() for path in sorted(copy.rglob("*.tar.gz"))} == before


def test_archives_are_listed_once(copy, tmp_path, monkeypatch):
    listed = []
    original = wilddeepfake._list_archive
    monkeypatch.setattr(wilddeepfake, "_list_archive", lambda path: listed.append(path.name) or original(path))
    index = tmp_path / "run/index.json"
    first = WildDeepfake(copy, "train", index=index)
    assert sorted(listed) == ["0.tar.gz", "0.tar.gz", "2.tar.gz", "2.tar.gz"]
    again = WildDeepfake(copy, "train", index=index)
    assert len(listed) == 4
    assert torch.equal(first[3]["frames"], again[3]["frames"])
    shutil.copyfile(copy / "real_train/2.tar.gz", copy / "real_train/tmp")
    (copy / "real_train/tmp").replace(copy / "real_train/2.tar.gz")
    WildDeepfake(copy, "train", index=index)
    assert len(listed) == 5
    index.write_text("[]")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        WildDeepfake(copy, "train", index=index)
    index.write_text(json.dumps({"real_train/0.tar.gz": 3}))
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        WildDeepfake(copy, "train", index=index)


def test_only_sequences_of_a_name(unpacked):
    (unpacked / "real_test/1/real/1").rename(unpacked / "real_test/1/real/1_new")
    (unpacked / "fake_test/1/fake/0").rename(unpacked / "fake_test/1/fake/0_new")
    records = WildDeepfake(unpacked, "test", containing="new").records
    assert [r.id for r in records] == ["real_test/1/1_new", "fake_test/1/0_new"]
    with pytest.raises(UserError, match="has no videos for the split 'train'"):
        WildDeepfake(unpacked, "train", containing="new")


def test_damaged_archives_are_named(copy):
    path = copy / "fake_test/1.tar.gz"
    whole = path.read_bytes()
    reader = WildDeepfake(copy, "test")
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UserError, match=r"fake_test/1\.tar\.gz is cut off or damaged"):
        WildDeepfake(copy, "test")
    with pytest.raises(UserError, match=r"frame \d of .*1\.tar\.gz \(fake_test/1/1\): \d\.png is missing or damaged"):
        reader[3]
    path.write_text("no archive")
    with pytest.raises(UserError, match=r"fake_test/1\.tar\.gz is cut off or damaged"):
        WildDeepfake(copy, "test")


def test_a_label_that_contradicts_the_folder_is_refused(copy, unpacked):
    shutil.copyfile(copy / "fake_test/1.tar.gz", copy / "real_test/3.tar.gz")
    with pytest.raises(UserError, match=r"real_test/3\.tar\.gz holds fake, expected 3/real/<sequence>"):
        WildDeepfake(copy, "test")
    (unpacked / "real_test/1/real").rename(unpacked / "real_test/1/fake")
    with pytest.raises(UserError, match=r"real_test/1 holds fake, expected 1/real/<sequence>"):
        WildDeepfake(unpacked, "test")


def test_other_layouts_are_refused(copy):
    with pytest.raises(UserError, match="one level too high; give .*copy"):
        WildDeepfake(copy.parent)
    with pytest.raises(UserError, match="one level too low; give .*copy"):
        WildDeepfake(copy / "real_test")
    with pytest.raises(UserError, match="no split 'val'"):
        WildDeepfake(copy, "val")
    shutil.rmtree(copy / "fake_train")
    assert WildDeepfake.parts(copy) == [{"split": "test"}]
    with pytest.raises(UserError, match="has no fake_train"):
        WildDeepfake(copy, "train")
    (copy / "real_test/1.tar.gz").unlink()
    with pytest.raises(UserError, match="real_test holds no archives and no folders"):
        WildDeepfake(copy, "test")
