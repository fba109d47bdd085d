"""``pyface synthesize`` and ``pyface data`` as a user meets them."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pyface.cli import data
from pyface.cli.main import app


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def pyface(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="pyface")


def ok(*args):
    result = pyface(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(match, *args):
    result = pyface(*args)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert re.search(match, result.stderr), result.stderr


def test_write_then_look(desk):
    said = ok("synthesize", "--layout", "celeba", "--count", 12, "--out", "faces", "--image-size", 32)
    assert "faces holds 12 pictures, laid out as celeba" in said
    table = ok("data", "summary", "faces")
    assert "CelebA in faces" in table
    assert re.search(r"images +9 +2 +1|images +10 +1 +1", table), table
    assert "32x39" in table
    parts = json.loads(ok("data", "summary", "faces", "--json"))["parts"]
    assert sum(part["images"] for part in parts) == 12
    again = json.loads(
        ok("synthesize", "--layout", "celeba", "--count", 12, "--out", "faces", "--image-size", 32, "--json")
    )
    assert again["count"] == 12
    assert again["layout"] == "celeba"


def test_mistakes_are_one_line(desk):
    fails("no layout 'faces'; there are ffpp", "synthesize", "--layout", "faces", "--out", "x")
    fails("x does not exist; give the folder", "data", "summary", "x")
    fails("no action 'show'; there are summary and sheet", "data", "show", "x")
    (desk / "x").mkdir()
    fails("holds neither pictures nor", "data", "summary", "x")
    fails("FS2K: x has no photo; expected", "data", "summary", "x", "--layout", "fs2k")
    (desk / "x/file").write_text("")
    fails("not begun by 'pyface synthesize'", "synthesize", "--layout", "celeba", "--out", "x")
    (desk / "sheet.png").write_text("mine")
    fails("sheet.png already exists", "data", "sheet", "sheet.png")
    assert (desk / "sheet.png").read_text() == "mine"


def test_a_problem_in_one_part_shows_and_fails(desk):
    ok("synthesize", "--layout", "fs2k", "--count", 4, "--out", "faces", "--image-size", 32)
    (desk / "faces/anno_test.json").write_text("[")
    result = pyface("data", "summary", "faces")
    assert result.exit_code == 2
    assert "images" in result.stdout
    assert re.match(r"error: test: FS2K: .*anno_test\.json is not valid JSON", result.stderr)


def test_names_with_brackets_are_shown_as_they_are(desk):
    (desk / "[bold]/a[red]").mkdir(parents=True)
    Image.new("RGB", (5, 5)).save(desk / "[bold]/a[red]/x.png")
    table = ok("data", "summary", "[bold]")
    assert "[bold]" in table
    assert "a[red]" in table


def test_the_sheet(desk, monkeypatch):
    monkeypatch.setattr(data, "FACE", 24)
    monkeypatch.setattr(data, "LARGE", 40)
    ok("data", "sheet", "sheet.png")
    first = np.asarray(Image.open("sheet.png"))
    # nothing is left white where pictures are: the first row of faces, and a whole line of pictures in every row
    assert np.mean(first[76:100, 32 : 32 + 12 * 32 - 8].min(2) == 255) < 0.5
    rows = (first[:, 32:56].min(2) < 255).any(1)
    assert rows.sum() >= 4 * 24 + (4 + 1 + 2) * 40  # sketches are mostly white paper
    ok("data", "sheet", "sheet.png", "--overwrite", "--seed", "1")
    assert not np.array_equal(np.asarray(Image.open("sheet.png")), first)
    ok("data", "sheet", "sheet.png", "--overwrite")
    assert np.array_equal(np.asarray(Image.open("sheet.png")), first)


def test_a_killed_run_goes_on(desk):
    """SIGKILL in the middle: the next run keeps what is whole, and the result is that of an unbroken run."""
    command = f"{sys.executable} -m pyface synthesize --layout imagefolder -n 48 --image-size 48 -o killed"
    child = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=desk)
    deadline = time.monotonic() + 60
    while len(list((desk / "killed").rglob("*.jpg"))) < 16 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    left = len(list((desk / "killed").rglob("*.jpg")))
    assert 16 <= left < 48
    for out in ("killed", "unbroken"):
        ok("synthesize", "--layout", "imagefolder", "-n", 48, "--image-size", 48, "-o", out)
    files = [
        {p.relative_to(desk / out): p.read_bytes() for p in (desk / out).rglob("*.jpg")}
        for out in ("killed", "unbroken")
    ]
    assert len(files[0]) == 48
    assert files[0] == files[1]
