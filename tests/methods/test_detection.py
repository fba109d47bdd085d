"""From files to scores and reports, with a detector of blocks and a method that scores their brightness."""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import datetime, timezone
from html.parser import HTMLParser

import numpy as np
import pytest
from blocks import Brightness, Combining, find, frame
from PIL import Image

from pyface.data.crop import FaceCrop
from pyface.data.follow import Follow
from pyface.data.images import write_png
from pyface.data.sets.clips import Evenly, Every
from pyface.data.video import FrameFolder, write_video
from pyface.errors import UserError
from pyface.methods import detection
from pyface.methods.detection import draw, load_detector, report
from pyface.methods.detection import scan as scanning
from pyface.methods.detection.report import Report, as_csv, as_dict, as_html, examine, find_threshold
from pyface.methods.detection.scan import Source, find_sources, scan

FOLLOW = Follow(FaceCrop(detector=find), longest=None)


def strength(index):
    return 0.2 + 0.01 * index


def frames_of_two():
    """Red in all 40 frames, ever brighter; blue from frame 10 to 29, brighter still; nobody in frames 18 and 19."""
    made = []
    for index in range(40):
        red = ("red", 10 + index, 12, 28, strength(index))
        blue = ("blue", 80, 60, 24, 0.9)
        made.append(frame(*([] if index in (18, 19) else [red, blue] if 10 <= index < 30 else [red])))
    return made


@pytest.fixture
def folder(tmp_path):
    for index, pixels in enumerate(frames_of_two()):
        write_png(tmp_path / "two" / f"{100 + index}.png", pixels)
    return tmp_path / "two"


def reported(*results, detector=None, threshold=None):
    detector = detector or Brightness()
    value, origin = find_threshold(detector, threshold)
    made = datetime(2026, 11, 28, 9, 30, tzinfo=timezone.utc)
    return Report(detector, "weights.safetensors", "ab" * 32, value, origin, {"Frames": "all"}, list(results), made)


# ---- scanning --------------------------------------------------------------------------------------------------------


def test_two_faces_are_scored_each_by_itself(folder):
    found = scan(FrameFolder(folder), Brightness(), follow=FOLLOW)
    assert [face.number for face in found.faces] == [1, 2]
    red, blue = found.faces
    assert list(red.places) == [i for i in range(40) if i not in (18, 19)]
    assert list(blue.places) == [i for i in range(10, 30) if i not in (18, 19)]
    assert found.without == [18, 19]
    assert found.glimpses == []
    green = np.array([round(20 + 160 * strength(i)) / 255 for i in red.places])
    np.testing.assert_allclose(red.scores.fake, green, atol=0.01)
    assert red.scores.video == pytest.approx(1 / (1 + np.exp(-np.log(green / (1 - green)).mean())), abs=1e-3)
    assert found.score == blue.scores.video == pytest.approx(164 / 255, abs=0.01)
    assert list(found.numbers) == list(range(100, 140))
    np.testing.assert_allclose(found.times, np.arange(40) / 25)


def test_neither_batch_nor_reading_ahead_changes_anything(folder, monkeypatch):
    expected = scan(FrameFolder(folder), Brightness(batch=40), follow=FOLLOW, maps=True, evidence=3)
    for batch, ahead in ((1, 1), (3, 1 << 30)):
        monkeypatch.setattr(scanning, "READ_AHEAD", ahead)
        found = scan(FrameFolder(folder), Brightness(batch=batch), follow=FOLLOW, maps=True, evidence=3)
        for one, other in zip(expected.faces, found.faces, strict=True):
            np.testing.assert_array_equal(one.scores.fake, other.scores.fake)
            assert one.scores.video == other.scores.video
            np.testing.assert_array_equal(one.squares, other.squares)
            assert [e.place for e in one.evidence] == [e.place for e in other.evidence]


def test_a_long_video_is_scored_in_stretches(folder, monkeypatch):
    whole = scan(FrameFolder(folder), Brightness(), follow=FOLLOW, evidence=3)
    monkeypatch.setattr(scanning, "STRETCH", 12)
    monkeypatch.setattr(scanning, "REST", 4)
    method = Brightness()
    found = scan(FrameFolder(folder), method, follow=FOLLOW, evidence=3)
    assert sorted(method.asked) == [6, 12, 12, 12, 14]
    for one, other in zip(whole.faces, found.faces, strict=True):
        np.testing.assert_array_equal(one.places, other.places)
        np.testing.assert_array_equal(one.scores.fake, other.scores.fake)
        assert other.scores.video == pytest.approx(one.scores.video, abs=0.01)  # mean over stretches, not of logits
        assert max(e.score for e in other.evidence) == max(one.scores.fake)


def test_a_method_that_combines_is_given_parts_and_scores_the_same(folder, monkeypatch):
    whole = scan(FrameFolder(folder), Brightness(), follow=FOLLOW)
    monkeypatch.setattr(scanning, "PART", 7)
    monkeypatch.setattr(scanning, "PART_REST", 3)
    method = Combining()
    found = scan(FrameFolder(folder), method, follow=FOLLOW)
    assert sorted(method.asked) == [3, 4, 7, 7, 7, 7, 7, 7, 7]
    for one, other in zip(whole.faces, found.faces, strict=True):
        np.testing.assert_array_equal(one.scores.fake, other.scores.fake)
        assert other.scores.video == pytest.approx(one.scores.video, abs=1e-12)


def test_evidence_is_the_highest_and_apart(folder):
    red = scan(FrameFolder(folder), Brightness(), follow=FOLLOW, maps=True, evidence=3).faces[0]
    places = [one.place for one in red.evidence]
    assert places[0] == 39
    assert [one.score for one in red.evidence] == sorted((one.score for one in red.evidence), reverse=True)
    assert min(abs(a - b) for a in places for b in places if a != b) >= 4
    assert red.evidence[0].crop.shape == (32, 32, 3)
    assert red.evidence[0].attention.shape == (4, 4)
    assert red.scores.gaze.shape == (38, 2)
    assert red.scores.attention is None  # nobody needs it for every frame


def test_of_equal_scores_those_with_attention_are_shown(folder):
    """A method of clips gives all their frames one score, and may have looked at only some of them."""

    class Clips(Brightness):
        def score(self, faces, *, maps=False):
            scores = super().score(faces, maps=maps)
            scores.fake[:] = 0.7
            scores.attention[[place for place in range(len(faces)) if place % 3 != 1]] = 0
            return scores

    red = scan(FrameFolder(folder), Clips(), follow=FOLLOW, maps=True, evidence=3).faces[0]
    assert len(red.evidence) == 3
    assert all(list(red.places).index(one.place) % 3 == 1 for one in red.evidence)


def test_frames_can_be_chosen(folder):
    footage = FrameFolder(folder)
    every = scan(footage, Brightness(), follow=FOLLOW, places=Every(4)(footage))
    assert list(every.faces[0].places) == list(range(0, 40, 4))
    spread = scan(footage, Brightness(), follow=FOLLOW, places=Evenly(8)(footage))
    assert len(spread.faces[0].places) == 8
    with pytest.raises(UserError, match="none of the 40 frames"):
        scan(footage, Brightness(), follow=FOLLOW, places=[])


def test_what_is_seen_too_briefly_is_no_face_but_counted(tmp_path):
    for index in range(40):
        blocks = [("red", 10, 12, 28, 0.5)] + ([("blue", 80, 60, 24, 0.9)] if 10 <= index < 18 else [])
        write_png(tmp_path / f"{index}.png", frame(*blocks))
    found = scan(FrameFolder(tmp_path), Brightness(), follow=FOLLOW)
    assert len(found.faces) == 1
    assert found.glimpses == [8]


def test_a_clip_of_two_frames_is_scored(tmp_path):
    for index in range(2):
        write_png(tmp_path / f"{index}.png", frame(("red", 10, 12, 28, 0.5)))
    assert len(scan(FrameFolder(tmp_path), Brightness(), follow=FOLLOW).faces[0].places) == 2


def test_a_clip_too_short_for_the_method_says_so_and_gets_no_score(folder):
    method = Brightness(method="gazeforensics", least_frames=25)
    result = examine(Source(folder, "frames"), method, follow=FOLLOW)
    red, blue = result.scan.faces
    assert result.error == ""
    assert "needs 25 frames of a face, got 18" in blue.problem
    assert np.isnan(blue.scores.video)
    assert result.scan.score == red.scores.video
    alone = examine(Source(folder, "frames"), method, choose=Evenly(10), follow=FOLLOW)
    assert "face 1: gazeforensics needs 25 frames of a face, got" in alone.error
    assert alone.scan is not None
    text = as_html(reported(alone, detector=method))
    assert "not scored" in text
    assert as_dict(reported(alone, detector=method))["inputs"][0]["score"] is None


def test_nobody_at_all_is_an_error_that_counts_what_was_searched(tmp_path):
    for index in range(30):
        write_png(tmp_path / f"{index}.png", frame(*([("red", 10, 12, 28, 0)] if index in (10, 11) else [])))
    with pytest.raises(UserError, match=r"no face was found in .* \(30 frames were examined\); 1 detections were too"):
        scan(FrameFolder(tmp_path), Brightness(), follow=FOLLOW)


def test_threads_end_when_the_method_fails(folder):
    import threading

    class Broken(Brightness):
        def score(self, faces, *, maps=False):
            raise ZeroDivisionError

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        scan(FrameFolder(folder), Broken(), follow=FOLLOW)
    assert threading.active_count() == before


# ---- what to scan ----------------------------------------------------------------------------------------------------


def test_sources(tmp_path):
    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    def kinds(path, kind="auto"):
        root = tmp_path / path
        return [(str(source.path.relative_to(root)), source.kind) for source in find_sources([root], kind)]

    make("set/real/000.mp4", "set/real/notes.txt", "set/fake/000_001.mp4", "set/.hidden/1.mp4")
    make("frames/b/10.png", "frames/b/9.png", "frames/a/frame_0001.jpg", "frames/a/Frame_0002.jpg", "frames/c/7.png")
    make("photos/me.jpg", "photos/IMG_0001.jpg", "photos/IMG_0002.jpg", "photos/clip.MP4")
    assert kinds("set") == [("fake/000_001.mp4", "video"), ("real/000.mp4", "video")]
    assert kinds("frames") == [("a", "frames"), ("b", "frames"), ("c/7.png", "picture")]
    assert kinds("frames/a", "pictures") == [("Frame_0002.jpg", "picture"), ("frame_0001.jpg", "picture")]
    photos = [("IMG_0001.jpg", "picture"), ("IMG_0002.jpg", "picture"), ("clip.MP4", "video"), ("me.jpg", "picture")]
    assert kinds("photos") == photos
    assert kinds("photos", "video") == [(".", "frames"), ("clip.MP4", "video")]
    twice = find_sources([tmp_path / "set", tmp_path / "set" / "real" / "000.mp4"])
    assert len(twice) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("empty", "holds no videos and no pictures"), ("gone.mp4", "does not exist"), ("a.txt", "neither a folder nor")],
)
def test_sources_that_are_none(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=message):
        find_sources([tmp_path / name])
    with pytest.raises(UserError, match="auto, video, pictures"):
        find_sources([tmp_path], "films")


def test_unknown_methods_have_no_detector(tmp_path):
    with pytest.raises(UserError, match="the methods that do are acmf, gazeforensics"):
        load_detector("hida", tmp_path)
    assert detection.DETECTORS == ("acmf", "gazeforensics")


# ---- reports ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what a test asks about."""

    VOID = frozenset(("meta", "img", "br", "rect", "path", "circle", "polyline", "polygon"))

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def result(folder):
    return examine(Source(folder, "frames"), Brightness(), follow=FOLLOW, evidence=4)


def test_html_is_one_file_that_fetches_nothing(result):
    text = as_html(reported(result))
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.of("img"))
    assert all(image["alt"] and int(image["width"]) > 0 for image in page.of("img"))
    assert "url(" not in text
    assert not re.search(r"(src|href|action)=[\"'](?!data:|#)", text)
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in page.of("meta")[2]["content"]
    assert len(page.of("img")) == 2 * (1 + 2 * 4)  # of each face: the whole frame, four crops, plain and marked
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    targets = {link["href"] for link in page.of("a")}
    assert targets <= {f"#{identity}" for identity in identities}


def test_html_says_what_an_analyst_asks(result):
    text = Page(as_html(reported(result))).text
    for words in (
        "Threshold 0.5 , calibrated on 12 test videos",
        "flagged as forged",
        "2 frames without a face, between 0.72 s and 0.76 s",
        "Grey: no face was found in these frames",
        "frame 139, 1.56 s",
        "looks 29° to the right and 11° down",
        "nothing, it is a test",
        "ab" * 32,
        "not the probability of a forgery",
        "ACMF judges single frames",
        "2026-11-28 09:30 UTC",
        "PyTorch",
    ):
        assert words in text, words


def test_without_a_threshold_there_is_no_verdict(result):
    detector = Brightness(threshold=None, calibration="")
    made = reported(result, detector=detector)
    page = Page(as_html(made))
    assert "No threshold: these weights bring none and none was given" in page.text
    assert "flagged as forged" not in page.text
    assert "no verdict" in page.text
    assert 'stroke="#b00020"' not in as_html(made)
    assert as_dict(made)["threshold"]["value"] is None
    assert as_dict(made)["inputs"][0]["verdict"] == "no verdict"


def test_a_given_threshold_says_that_it_is_not_calibrated(result):
    made = reported(result, threshold=0.95)
    assert "given by the user; it was not calibrated" in Page(as_html(made)).text
    assert as_dict(made)["inputs"][0]["verdict"] == "not flagged"
    assert made.verdict(0.95) == "flagged"
    assert made.verdict(0.9499) == "not flagged"


def test_names_of_files_cannot_break_the_page(tmp_path):
    name = "<script>alert(\"x\")</script> & 'so on'"
    write_png(tmp_path / "a.png", frame(("red", 10, 12, 28, 0.5)))
    image = Source(tmp_path / "a.png", "picture")
    result = examine(image, Brightness(), follow=FOLLOW, evidence=1)
    evil = report.replace(result, source=Source(tmp_path / "x" / name.replace("/", "|"), "picture"))
    failed = report.Result(evil.source, 0.0, error="<b>bad</b>")
    page = Page(as_html(reported(evil, failed)))
    assert "script" not in {tag for tag, _ in page.tags}
    assert '<script>alert("x")' in page.text
    assert "<b>bad</b>" in page.text


def test_csv_has_a_line_per_face_and_frame(result, tmp_path):
    failed = report.Result(Source(tmp_path / "bad, file.mp4", "video"), 0.0, error='it is "damaged"')
    rows = list(csv.DictReader(io.StringIO(as_csv(reported(result, failed)))))
    assert rows[-1]["error"] == 'it is "damaged"'
    assert rows[-1]["input"].endswith("bad, file.mp4")
    rows = rows[:-1]
    assert len(rows) == 38 + 18 + 2
    frames = [int(row["frame"]) for row in rows]
    assert frames == sorted(frames)
    assert [row["frame"] for row in rows if row["verdict"] == "no face"] == ["118", "119"]
    one = next(row for row in rows if row["frame"] == "112" and row["face"] == "1")
    assert float(one["seconds"]) == pytest.approx(12 / 25)
    assert float(one["score"]) == pytest.approx(round(20 + 160 * strength(12)) / 255, abs=0.01)
    assert int(one["side"]) == 35
    assert float(one["yaw"]) == 0.5


def test_dict_is_valid_json(result):
    content = json.loads(json.dumps(as_dict(reported(result)), allow_nan=False))
    (one,) = content["inputs"]
    assert (one["frames"], one["examined"], one["without_face"]) == (40, 40, 2)
    assert [len(face["frames"]) for face in one["faces"]] == [38, 18]
    assert one["faces"][0]["frames"][0] | {"score": 0} == {
        "frame": 100, "seconds": 0.0, "score": 0, "square": [8, 8, 35], "gaze": [0.5, -0.2],
    }  # fmt: skip
    assert content["failed"] == []


def test_timeline_of_a_long_video_is_short(folder):
    found = scan(FrameFolder(folder), Brightness(), follow=FOLLOW)
    count = 20_000
    face = report.replace(
        found.faces[0],
        places=np.arange(count),
        scores=detection.FaceScores(np.linspace(0, 1, count), 0.5),
    )
    long = report.replace(found, places=range(count), times=np.arange(count) / 25, without=[], faces=[face])
    drawn = draw.timeline(long, 0.5, "long")
    assert len(drawn) < 40_000
    assert "13:00.0" in drawn or "12:00.0" in drawn
    Page(drawn)


def test_overlay_marks_what_it_is_told():
    grey = np.full((64, 64, 3), 120, np.uint8)
    np.testing.assert_array_equal(draw.overlay(grey), grey)
    attention = np.zeros((8, 8), np.float32)
    attention[1, 6] = 1
    marked = draw.overlay(grey, attention).astype(int)
    changed = np.abs(marked - grey).sum(-1)
    y, x = np.unravel_index(changed.argmax(), changed.shape)
    assert abs(x - 52) < 6
    assert abs(y - 12) < 6
    assert changed[50:, :30].max() == 0
    right_up = draw.overlay(grey, None, np.array((0.8, 0.4))).astype(int)
    rows, columns = np.nonzero((right_up[..., 1] - right_up[..., 0]) > 80)
    assert columns.max() > 50
    assert rows.min() < 18
    assert columns.min() >= 26
    np.testing.assert_array_equal(draw.overlay(grey, None, np.array((np.nan, 0))), grey)


def test_the_whole_frame_has_its_faces_framed():
    photo = np.full((400, 1280, 3), 120, np.uint8)
    drawn = draw.framed(photo, {1: (100, 50, 200), 2: (900, 100, 100)})
    assert drawn.shape == (200, 640, 3)
    assert (drawn[25:125, 50] != 120).any(-1).all()
    assert (drawn[100, 200:400] == 120).all()
    with Image.open(io.BytesIO(draw.jpeg(drawn))) as image:
        assert image.size == (640, 200)


def test_a_video_file_is_scored_with_its_own_times(tmp_path):
    write_video(tmp_path / "two.mp4", frames_of_two(), fps=12.5)
    result = examine(Source(tmp_path / "two.mp4", "video"), Brightness(), follow=FOLLOW)
    assert [len(face.places) for face in result.scan.faces] == [38, 18]
    assert result.scan.times[-1] == pytest.approx(39 / 12.5)
    assert len(result.sha256) == 64
    assert result.seconds > 0
