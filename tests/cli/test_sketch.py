"""``pyface sketch`` as a user meets it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from typer.testing import CliRunner

from pyface.cli.main import app
from pyface.methods.hida.depth import rough_head
from pyface.methods.hida.model import HIDA


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    """A portrait and weights of a small network."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    Image.fromarray(data.astronaut()[:256, 90:346]).save("me.png")
    torch.manual_seed(0)
    save_file(HIDA(2, 64).state_dict(), "small.safetensors")
    yield tmp_path
    torch.set_num_threads(before)


def pyface(*args):
    return CliRunner().invoke(app, ["sketch", *map(str, args)], prog_name="pyface")


def ok(*args):
    result = pyface(*args, "--weights", "small.safetensors")
    assert result.exit_code == 0, result.output
    return result.output


def refused(*args):
    result = pyface(*args, "--weights", "small.safetensors")
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1
    return result.output


def pixels(name):
    with Image.open(name) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_a_photo_becomes_a_sketch(desk):
    assert "me.sketch.png" in ok("me.png")
    assert pixels("me.sketch.png").shape == (62, 62)
    assert "already exists" in refused("me.png")
    report = json.loads(ok("me.png", "--overwrite", "--json", "--style", "0.5,0.5,0"))
    assert report["output"] == "me.sketch.png"
    assert report["style"] == "0.5,0.5,0"
    x, y, w, h = report["face"]
    left, top, side = report["crop"]
    assert left <= x
    assert y + h <= top + side
    assert report["depth"] == "rough"
    assert w == h


def test_styles_and_depth_change_the_drawing():
    drawn = {}
    relief = (rough_head(256, 256, (60, 45, 150, 150))[0].numpy() * 65535).astype(np.uint16)
    Image.fromarray(relief).save("depth.png")
    for name, options in {
        "one": ("--style", 1),
        "two": ("--style", 2),
        "mixed": ("--style", "0.5,0.5,0"),
        "flat": ("--depth", "none"),
        "file": ("--depth", "depth.png"),
    }.items():
        ok("me.png", "-o", f"{name}.png", *options)
        drawn[name] = pixels(f"{name}.png")
    names = list(drawn)
    for index, name in enumerate(names):
        for other in names[:index]:
            assert not np.array_equal(drawn[name], drawn[other]), (name, other)


def test_boxes_and_whole_crops():
    report = json.loads(ok("me.png", "--box", "50,40,100,100", "-o", "box.png", "--json"))
    assert report["crop"] == [35, 19, 130]
    report = json.loads(ok("me.png", "--whole", "--resize", "-o", "whole.png", "--json"))
    assert report["crop"] == [0, 0, 256]
    assert pixels("whole.png").shape == (256, 256)


def test_no_face_is_said():
    Image.fromarray(np.full((90, 100), 90, np.uint8)).save("wall.png")
    with pytest.warns(UserWarning, match="no face was found"):
        output = ok("wall.png", "--json")
    assert json.loads(output)["face"] is None


def test_mistakes_are_told_in_one_line(desk):
    assert "--style must be 1, 2 or 3" in refused("me.png", "--style", "bold")
    assert "unknown style 4" in refused("me.png", "--style", "4")
    assert "sum to 1" in refused("me.png", "--style", "1,1,1")
    assert "--box must be" in refused("me.png", "--box", "1,2,3")
    assert "must end in .png" in refused("me.png", "-o", "me.jpg")
    assert "cannot read gone.png" in refused("me.png", "--depth", "gone.png")
    assert "cannot read gone.jpg" in refused("gone.jpg")
    assert "unknown detector" in refused("me.png", "--detector", "nobody")
    (desk / "junk.safetensors").write_bytes(b"junk")
    result = pyface("me.png", "--weights", "junk.safetensors")
    assert result.exit_code == 2
    assert "junk.safetensors" in result.output
    assert not list(desk.glob("*sketch*"))
