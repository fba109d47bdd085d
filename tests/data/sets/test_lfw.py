from collections import Counter
from itertools import combinations

import pytest
import torch
from PIL import Image

from pyface.data.sets.lfw import FOLDS, LFW, LFWPairs, _name
from pyface.data.sets.synthesis import synthesize
from pyface.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return synthesize("lfw", tmp_path_factory.mktemp("lfw") / "out", 64, seed=2, image_size=32)


@pytest.fixture
def root(tmp_path):
    for name, pictures in (("Ana_Ülker", 2), ("Bo_Li", 1)):
        (tmp_path / "lfw" / name).mkdir(parents=True)
        for number in range(1, pictures + 1):
            Image.new("RGB", (30, 30), (number, 0, 0)).save(tmp_path / f"lfw/{name}/{name}_{number:04d}.jpg")
    write(tmp_path, "pairs.txt", "1\t1\nAna_Ülker\t1\t2\nAna_Ülker\t2\tBo_Li\t1\n")
    write(tmp_path, "people.txt", "1\n2\nAna_Ülker\t2\nBo_Li\t1\n")
    return tmp_path


def write(root, name, text):
    (root / name).write_text(text, encoding="utf-8")


def test_people_of_the_written_set(written):
    everybody = LFW(written)
    assert len(everybody) == 64
    for index in range(0, 64, 9):
        sample = everybody[index]
        assert sample["image"].shape == (3, 32, 32)
        assert f"/lfw/{sample['name']}/{sample['name']}_" in sample["path"]
    assert {r.name: r.identity for r in everybody.records} == {
        name: number for number, name in enumerate(sorted({r.name for r in everybody.records}))
    }
    train, test, folds = (LFW(written, split) for split in ("train", "test", "folds"))
    assert len(train) + len(test) == len(folds) == 64
    assert not {r.name for r in train.records} & {r.name for r in test.records}


def test_pictures_of_one_person_are_alike(written):
    """Same name means same person: hair, skin and build make pictures of one person closer than of two."""
    pairs = LFWPairs(written, "train")

    def colour(image):  # of the face's middle
        return image[:, 10:22, 12:20].mean((1, 2))

    distances = {True: [], False: []}
    for index in range(len(pairs)):
        sample = pairs[index]
        distances[sample["same"]].append((colour(sample["image"]) - colour(sample["other"])).norm())
    assert torch.stack(distances[True]).median() < torch.stack(distances[False]).median()


def test_the_ten_fold_protocol(written):
    pairs = LFWPairs(written)
    folds = list(pairs.folds())
    assert len(folds) == FOLDS
    shown = [
        {path.parent.name for r in pairs.records if r.fold == f for path in (r.path, r.other)} for f in range(FOLDS)
    ]
    for a, b in combinations(shown, 2):
        assert not a & b  # no person in two folds
    for rest, fold in folds:
        assert len(rest) + len(fold) == len(pairs)
        assert Counter(pairs.records[i].same for i in fold) == {True: len(fold) // 2, False: len(fold) // 2}
    assert len({(r.path, r.other) for r in pairs.records}) == len(pairs)


def test_view_1_uses_the_people_of_its_own_lists(written):
    for split in ("train", "test"):
        people = {r.name for r in LFW(written, split).records}
        pairs = LFWPairs(written, split)
        assert {path.parent.name for r in pairs.records for path in (r.path, r.other)} <= people
        assert {r.fold for r in pairs.records} == {0}


def test_scikit_learn_reads_the_same_pairs(written, tmp_path, monkeypatch):
    """scikit-learn's own reader of LFW finds the same number of same and different pairs in our lists."""
    from sklearn.datasets import fetch_lfw_pairs

    home = tmp_path / "lfw_home"
    home.mkdir()
    (home / "lfw").symlink_to(written / "lfw", target_is_directory=True)
    for name in ("pairs.txt", "pairsDevTrain.txt", "pairsDevTest.txt"):
        (home / name).symlink_to(written / name)
    for subset, split in (("train", "train"), ("test", "test"), ("10_folds", "folds")):
        theirs = fetch_lfw_pairs(
            subset=subset, data_home=tmp_path, funneled=False, resize=None, slice_=(slice(0, 32), slice(0, 32)),
            color=True, download_if_missing=False,
        )  # fmt: skip
        ours = LFWPairs(written, split)
        assert [bool(t) for t in theirs.target] == [r.same for r in ours.records]
        first = torch.from_numpy(theirs.pairs[0, 0]).permute(2, 0, 1)
        assert torch.allclose(first / first.max(), ours[0]["image"] / ours[0]["image"].max(), atol=2e-2)


def test_by_hand(root):
    sample = LFWPairs(root)[1]
    assert sample["same"] is False
    assert sample["fold"] == 0
    assert sample["path"].endswith("Ana_Ülker_0002.jpg")
    assert LFWPairs(root).records[1].other.name == "Bo_Li_0001.jpg"
    cropped = LFWPairs(root, crop=lambda image: image[:, 5:15, 5:15])[0]
    assert cropped["image"].shape == cropped["other"].shape == (3, 10, 10)
    assert [r.name for r in LFW(root, "folds").records] == ["Ana_Ülker", "Ana_Ülker", "Bo_Li"]
    assert LFW(root).summary()["people by pictures"] == {"1": 1, "2": 1}
    assert LFW.parts(root) == [{"split": "all"}, {"split": "folds"}]
    assert LFWPairs.parts(root) == [{"split": "folds"}]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("pairs.txt", "1\t1\nAna_Ülker\t1\t2\n", "announces 2 pairs but lists 1; is it cut off"),
        (
            "pairs.txt",
            "1\t1\nAna_Ülker\t1\t2\nAna_Ülker\t2\tBo_Li\n",
            "line 'Ana_Ülker 2 Bo_Li'; expected a name and two",
        ),
        ("pairs.txt", "1\t1\nAna_Ülker\t1\t2\nAna_Ülker\t2\tBo_Li\t7\n", r"not there: .*Bo_Li_0007\.jpg"),
        ("pairs.txt", "Ana_Ülker\t1\t2\n", "expected first the number of folds"),
        ("pairs.txt", "", "expected first the number of folds"),
        ("pairs.txt", "0\t0\n", "no pictures for the split 'folds'"),
    ],
)
def test_a_wrong_list_of_pairs_is_named(root, name, text, match):
    write(root, name, text)
    with pytest.raises(UserError, match=match):
        LFWPairs(root)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1\n3\nAna_Ülker\t2\nBo_Li\t1\n", "announces 3 people but lists 2"),
        ("1\n2\nAna_Ülker\t2\nBo_Li\tone\n", "line 'Bo_Li one'; expected a name and a number"),
        ("1\n2\nAna_Ülker\t3\nBo_Li\t1\n", r"not there: .*Ana_Ülker_0003\.jpg"),
    ],
)
def test_a_wrong_list_of_people_is_named(root, text, match):
    write(root, "people.txt", text)
    with pytest.raises(UserError, match=match):
        LFW(root, "folds")


def test_missing_lists_and_levels(root):
    with pytest.raises(UserError, match=r"no pairsDevTrain\.txt; expected"):
        LFWPairs(root, "train")
    with pytest.raises(UserError, match=r"no peopleDevTest\.txt; expected"):
        LFW(root, "test")
    with pytest.raises(UserError, match="no split '10fold'"):
        LFWPairs(root, "10fold")
    with pytest.raises(UserError, match="one level too low; give"):
        LFW(root / "lfw")
    with pytest.raises(UserError, match="one level too high; give"):
        LFW(root.parent)


def test_names_are_unique():
    names = [_name(person, female=person % 3 == 0) for person in range(60_000)]
    assert len(set(names)) == len(names)
    assert all(name.isascii() and " " not in name for name in names)


def test_too_few_for_ten_folds(tmp_path):
    with pytest.raises(UserError, match="at least 30 pictures"):
        synthesize("lfw", tmp_path / "out", 29)
