import pytest
import torch
from PIL import Image

from pyface.data.sets.folder import FolderOfFaces
from pyface.data.sets.synthesis import synthesize
from pyface.errors import UserError


@pytest.fixture
def root(tmp_path):
    for name in ("b/frame10.png", "b/frame9.png", "a/größe 東京.png", "a/deep/er.png"):
        picture(tmp_path / name)
    return tmp_path


def picture(path, size=(12, 8), color=(10, 20, 30), **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **settings)


def names(reader):
    return [record.path.relative_to(reader.root).as_posix() for record in reader.records]


def test_natural_order_and_foreign_names(root):
    reader = FolderOfFaces(root)
    assert names(reader) == ["a/deep/er.png", "a/größe 東京.png", "b/frame9.png", "b/frame10.png"]
    sample = reader[1]
    assert sample["image"].shape == (3, 8, 12)
    assert torch.allclose(sample["image"][:, 0, 0] * 255, torch.tensor([10.0, 20.0, 30.0]))
    assert "label" not in sample


def test_labels_from_folders(root):
    reader = FolderOfFaces(root, "folders")
    assert reader.names == ["a", "b"]
    assert [reader[i]["label"] for i in range(4)] == [0, 0, 1, 1]
    assert reader[3]["name"] == "b"
    assert reader.summary()["classes"] == {"a": 2, "b": 2}
    picture(root / "loose.png")
    with pytest.raises(UserError, match="loose.png is not in a class folder"):
        FolderOfFaces(root, "folders")


def test_numeric_classes_are_in_numerical_order(root):
    for name in ("10", "9"):
        picture(root / "n" / name / "x.png")
    assert FolderOfFaces(root / "n", "folders").names == ["9", "10"]


def test_labels_from_a_list(root, tmp_path_factory):
    path = tmp_path_factory.mktemp("list") / "labels.csv"
    path.write_text("label,file\nzoë,b/frame9.png\nadam,a/größe 東京.png\n", encoding="utf-8")
    reader = FolderOfFaces(root, path)
    assert reader.names == ["adam", "zoë"]
    assert [(r.path.name, r.label) for r in reader.records] == [("frame9.png", 1), ("größe 東京.png", 0)]
    path.write_text("file,person\nb/frame9.png,1\n")
    with pytest.raises(UserError, match="no column 'label'; its columns are file, person"):
        FolderOfFaces(root, path)
    path.write_text("file,label\nb/frame11.png,1\n")
    with pytest.raises(UserError, match=r"names b/frame11\.png, which is not in"):
        FolderOfFaces(root, path)
    with pytest.raises(UserError, match=r"labels\.txt is missing"):
        FolderOfFaces(root, path.with_suffix(".txt"))


def test_exif_orientation(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root / "c/turned.jpg", size=(8, 12), exif=exif)
    assert FolderOfFaces(root / "c")[0]["image"].shape == (3, 8, 12)
    reader = FolderOfFaces(root)
    assert reader[4]["image"].shape == (3, 8, 12)  # turned, it is of the common size
    assert reader.summary()["sizes"] == {"12x8": 5}


@pytest.mark.parametrize("suffix", ["webp", "tif", "bmp", "gif", "JPG"])
def test_formats(tmp_path, suffix):
    picture(tmp_path / f"x.{suffix}")
    reader = FolderOfFaces(tmp_path)
    assert reader[0]["image"].shape == (3, 8, 12)
    assert reader.summary()["sizes"] == {"12x8": 1}


def test_mixed_sizes_are_refused_unless_settled(root):
    picture(root / "c/other.png", size=(9, 9))
    reader = FolderOfFaces(root)
    assert reader[0]["image"].shape == (3, 8, 12)
    with pytest.raises(UserError, match=r"other\.png has 9 x 9 pixels but .*er\.png 12 x 8; give size="):
        reader[4]
    assert FolderOfFaces(root, size=16)[4]["image"].shape == (3, 16, 16)
    assert FolderOfFaces(root, crop=lambda image: image[:, :4, :4])[4]["image"].shape == (3, 4, 4)
    assert FolderOfFaces(root, crop=lambda image: image[:, :4, :4], size=6)[4]["image"].shape == (3, 6, 6)
    shapes = FolderOfFaces(root, transform=lambda sample: tuple(sample["image"].shape))
    assert shapes[4] == (3, 9, 9)
    assert reader.summary()["sizes"] == {"12x8": 4, "9x9": 1}


def test_a_crop_that_fails_names_the_file(root):
    from pyface.data.crop import FaceCrop

    with pytest.raises(UserError, match=r"er\.png: no face was found"):
        FolderOfFaces(root, crop=FaceCrop())[0]


def test_resizing_keeps_constant_pictures_constant(root):
    image = FolderOfFaces(root, size=31)[0]["image"]
    assert torch.allclose(image[:, :1, :1].expand_as(image), image)


def test_unreadable_pictures_are_named(root):
    (root / "b/frame9.png").write_bytes(b"nothing")
    reader = FolderOfFaces(root)
    with pytest.raises(UserError, match=r"frame9\.png is not a picture"):
        reader[2]
    with pytest.raises(UserError, match=r"frame9\.png: not a picture that pyface reads"):
        reader.summary()


def test_loops_of_links_end(root):
    (root / "a/up").symlink_to(root, target_is_directory=True)
    (root / "b/itself").symlink_to(root / "b", target_is_directory=True)
    (root / "b/nowhere.png").symlink_to(root / "missing.png")
    assert len(FolderOfFaces(root)) == 4


def test_wrong_roots(root):
    with pytest.raises(UserError, match="does not exist; give a folder"):
        FolderOfFaces(root / "c")
    with pytest.raises(UserError, match="is a file; give a folder"):
        FolderOfFaces(root / "b/frame9.png")
    (root / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        FolderOfFaces(root / "empty")
    with pytest.raises(UserError, match="size is 0"):
        FolderOfFaces(root, size=0)


def test_what_was_written_is_read_back(tmp_path):
    from pyface.data.procedural import draw_person, draw_view, render

    reader = FolderOfFaces(synthesize("imagefolder", tmp_path / "out", 12, seed=4, image_size=40), "folders")
    assert reader.names == ["person_0001", "person_0002", "person_0003"]
    assert [r.label for r in reader.records] == [0] * 5 + [1] * 5 + [2] * 2
    for index in (0, 6, 11):
        (again,) = render([draw_person(4, index // 5)], [draw_view(4, index)], 40)
        assert -10 * torch.log10((reader[index]["image"] - again["image"]).square().mean()) > 24
