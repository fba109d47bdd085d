import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from pyface.data.procedural import draw_person, draw_view, render
from pyface.data.sets.celeba import ATTRIBUTES, SPLITS, TEMPLATE, CelebA, _align, _similarity
from pyface.data.sets.synthesis import synthesize
from pyface.errors import UserError

WIDTH = 89


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return synthesize("celeba", tmp_path_factory.mktemp("celeba") / "out", 40, seed=1, image_size=WIDTH)


@pytest.fixture
def root(tmp_path):
    """Three pictures by hand, one in each split, with two attributes."""
    (tmp_path / "img_align_celeba").mkdir()
    for number in (1, 2, 3):
        Image.new("RGB", (178, 218), (number, 0, 0)).save(tmp_path / f"img_align_celeba/{number:06d}.png")
    write(tmp_path, "list_eval_partition.txt", "000001.png 0\n000002.png 1\n000003.png 2\n")
    write(tmp_path, "list_attr_celeba.txt", "3\nBald Young\n000001.png -1  1\n000002.png  1 -1\n000003.png  1  1\n")
    return tmp_path


def write(root, name, text):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(text)


def test_what_was_written_is_read_back(written):
    """Attributes and identity of a picture are those of the person and view that it shows; the points lie right."""
    readers = [CelebA(written, split) for split in SPLITS]
    assert sum(map(len, readers)) == 40
    for reader in readers:
        for index in range(len(reader)):
            record = reader.records[index]
            number = int(record.path.stem) - 1
            person = record.identity - 1
            assert person == number % 10
            if number % 7 == 0:
                sample = reader[index]
                (shown,) = render([draw_person(1, person)], [draw_view(1, number)], 64)
                assert sample["image"].shape == (3, 109, WIDTH)
                assert sample["identity"] == person + 1
                known = {name: shown["attributes"].get(name, False) for name in ATTRIBUTES}
                assert sample["attributes"] == known
                assert sample["landmarks"].shape == (5, 2)
                assert (sample["landmarks"][:2] - torch.tensor(TEMPLATE[:2]) / 2).abs().max() < 10


def test_the_split_is_by_person(written):
    people = [{record.identity for record in CelebA(written, split).records} for split in SPLITS]
    assert [len(some) for some in people] == [8, 1, 1]
    assert len(set.union(*people)) == 10


def test_alignment_puts_the_eyes_on_the_template():
    (sample,) = render([draw_person(0, 0)], [draw_view(0, 0)], 128)
    turned = {
        **sample,
        "image": sample["image"].flip(2),
        "landmarks": torch.stack((127 - sample["landmarks"][:, 0], sample["landmarks"][:, 1]), 1),
    }
    swap = [*range(42, 48), *range(36, 42)]
    turned["landmarks"][36:48] = turned["landmarks"][swap].clone()
    turned["landmarks"][[48, 54]] = turned["landmarks"][[54, 48]].clone()
    for case in (sample, turned):
        (pixels,), note = _align(case, 178, 218)
        assert pixels.shape == (218, 178, 3)
        assert pixels.dtype == np.uint8
        points = np.array(note["landmarks"]).reshape(5, 2)
        assert np.abs(points - np.array(TEMPLATE)).max() < 12
        assert np.abs(points.mean(0) - np.mean(TEMPLATE, 0)).max() < 1


@given(
    angle=st.floats(-3, 3), scale=st.floats(0.2, 5), shift=arrays(float, 2, elements=st.floats(-50, 50)),
)  # fmt: skip
def test_similarity_is_found_exactly_where_there_is_one(angle, scale, shift):
    points = np.array(TEMPLATE, float)
    turn = scale * np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))))
    found = _similarity(points, points @ turn.T + shift)
    assert np.allclose(found[:2, :2], turn)
    assert np.allclose(found[:2, 2], shift, atol=1e-6)


def test_official_formats(written):
    lines = (written / "list_attr_celeba.txt").read_text().splitlines()
    assert lines[0] == "40"
    assert tuple(lines[1].split()) == ATTRIBUTES
    assert len(ATTRIBUTES) == 40
    assert lines[2].split()[0] == "000001.jpg"
    assert set(lines[2].split()[1:]) == {"-1", "1"}
    assert (written / "list_eval_partition.txt").read_text().startswith("000001.jpg 0\n")
    assert (written / "identity_CelebA.txt").read_text().startswith("000001.jpg 1\n")
    head = (written / "list_landmarks_align_celeba.txt").read_text().splitlines()[1].split()
    assert head[:4] == ["lefteye_x", "lefteye_y", "righteye_x", "righteye_y"]
    assert (written / "list_bbox_celeba.txt").read_text().splitlines()[1].split()[0] == "image_id"


def test_torchvision_parses_the_same_lists(written, tmp_path, monkeypatch):
    """torchvision's own reader, with its checksums switched off, sees what ours sees."""
    from torchvision.datasets import CelebA as Theirs

    monkeypatch.setattr(Theirs, "_check_integrity", lambda self: True)
    (tmp_path / "celeba").symlink_to(written, target_is_directory=True)
    theirs = Theirs(tmp_path, split="train", target_type=["attr", "identity", "landmarks"])
    ours = CelebA(written)
    assert len(theirs) == len(ours)
    for index in (0, 11, 29):
        _, (attributes, identity, points) = theirs[index]
        assert attributes.tolist() == [int(has) for has in ours[index]["attributes"].values()]
        assert identity == ours[index]["identity"]
        assert points.tolist() == ours[index]["landmarks"].flatten().int().tolist()


def test_by_hand(root):
    samples = [CelebA(root, split)[0] for split in SPLITS]
    assert [s["attributes"] for s in samples] == [
        {"Bald": False, "Young": True},
        {"Bald": True, "Young": False},
        {"Bald": True, "Young": True},
    ]
    assert "identity" not in samples[0]
    assert "landmarks" not in samples[0]
    write(root, "identity_CelebA.txt", "000001.png 2880\n000002.png 2937\n000003.png 8692\n")
    assert CelebA(root)[0]["identity"] == 2880
    assert CelebA(root).summary() == {
        **{"name": "CelebA", "split": "train", "images": 1, "identities": 1},
        **{"attributes": {"Young": 1.0}, "sizes": {"178x218": 1}},
    }


def test_folders_of_the_official_download(root):
    for name, folder in (("list_attr_celeba.txt", "Anno"), ("list_eval_partition.txt", "Eval")):
        write(root, f"{folder}/{name}", (root / name).read_text())
        (root / name).unlink()
    (root / "Img").mkdir()
    (root / "img_align_celeba").rename(root / "Img/img_align_celeba")
    assert CelebA(root, "test")[0]["attributes"] == {"Bald": True, "Young": True}


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("list_eval_partition.txt", "000001.png 3\n", r"line 1 \(000001.png\): 3 is not one of 0, 1, 2"),
        ("list_eval_partition.txt", "000001.png\n", "line 1: expected a name and 1 whole numbers"),
        ("list_eval_partition.txt", "000009.png 0\n", "000009.png is in list_eval.* but not in .*list_attr"),
        ("list_eval_partition.txt", "000001.png 1\n", "no pictures for the split 'train'"),
        ("list_attr_celeba.txt", "1\nBald Young\n000001.png 0 1\n", "0 is not one of -1, 1"),
        ("list_attr_celeba.txt", "1\nBald Young\n000001.png 1\n", "expected a name and 2 whole numbers"),
        ("list_attr_celeba.txt", "1\nBald Young\n000001.png 1 yes\n", "line 3: expected"),
        ("list_attr_celeba.txt", "2\nBald Young\n000001.png 1 1\n", "says 2 pictures but lists 1; is it cut off"),
        ("list_attr_celeba.txt", "Bald Young\n", "should begin with the number"),
        ("identity_CelebA.txt", "000002.png 4\n", "000001.png is in list_eval.* but not in .*identity_CelebA"),
        ("list_landmarks_align_celeba.txt", "1\nx y\n000001.png 1 2\n", "expected a name and 10 whole numbers"),
    ],
)
def test_a_wrong_list_is_named(root, name, text, match):
    write(root, name, text)
    with pytest.raises(UserError, match=match):
        CelebA(root)


def test_missing_parts_and_levels(root):
    with pytest.raises(UserError, match="one level too low; give"):
        CelebA(root / "img_align_celeba")
    with pytest.raises(UserError, match="one level too high; give"):
        CelebA(root.parent)
    with pytest.raises(UserError, match="no split 'val'; there are train, valid, test"):
        CelebA(root, "val")
    (root / "img_align_celeba/000001.png").unlink()
    with pytest.raises(UserError, match="000001.png: No such file"):
        CelebA(root)[0]
    (root / "list_eval_partition.txt").unlink()
    with pytest.raises(UserError, match=r"no list_eval_partition\.txt or Eval/list_eval_partition\.txt; expected"):
        CelebA(root)
