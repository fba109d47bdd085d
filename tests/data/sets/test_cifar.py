import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from pyface.data.sets.cifar import CIFAR, RELEASES
from pyface.errors import UserError

ROWS = 4


def batches(classes, labels=None):
    """The files of a tiny release, as Python 2 wrote them: protocol 2, keys of bytes."""
    release = RELEASES[classes]
    rng = np.random.default_rng(classes)
    files = {}
    for number, name in enumerate(sum(release.files.values(), ())):
        data = rng.integers(0, 256, (ROWS, 3072), np.uint8)
        data[0, :1024], data[0, 1024:2048], data[0, 2048:] = number, 100, 200  # a row is all red, all green, all blue
        chosen = labels or [(number + row) % classes for row in range(ROWS)]
        files[name] = {b"data": data, release.labels: chosen, b"batch_label": b"of 5"}
    files[release.meta] = {release.names: [b"class%d" % number for number in range(classes)]}
    return {name: pickle.dumps(content, protocol=2) for name, content in files.items()}


def unpack(root, files, classes=10):
    folder = root / RELEASES[classes].folder
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def pack(root, files, classes=10):
    with tarfile.open(root / RELEASES[classes].archive, "w:gz") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(f"{RELEASES[classes].folder}/{name}")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


@pytest.mark.parametrize("put", [unpack, pack])
@pytest.mark.parametrize("classes", [10, 100])
def test_both_releases_packed_and_unpacked(tmp_path, classes, put):
    put(tmp_path, batches(classes), classes)
    train, test = CIFAR(tmp_path, classes), CIFAR(tmp_path, classes, "test")
    assert len(train) == ROWS * (5 if classes == 10 else 1)
    assert len(test) == ROWS
    sample = train[-ROWS]
    expected = torch.tensor([4 if classes == 10 else 0, 100, 200]) / 255
    assert torch.equal(sample["image"], expected[:, None, None].expand(3, 32, 32))
    assert sample["name"] == f"class{sample['label']}"
    assert train.parts(tmp_path) == [{"classes": classes, "split": split} for split in ("train", "test")]
    assert test.summary()["sizes"] == {"32x32": ROWS}
    assert sum(test.summary()["labels"].values()) == ROWS


def test_the_archive_itself_can_be_named(tmp_path):
    pack(tmp_path, batches(10))
    assert len(CIFAR(tmp_path / RELEASES[10].archive)) == 5 * ROWS


def test_rows_and_columns_are_not_mixed_up(tmp_path):
    files = batches(10)
    content = pickle.loads(files["test_batch"], encoding="bytes")
    content[b"data"] = content[b"data"].copy()
    content[b"data"][1] = 0
    content[b"data"][1, 32 * 3 + 7] = 255  # red, row 3, column 7
    unpack(tmp_path, {**files, "test_batch": pickle.dumps(content, protocol=2)})
    image = CIFAR(tmp_path, split="test")[1]["image"]
    assert image[0, 3, 7] == 1
    assert image.sum() == 1


def test_torchvision_reads_the_same(tmp_path, monkeypatch):
    """With its checksums switched off. It reads keys as text; ours reads them as text or bytes."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    unpack(tmp_path, batches(10))
    ours = CIFAR(tmp_path)
    contents = {name: pickle.loads(content, encoding="bytes") for name, content in batches(10).items()}
    as_text = {name: {key.decode(): value for key, value in content.items()} for name, content in contents.items()}
    unpack(tmp_path, {name: pickle.dumps(content, protocol=2) for name, content in as_text.items()})
    theirs, again = CIFAR10(tmp_path), CIFAR(tmp_path)
    assert len(theirs) == len(ours) == len(again)
    for index in (0, 7, 19):
        image, label = theirs[index]
        assert np.array_equal(np.asarray(image), ours.records[index].pixels)
        assert np.array_equal(np.asarray(image), again.records[index].pixels)
        assert label == ours[index]["label"] == again[index]["label"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_batch_that_would_run_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unpack(tmp_path, {**batches(10), "data_batch_2": pickle.dumps({b"data": Evil()}, protocol=2)})
    with pytest.raises(UserError, match=r"data_batch_2 is damaged or not a batch of CIFAR-10 \(it names .*system\)"):
        CIFAR(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_damage_is_named(tmp_path):
    files = batches(10)
    unpack(tmp_path, {**files, "data_batch_3": files["data_batch_3"][:900]})
    with pytest.raises(UserError, match="data_batch_3 is damaged"):
        CIFAR(tmp_path)
    (tmp_path / RELEASES[10].folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match="has no data_batch_3; unpack the whole archive again"):
        CIFAR(tmp_path)
    unpack(tmp_path, {"data_batch_3": pickle.dumps({b"data": files}, protocol=2)})
    with pytest.raises(UserError, match="data_batch_3 has no entry 'labels'"):
        CIFAR(tmp_path)
    unpack(tmp_path, {"data_batch_3": pickle.dumps([1, 2], protocol=2)})
    with pytest.raises(UserError, match="has no entry 'data'"):
        CIFAR(tmp_path)
    unpack(tmp_path, {"data_batch_3": pickle.dumps({b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 1]}, 2)})
    with pytest.raises(UserError, match="one row of 3072 bytes per label"):
        CIFAR(tmp_path)


@pytest.mark.parametrize("wrong", [10, -1, True, 0.5])
def test_labels_out_of_range(tmp_path, wrong):
    unpack(tmp_path, batches(10, labels=[0, 1, wrong, 2]))
    with pytest.raises(UserError, match=r"data_batch_1 holds the label .*, expected 0 to 9"):
        CIFAR(tmp_path)


def test_a_cut_or_wrong_archive(tmp_path):
    pack(tmp_path, batches(10))
    path = tmp_path / RELEASES[10].archive
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut off or not a tar archive"):
        CIFAR(tmp_path)
    path.write_bytes(b"not an archive")
    with pytest.raises(UserError, match="cut off or not a tar archive"):
        CIFAR(tmp_path)
    pack(tmp_path, {name: content for name, content in batches(10).items() if name != "data_batch_5"})
    with pytest.raises(UserError, match="has no cifar-10-batches-py/data_batch_5"):
        CIFAR(tmp_path)


def test_levels_and_settings(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    unpack(root, batches(10))
    with pytest.raises(UserError, match="one level too low; give"):
        CIFAR(root / RELEASES[10].folder)
    with pytest.raises(UserError, match="one level too high; give"):
        CIFAR(tmp_path)
    with pytest.raises(UserError, match="has no cifar-100-python or cifar-100-python.tar.gz; expected"):
        CIFAR(root, 100)
    with pytest.raises(UserError, match="no release with 20 classes"):
        CIFAR(root, 20)
    with pytest.raises(UserError, match="no split 'val'"):
        CIFAR(root, split="val")
