"""``pyface detect`` as a user meets it, with a method that scores the brightness of blocks."""

from __future__ import annotations

import csv
import json
from fractions import Fraction

import av
import blocks
import numpy as np
import pytest
from blocks import Brightness, frame
from PIL import Image
from skimage import data
from typer.testing import CliRunner

from pyface.cli.main import app
from pyface.data.images import write_png
from pyface.data.video import write_video
from pyface.errors import UserError
from pyface.methods import detection
from pyface.methods.detection import report


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    """Weights of the test's method, which the command loads as it would a real one's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acmf.safetensors").write_bytes(b"some weights")

    def load(method, weights, device="cpu"):
        if "hida" in str(weights):
            raise UserError(f"{weights} holds weights of hida, not of {method}")
        return Brightness(method=method, least_frames=14 if method == "gazeforensics" else 1)

    monkeypatch.setattr(detection, "load_detector", load)
    return tmp_path


def pyface(*args, weights="acmf.safetensors", detector="blocks:find"):
    options = [*(("--weights", weights) if weights else ()), *(("--detector", detector) if detector else ())]
    return CliRunner().invoke(app, ["detect", *map(str, (*args, *options))], prog_name="pyface")


def ok(*args, **options):
    done = pyface(*args, **options)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*args, **options):
    done = pyface(*args, **options)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.output
    return done.stderr


def clip(name="clip.mp4", count=30, fps=25.0, strength=0.8):
    write_video(name, [frame(("red", 10 + i, 12, 36, strength)) for i in range(count)], fps=fps, crf=10)
    return name


def rows(name="out.csv"):
    with open(name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_video_is_scored_and_reported_in_every_form():
    said = ok(clip(), "--csv", "out.csv", "--html", "report/out.html")
    assert "clip.mp4: score 0.5" in said or "clip.mp4: score 0.6" in said or "clip.mp4: score 0.7" in said
    assert "flagged" in said
    assert "threshold 0.5: calibrated on 12 test videos" in said
    assert len(rows()) == 30
    page = open("report/out.html", encoding="utf-8").read()
    assert page.startswith("<!DOCTYPE html>")
    assert page.rstrip().endswith("</html>")
    assert "clip.mp4" in page
    content = json.loads(ok("clip.mp4", "--json"))
    assert content["inputs"][0]["faces"][0]["score"] == float(rows()[0]["face_score"])
    assert len(content["weights"]["sha256"]) == 64


@pytest.mark.parametrize("method", ["acmf", "gazeforensics"])
def test_without_weights_there_is_no_score_but_the_way_to_get_some(method):
    message = refused(clip(), "--method", method, "--csv", "out.csv", weights=None)
    assert f"pyface train {method} --preset tiny --out runs/{method}" in message
    assert f"--weights runs/{method}" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "hida"), "the methods that do are acmf, gazeforensics"),
        (("--weights", "gone.safetensors"), "gone.safetensors does not exist"),
        (("--weights", "hida.safetensors"), "holds weights of hida, not of acmf"),
        (("--detector", "eyes"), "unknown detector 'eyes'"),
        (("--every", "2", "--frames", "3"), "both choose frames"),
        (("--as", "films"), "auto, video, pictures"),
        (("--longest", "5"), "at least 64 pixels"),
        (("--csv", "same", "--html", "./same"), "both write"),
        (("--csv", "clip.mp4", "--overwrite"), "clip.mp4 is an input, which is never replaced"),
        (("--html", "there.html"), "already exists"),
        (("--csv", "."), "is a folder"),
    ],
)
def test_mistakes_are_told_before_any_work(options, message, desk):
    clip()
    for name in ("hida.safetensors", "there.html"):
        (desk / name).write_text("here")
    before = sorted(desk.iterdir())
    error = refused("clip.mp4", *options, weights=None if "--weights" in options else "acmf.safetensors",
                    detector=None if "--detector" in options else "blocks:find")  # fmt: skip
    assert message in error
    assert error.count("\n") == 1
    assert sorted(desk.iterdir()) == before
    assert (desk / "there.html").read_text() == "here"


def test_existing_reports_are_replaced_only_if_told(desk):
    (desk / "out.html").write_text("before")
    assert "out.html already exists" in refused(clip(), "--html", "out.html")
    assert (desk / "out.html").read_text() == "before"
    ok("clip.mp4", "--html", "out.html", "--overwrite")
    assert (desk / "out.html").read_text().startswith("<!DOCTYPE html>")


def test_a_report_that_fails_leaves_nothing(desk, monkeypatch):
    (desk / "out.csv").write_text("before")

    clip()
    monkeypatch.setattr(report, "as_csv", lambda made: "\udc80")  # cannot be written as UTF-8
    done = pyface("clip.mp4", "--csv", "out.csv", "--overwrite")
    assert done.exit_code != 0
    assert (desk / "out.csv").read_text() == "before"
    assert sorted(path.name for path in desk.iterdir()) == ["acmf.safetensors", "clip.mp4", "out.csv"]


def test_bad_files_in_a_folder_do_not_stop_the_others(desk):
    folder = desk / "videos"
    folder.mkdir()
    whole = clip(folder / "a good.mp4").read_bytes()
    (folder / "b cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "c noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "d empty.avi").touch()
    damaged = bytearray(whole)
    middle = damaged.find(b"mdat") + 900
    damaged[middle : middle + 1500] = np.random.default_rng(1).bytes(1500)
    (folder / "e damaged.mp4").write_bytes(damaged)
    write_video(folder / "f nobody.mp4", [frame()] * 8)
    clip(folder / "g good.mp4", strength=0.2)
    (folder / "notes.txt").write_text("not a video")
    done = pyface("videos", "--csv", "out.csv", "--html", "out.html")
    assert done.exit_code == 2
    assert "a good.mp4: score" in done.stdout
    assert "g good.mp4: score" in done.stdout
    assert "error: 5 of 7 inputs could not be scored:" in done.stderr
    assert "no face was found in videos/f nobody.mp4 (8 frames were examined)" in done.stderr
    errors = {row["input"]: row["error"] for row in rows() if row["error"]}
    assert [name[7] for name in errors] == list("bcdef")
    page = (desk / "out.html").read_text()
    assert page.count('<section class="input"') == 2
    for name in "bcdef":
        assert f">videos/{name} " in page
    content = json.loads(pyface("videos", "--json").stdout)
    assert len(content["inputs"]) == 2
    assert [one["input"][7] for one in content["failed"]] == list("bcdef")


def test_times_of_a_variable_frame_rate_are_right(desk):
    times = np.random.default_rng(2).integers(20, 200, 30).cumsum()
    with av.open("uneven.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.pix_fmt, stream.height, stream.width = "yuv420p", 96, 128
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            picture = av.VideoFrame.from_ndarray(frame(("red", 10 + index, 12, 36, 0.5)), format="rgb24")
            picture.pts, picture.time_base = int(time), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    ok("uneven.mp4", "--csv", "out.csv", "--html", "out.html")
    seconds = [float(row["seconds"]) for row in rows()]
    np.testing.assert_allclose(seconds, (times - times[0]) / 1000, atol=2e-4)
    assert "variable frame rate" in (desk / "out.html").read_text()


def test_two_faces_each_have_a_line():
    shown = [frame(("red", 8 + i, 8, 36, 0.2), ("blue", 80, 52, 32, 0.9)) for i in range(25)]
    write_video("two.mp4", shown, crf=10)
    said = ok("two.mp4", "--csv", "out.csv")
    assert "face 1: score 0." in said
    assert "face 2: score 0." in said
    faces = {row["face"]: (float(row["face_score"]), row["verdict"]) for row in rows()}
    assert faces["1"][1] == "not flagged"
    assert faces["2"][1] == "flagged"
    assert {float(row["input_score"]) for row in rows()} == {faces["2"][0]}


def test_a_clip_shorter_than_the_method_needs():
    assert "gazeforensics needs 14 frames of a face, got 9" in refused(
        clip(count=9), "--method", "gazeforensics", "--html", "out.html"
    )
    assert "gazeforensics needs 14 frames of a face, got 9" in open("out.html", encoding="utf-8").read()
    assert "score 0." in ok(clip("long.mp4", count=14), "--method", "gazeforensics")


def test_pictures_of_every_kind(desk):
    (desk / "pictures").mkdir()
    colour = frame(("red", 40, 20, 40, 0.5))
    write_png("pictures/colour.png", colour)
    photo = data.astronaut()[:256, 96:352]
    grey = np.asarray(Image.fromarray(photo).convert("L"))
    Image.fromarray(grey).save("pictures/grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save("pictures/grey16.png")
    Image.fromarray(np.dstack((photo, np.full((256, 256), 255, np.uint8)))).save("pictures/alpha.png")
    content = json.loads(ok("pictures/grey.png", "pictures/grey16.png", "pictures/alpha.png", "--json", detector=None))
    scores = {one["input"]: one["score"] for one in content["inputs"]}
    assert scores["pictures/grey.png"] == scores["pictures/grey16.png"]
    notes = {one["input"]: one["notes"] for one in content["inputs"]}
    assert notes["pictures/grey16.png"] == ["a grey photo becomes RGB", "16 bits per channel are reduced to 8"]
    done = pyface("pictures")
    assert done.exit_code == 2  # the grey ones have no red block
    assert "pictures/colour.png: score 0." in done.stdout
    assert "error: 2 of 4 inputs" in done.stderr


def test_a_folder_of_frames_is_one_video(desk):
    for index in range(20):
        write_png(f"frames/frame_{index:04d}.png", frame(("red", 10 + index, 12, 36, 0.5)))
    content = json.loads(ok("frames", "--json", "--fps", "10"))
    assert content["inputs"][0]["kind"] == "frames"
    assert content["inputs"][0]["faces"][0]["frames"][-1]["seconds"] == pytest.approx(1.9)
    assert len(json.loads(ok("frames", "--json", "--as", "pictures"))["inputs"]) == 20


def test_a_folder_without_anything_usable(desk):
    (desk / "empty").mkdir()
    (desk / "empty" / "notes.txt").touch()
    assert "empty holds no videos and no pictures" in refused("empty", "--csv", "out.csv")
    assert not (desk / "out.csv").exists()


def test_frames_are_chosen():
    clip()
    assert [int(row["frame"]) for row in (ok("clip.mp4", "--csv", "a.csv", "--every", "7"), rows("a.csv"))[1]] == [
        0, 7, 14, 21, 28,
    ]  # fmt: skip
    ok("clip.mp4", "--csv", "b.csv", "--frames", "4")
    assert len(rows("b.csv")) == 4


def test_a_threshold_of_ones_own():
    said = ok(clip(), "--threshold", "0.99")
    assert "not flagged" in said
    assert "threshold 0.99: given by the user; it was not calibrated for these weights" in said
    assert pyface("clip.mp4", "--threshold", "1.5").exit_code == 2


def test_the_plugin_is_the_one_that_was_named(monkeypatch):
    monkeypatch.setattr(blocks, "find", lambda photo: [])
    assert "no face was found" in refused(clip())
