import json
from collections import Counter

import pytest
import torch
from PIL import Image

from pyface.data.procedural import draw_person, draw_view, render
from pyface.data.sets.fs2k import BY_SPLIT_AND_STYLE, FS2K
from pyface.data.sets.synthesis import deal, synthesize
from pyface.data.sketch import sketch
from pyface.errors import UserError

SIZE = 48


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return synthesize("fs2k", tmp_path_factory.mktemp("fs2k") / "out", 48, seed=5, image_size=SIZE)


@pytest.fixture
def root(tmp_path):
    """Three pairs by hand; the second artist's sketch is a PNG, as in the release."""
    entries = []
    for number, (folder, suffix) in enumerate(((1, "jpg"), (2, "png"), (3, "jpg"))):
        for place, color in (
            (f"photo/photo{folder}/image0007.jpg", (200, 0, 0)),
            (f"sketch/sketch{folder}/sketch0007.{suffix}", (number, number, number)),
        ):
            (tmp_path / place).parent.mkdir(parents=True)
            Image.new("RGB", (12, 10), color).save(tmp_path / place)
        entries.append({"image_name": f"photo{folder}/image0007", "style": number, "hair": 0, "lip_color": [1.5, 2, 3]})
    annotate(tmp_path, entries)
    return tmp_path


def annotate(root, entries):
    (root / "anno_train.json").write_text(json.dumps(entries))


def entries(root):
    return json.loads((root / "anno_train.json").read_text())


def psnr(a, b):
    return -10 * torch.log10(((a - b) ** 2).mean())


def test_what_was_written_is_read_back(written):
    """Photo, sketch and depth of an entry belong together, and show what the procedural world says they show."""
    cells = [list(BY_SPLIT_AND_STYLE)[cell] for cell in deal(48, list(BY_SPLIT_AND_STYLE.values()))]
    seen = 0
    for split in ("train", "test"):
        reader = FS2K(written, split)
        numbers = [number for number, (of, _) in enumerate(cells) if of == split]
        assert len(numbers) == len(reader)
        for index in range(0, len(reader), 6):
            sample, number = reader[index], numbers[index]
            (again,) = render([draw_person(5, number)], [draw_view(5, number)], SIZE)
            assert sample["image"].shape == (3, SIZE, SIZE)
            assert sample["sketch"].shape == sample["depth"].shape == (1, SIZE, SIZE)
            assert psnr(sample["image"], again["image"]) > 24  # JPEG keeps half of the colour's resolution
            assert psnr(sample["depth"], again["depth"]) > 50  # PNG: exact but for rounding
            likeness = [psnr(sample["sketch"], sketch(again, style, seed=5 + number)) for style in (1, 2, 3)]
            assert max(range(3), key=likeness.__getitem__) == sample["style"]
            assert sample["attributes"]["smile"] == int(not again["attributes"]["Smiling"])
            assert sample["attributes"]["gender"] == int(not again["attributes"]["Male"])
            seen += 1
    assert seen >= 8


def test_shares_of_splits_and_styles(written):
    styles = {split: Counter(r.style for r in FS2K(written, split).records) for split in ("train", "test")}
    assert styles == {"train": {0: 8, 1: 8, 2: 8}, "test": {0: 14, 1: 9, 2: 1}}
    names = [r.name for split in ("train", "test") for r in FS2K(written, split).records]
    assert len(set(names)) == 48
    assert Counter(name.split("/")[0] for name in names)["photo1"] == 35


def test_official_annotations(written):
    keys = "image_name skin_patch lip_color eye_color hair hair_color gender earring smile frontal_face style"
    for split in ("train", "test"):
        for entry in json.loads((written / f"anno_{split}.json").read_text()):
            assert list(entry) == keys.split()
            assert len(entry["skin_patch"]) == 2
            assert len(entry["lip_color"]) in (0, 3)
            assert entry["hair_color"] in range(5)
            assert (entry["hair_color"] == 3) == (entry["hair"] == 1)
            assert {entry[key] for key in ("hair", "gender", "earring", "smile", "frontal_face")} <= {0, 1}


def test_pairs_by_hand(root):
    reader = FS2K(root)
    assert [r.style for r in reader.records] == [0, 1, 2]
    assert [reader[i]["sketch"].mean().mul(255).round().item() for i in range(3)] == [0, 1, 2]
    assert reader[0]["image"].shape == (3, 10, 12)
    assert reader[0]["attributes"] == {"hair": 0}
    assert reader.records[0].attributes["lip_color"] == [1.5, 2, 3]
    assert "depth" not in reader[0]
    assert [r.name for r in FS2K(root, style=1).records] == ["photo2/image0007"]
    assert reader.summary()["styles"] == {"0": 1, "1": 1, "2": 1}


def test_missing_halves_are_listed_by_name(root):
    (root / "sketch/sketch2/sketch0007.png").unlink()
    (root / "photo/photo3/image0007.jpg").unlink()
    with pytest.raises(UserError, match="2 entries.*photo2/image0007, photo3/image0007; complete.*drop_incomplete"):
        FS2K(root)
    reader = FS2K(root, drop_incomplete=True)
    assert reader.dropped == ["photo2/image0007", "photo3/image0007"]
    assert len(reader) == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"style": 3}, r"entry 2 \(photo2/image0007\): style is 3, expected 0, 1 or 2"),
        ({"style": None}, "style is None"),
        ({"style": True}, "style is True"),
        ({"image_name": "image0007"}, "image_name is 'image0007', expected a name such as"),
        ({"image_name": 4}, "image_name is 4"),
        ({"image_name": "photo1/../../image1"}, "image_name is"),
    ],
)
def test_a_wrong_entry_is_named(root, change, match):
    wrong = entries(root)
    wrong[1].update(change)
    annotate(root, wrong)
    with pytest.raises(UserError, match=match):
        FS2K(root)


def test_wrong_files_and_levels(root):
    with pytest.raises(UserError, match=r"no anno_test\.json; expected"):
        FS2K(root, "test")
    with pytest.raises(UserError, match="no split 'val'"):
        FS2K(root, "val")
    with pytest.raises(UserError, match="no style 3"):
        FS2K(root, style=3)
    with pytest.raises(UserError, match="one level too low; give"):
        FS2K(root / "photo")
    with pytest.raises(UserError, match="one level too high; give"):
        FS2K(root.parent)
    annotate(root, {"image_name": "photo1/image0007"})
    with pytest.raises(UserError, match="should be a list"):
        FS2K(root)
    (root / "anno_train.json").write_text('[{"image_name": ')
    with pytest.raises(UserError, match="not valid JSON"):
        FS2K(root)
    annotate(root, [])
    with pytest.raises(UserError, match="no pictures"):
        FS2K(root)
