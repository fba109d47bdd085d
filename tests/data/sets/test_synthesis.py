import importlib
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pyface.data.sets.recognise import KNOWN, recognise, summaries
from pyface.data.sets.synthesis import JOURNAL, LAYOUTS, MANIFEST, Progress, deal, synthesize
from pyface.errors import UserError

COUNTS = {"lfw": 31, "seqdeepfake": 7}
PICTURES = ("seqdeepfake", "fs2k", "celeba", "lfw", "imagefolder")


def count_of(layout):
    return COUNTS.get(layout, 12)


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def visible(root):
    return {name: data for name, data in contents(root).items() if not name.startswith(".pyface")}


class Bar(Progress):
    """Counts, and interrupts the writer after so many files."""

    def __init__(self, stop_after=None):
        self.total = self.done = 0
        self.stop_after = stop_after

    def start(self, total):
        self.total = total

    def advance(self, files=1):
        self.done += files
        if self.stop_after is not None and self.done >= self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every picture layout, written in one go."""
    home = tmp_path_factory.mktemp("whole")
    return {name: synthesize(name, home / name, count_of(name), seed=9, image_size=32) for name in PICTURES}


@pytest.mark.parametrize("layout", PICTURES)
def test_an_interrupted_run_continues_to_the_same_files(whole, tmp_path, layout):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        synthesize(layout, out, count_of(layout), seed=9, image_size=32, progress=Bar(stop_after=8))
    early = contents(out)
    assert len(visible(out)) >= 7
    with open(out / JOURNAL, "a") as journal:
        journal.write('\n["torn')  # as a kill in the middle of a write leaves it
    bar = Bar()
    synthesize(layout, out, count_of(layout), seed=9, image_size=32, progress=bar)
    assert bar.done == bar.total
    assert visible(out) == visible(whole[layout])
    assert all(contents(out)[name] == data for name, data in early.items() if name.endswith(("jpg", "png")))


@pytest.mark.parametrize("layout", PICTURES)
def test_a_larger_count_adds(whole, tmp_path, layout):
    out = tmp_path / "out"
    smaller = count_of(layout) - 1
    synthesize(layout, out, smaller, seed=9, image_size=32)
    before = {name: data for name, data in visible(out).items() if name.endswith(("jpg", "png"))}
    stamps = {name: (out / name).stat().st_mtime_ns for name in before}
    synthesize(layout, out, count_of(layout), seed=9, image_size=32)
    assert visible(out) == visible(whole[layout])
    assert before.items() <= visible(out).items()
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())


def test_a_lost_picture_is_made_again(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole["celeba"], out)
    (out / "img_align_celeba/000003.jpg").unlink()
    (out / "list_attr_celeba.txt").unlink()
    synthesize("celeba", out, count_of("celeba"), seed=9, image_size=32)
    assert visible(out) == visible(whole["celeba"])


def test_seeds_differ(whole, tmp_path):
    other = synthesize("imagefolder", tmp_path / "out", 12, seed=10, image_size=32)
    mine, theirs = visible(other), visible(whole["imagefolder"])
    assert mine.keys() == theirs.keys()
    assert all(mine[name] != theirs[name] for name in mine)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seed": 10}, "was begun with seed 9, not 10; go on with the same settings, or give a new folder"),
        ({"image_size": 64}, "was begun with image size 32, not 64"),
        ({"layout": "celeba"}, "was begun with layout imagefolder, not celeba"),
        ({"count": 11}, "was begun with count 12, not 11; the count can grow but not shrink"),
    ],
)
def test_other_settings_are_refused(whole, settings, match):
    before = contents(whole["imagefolder"])
    given = {"layout": "imagefolder", "count": 12, "seed": 9, "image_size": 32, **settings}
    with pytest.raises(UserError, match=match):
        synthesize(given.pop("layout"), whole["imagefolder"], given.pop("count"), **given)
    assert contents(whole["imagefolder"]) == before


def test_wrong_arguments(tmp_path):
    with pytest.raises(UserError, match="no layout 'ff'; there are ffpp, celebdf"):
        synthesize("ff", tmp_path / "out", 1)
    with pytest.raises(UserError, match="count is 0, expected 1 or more pictures"):
        synthesize("celeba", tmp_path / "out", 0)
    with pytest.raises(UserError, match="image size is 8"):
        synthesize("celeba", tmp_path / "out", 1, image_size=8)
    with pytest.raises(UserError, match="seed is -1"):
        synthesize("celeba", tmp_path / "out", 1, seed=-1)
    with pytest.raises(UserError, match="workers is 2, expected 1, because"):
        synthesize("celeba", tmp_path / "out", 1, workers=2)
    with pytest.raises(UserError, match="workers is 0, expected 1 or more"):
        synthesize("ffpp", tmp_path / "out", 1, workers=0)
    assert not (tmp_path / "out").exists()


def test_foreign_and_damaged_folders(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and was not begun by 'pyface synthesize'"):
        synthesize("imagefolder", tmp_path, 1, image_size=16)
    with pytest.raises(UserError, match="is a file; give a folder"):
        synthesize("imagefolder", tmp_path / "mine.txt", 1, image_size=16)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="is damaged; give a new folder"):
        synthesize("imagefolder", tmp_path, 1, image_size=16)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        synthesize("imagefolder", tmp_path, 1, image_size=16)
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, "mine.txt"]


@given(
    shares=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    count=st.integers(0, 200),
    more=st.integers(0, 50),
)
def test_deal_keeps_shares_and_prefixes(shares, count, more):
    parts = deal(count, shares)
    assert deal(count + more, shares)[:count] == parts
    held = np.bincount(parts, minlength=len(shares))
    assert held.sum() == count
    assert np.all(held - count * np.array(shares) / sum(shares) < 1 + 1e-6)


def test_every_layout_has_a_reader():
    assert LAYOUTS.keys() <= KNOWN.keys()


@pytest.mark.parametrize("layout", PICTURES)
def test_written_layouts_are_recognised_and_summed_up(whole, layout):
    assert recognise(whole[layout]) == [layout]
    found = summaries(whole[layout])
    assert json.loads(json.dumps(found)) == found
    assert not any("problem" in part for part in found)
    splits = [part for part in found if part["name"] == found[0]["name"] and part["part"] != {"split": "folds"}]
    # of LFW: everybody, and again in the two parts of the development view
    assert sum(part["images"] for part in splits) == {"seqdeepfake": 14, "lfw": 62}.get(layout, 12)


@pytest.mark.parametrize("layout", PICTURES)
def test_samples_make_batches_in_worker_processes(whole, layout):
    """Readers survive pickling, and torch's default collation takes their samples."""
    module, name = KNOWN[layout].readers[0].split(":")
    reader = getattr(importlib.import_module(f"pyface.data.sets.{module}"), name)
    data = pickle.loads(pickle.dumps(reader(whole[layout], **reader.parts(whole[layout])[0])))
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch["image"].shape[:2] == (3, 3)
    assert torch.equal(batch["image"][2], data[2]["image"])


def test_recognising_a_wrong_level(whole, tmp_path):
    with pytest.raises(UserError, match=r"inside of the data set fs2k, one level too low; give .*fs2k"):
        recognise(whole["fs2k"] / "photo")
    with pytest.raises(UserError, match=r"one level too high; give .*celeba or .*fs2k or"):
        recognise(whole["fs2k"].parent)
    with pytest.raises(UserError, match="holds neither pictures nor one of the layouts"):
        recognise(tmp_path)
    with pytest.raises(UserError, match="does not exist; give the folder"):
        recognise(tmp_path / "none")
    with pytest.raises(UserError, match="no layout 'x'"):
        summaries(whole["fs2k"], ["x"])
    with pytest.raises(UserError, match="Seq-DeepFake.* has no facial_components"):
        summaries(whole["fs2k"], ["seqdeepfake"])


def test_one_bad_part_does_not_hide_the_others(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole["fs2k"], out)
    (out / "anno_test.json").write_text("[")
    train, test = summaries(out)
    assert train["images"] == 6
    assert "not valid JSON" in test["problem"]
