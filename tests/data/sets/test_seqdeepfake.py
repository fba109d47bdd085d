import pytest
import torch
from PIL import Image

from pyface.data.edits import edit, sequence_name
from pyface.data.procedural import draw_person, draw_view
from pyface.data.sets.seqdeepfake import SPLITS, SUBSETS, SeqDeepFake
from pyface.data.sets.synthesis import synthesize
from pyface.errors import UserError

SIZE = 32
WRITTEN = ("train", "val")  # four people are too few for a test split


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return synthesize("seqdeepfake", tmp_path_factory.mktemp("seq") / "out", 24, seed=3, image_size=SIZE)


@pytest.fixture
def root(tmp_path):
    """A small data set by hand: one original with an edit, and an edit without an original."""
    rows = ["file_path,label"]
    for sequence, id, label in (
        ("original", "7", "[0, 0, 0, 0, 0]"),
        ("nose-lip", "7", "[1, 4, 0, 0, 0]"),
        ("eye", "ü8", "[2,0,0,0,0]"),
    ):
        file = f"facial_components/images/train/{sequence}/{id}.jpg"
        (tmp_path / file).parent.mkdir(parents=True)
        Image.new("RGB", (20, 20), (len(sequence), 0, 0)).save(tmp_path / file)
        rows.append(f'{file},"{label}"')
    annotate(tmp_path, rows)
    return tmp_path


def annotate(root, rows):
    path = root / "facial_components/annotations/train.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def add(root, row):
    path = root / "facial_components/annotations/train.csv"
    path.write_text(path.read_text(encoding="utf-8") + row + "\n", encoding="utf-8")


def psnr(a, b):
    return -10 * torch.log10(((a - b) ** 2).mean())


@pytest.mark.parametrize("subset", SUBSETS)
def test_what_was_written_is_read_back(written, subset):
    """Labels, folders and pictures agree: making the edits that a label says gives the picture."""
    assert sum(len(SeqDeepFake(written, subset, split)) for split in WRITTEN) == 24
    checked = 0
    for split in WRITTEN:
        reader = SeqDeepFake(written, subset, split, originals=True)
        assert reader.counts()["steps"].keys() == set("012345")  # every person has all lengths
        for index in range(0, len(reader), 5):
            sample = reader[index]
            assert sample["sequence"] == sequence_name(sample["label"].tolist(), SUBSETS[subset])
            assert split in sample["path"]
            number = 2 * int(reader.records[index].path.stem) + list(SUBSETS).index(subset)
            again = edit(
                sample["sequence"], draw_person(3, number), draw_view(3, number), seed=3 + number, image_size=SIZE
            )
            # JPEG keeps half of the colour's resolution
            assert psnr(sample["image"], again.image) > 24
            assert psnr(sample["original"], again.original) > 24
            checked += 1
    assert checked >= 5


def test_no_person_is_in_two_splits(written):
    train, val = ({r.path.stem for r in SeqDeepFake(written, split=split).records} for split in WRITTEN)
    assert len(train) == 3
    assert len(val) == 1
    assert not train & val


def test_labels_and_originals_by_hand(root):
    reader = SeqDeepFake(root)
    assert [record.label for record in reader.records] == [(0,) * 5, (1, 4, 0, 0, 0), (2, 0, 0, 0, 0)]
    assert [record.original and record.original.parent.name for record in reader.records] == ["original"] * 2 + [None]
    assert "original" not in reader[1]
    paired = SeqDeepFake(root, originals=True)
    assert [record.sequence for record in paired.records] == ["original", "nose-lip"]
    assert torch.equal(paired[1]["original"], reader[0]["image"])
    assert reader[2]["label"].dtype == torch.int64
    assert reader.summary()["with original"] == 2
    assert reader.parts(root) == [{"subset": "facial_components", "split": split} for split in SPLITS]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ('a/eye/1.jpg,"[2, 0, 0, 0, 6]"', r"entry 4.*numbers from 0 to 5"),
        ('a/eye/1.jpg,"[2, 0, 0, -1, 0]"', "numbers from 0 to 5"),
        ('a/eye/1.jpg,"[2, 0, 0, 0]"', "five numbers"),
        ('a/eye/1.jpg,"[2, 0, 0, 0, true]"', "five numbers"),
        ("a/eye/1.jpg,nose", "five numbers"),
        ('a/eye/1.jpg,"[2, 0, 3, 0, 0]"', "goes on after a 0"),
        ('a/eye/1.jpg,"[1, 0, 0, 0, 0]"', "disagrees with the folder's name 'eye'"),
        ('a/original/1.jpg,"[1, 0, 0, 0, 0]"', "disagrees"),
        ("a/eye/1.jpg", "line 5: too few fields"),
    ],
)
def test_a_wrong_entry_is_named(root, row, match):
    add(root, row)
    with pytest.raises(UserError, match=match):
        SeqDeepFake(root)


def test_folders_of_unknown_names_are_not_compared(root):
    add(root, 'a/everything/1.jpg,"[1, 2, 0, 0, 0]"')
    assert len(SeqDeepFake(root)) == 4


def test_wrong_columns_and_splits(root):
    with pytest.raises(UserError, match=r"no facial_components/annotations/val\.csv; expected"):
        SeqDeepFake(root, split="val")
    with pytest.raises(UserError, match="no split 'valid'; there are train, val, test"):
        SeqDeepFake(root, split="valid")
    with pytest.raises(UserError, match="no subset"):
        SeqDeepFake(root, subset="faces")
    annotate(root, ["file,label", 'x.jpg,"[0, 0, 0, 0, 0]"'])
    with pytest.raises(UserError, match="no column 'file_path'; its columns are file, label"):
        SeqDeepFake(root)
    annotate(root, ["file_path,label"])
    with pytest.raises(UserError, match="no pictures for the split 'train'"):
        SeqDeepFake(root)


def test_a_level_too_high_or_low_and_missing_pictures(root):
    with pytest.raises(UserError, match="one level too low; give"):
        SeqDeepFake(root / "facial_components")
    with pytest.raises(UserError, match="one level too high; give"):
        SeqDeepFake(root.parent)
    picture = root / "facial_components/images/train/nose-lip/7.jpg"
    picture.write_bytes(picture.read_bytes()[:200])
    reader = SeqDeepFake(root)
    with pytest.raises(UserError, match=r"nose-lip/7\.jpg is"):
        reader[1]
    picture.unlink()
    with pytest.raises(UserError, match=r"nose-lip/7\.jpg: No such file"):
        reader[1]
