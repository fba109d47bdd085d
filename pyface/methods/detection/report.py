"""What a detection found, as JSON, as CSV, and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pyface.data.follow import Follow
from pyface.data.sets.clips import Every, Sampling
from pyface.data.video import Footage
from pyface.errors import UserError
from pyface.methods.detection import Detector
from pyface.methods.detection.draw import STROKES, clock, framed, jpeg, overlay, timeline
from pyface.methods.detection.scan import FaceResult, Scan, Source, scan

LIMITS = {
    "acmf": (
        "ACMF judges single frames by traces that manipulation leaves in fine detail. It knows forgeries like those it "
        "was trained on; strong compression, small faces and re-filmed screens hide such traces or imitate them."
    ),
    "gazeforensics": (
        "GazeForensics judges clips of 14 frames by inconsistencies round the eyes and between frames. It knows "
        "forgeries like those it was trained on; hidden eyes, profiles, small faces and strong compression mislead it."
    ),
}
CAUTION = (
    "A score is the network's output, not the probability of a forgery. A low one does not prove that a face is "
    "genuine, and a high one is a reason to look closer, not proof. Attention shows where the network looked, not what "
    "was altered."
)
SLICES = 20
EVERY = Every()


@dataclass(frozen=True)
class Illustration:
    """A frame of a face for people to look at; pictures are JPEG files.

    Attributes:
        face, place, score, gaze: which face and frame, and what was said of it.
        plain: the crop as it was scored.
        marked: the same with attention and gaze; None if the method gave neither.
        whole: the whole frame with all its faces framed.
    """

    face: int
    place: int
    score: float
    gaze: np.ndarray | None
    plain: bytes
    marked: bytes | None
    whole: bytes | None


@dataclass(frozen=True)
class Result:
    """What became of one input: a scan, or the reason why there is none, or why no face in it was scored."""

    source: Source
    seconds: float
    scan: Scan | None = None
    error: str = ""
    sha256: str = ""
    illustrations: list[Illustration] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """All of a run.

    Attributes:
        detector: that scored.
        weights: as the user named them, and the file's SHA-256, "" if they are no single file.
        threshold: from which score on a face is flagged, or None for no verdicts.
        origin: where the threshold comes from, in words.
        settings: name to value, for the reader.
        results: in order.
        made: when.
    """

    detector: Detector
    weights: str
    weights_sha256: str
    threshold: float | None
    origin: str
    settings: Mapping[str, Any]
    results: list[Result]
    made: datetime

    def verdict(self, score: float) -> str:
        """What the threshold makes of a score."""
        if math.isnan(score):
            return "not scored"
        if self.threshold is None:
            return "no verdict"
        return "flagged" if score >= self.threshold else "not flagged"


def find_threshold(detector: Detector, given: float | None) -> tuple[float | None, str]:
    """The threshold to use, and where it comes from."""
    if given is not None:
        return given, "given by the user; it was not calibrated for these weights"
    if detector.threshold is None:
        return None, "these weights bring none and none was given, so scores are shown without a verdict"
    return detector.threshold, f"calibrated on {detector.calibration or 'data that the weights do not name'}"


def examine(
    source: Source,
    detector: Detector,
    *,
    choose: Sampling = EVERY,
    follow: Follow | None = None,
    fps: float = 25.0,
    evidence: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Scan a source, for a list of many: what cannot be scored is told in the result, and raises nothing.

    Args:
        source: what to scan.
        detector: a method with its weights.
        choose: which frames of a video to examine.
        follow: how faces are found and followed; pictures are searched at their own size.
        fps: frames per second of a folder of frames.
        evidence: frames of each face to show, with attention and gaze; 0 does not ask for them.
        progress: called with the frames examined so far, and with all of them.
    """
    started = time.perf_counter()
    follow = follow or Follow()
    scanned, shown, error = None, [], ""
    try:
        footage = source.open(fps)
        if source.kind == "picture":
            places, follow = [0], replace(follow, longest=None)
        else:
            places = choose(footage)
        done = 0

        def count(frames: int) -> None:
            nonlocal done
            done += frames
            progress(done, len(places))

        maps = evidence > 0
        scanned = scan(footage, detector, places=places, follow=follow, maps=maps, evidence=evidence, progress=count)
        if math.isnan(scanned.score):
            error = "; ".join(f"face {face.number}: {face.problem or 'not scored'}" for face in scanned.faces)
        shown = illustrate(footage, scanned)
        scanned = replace(scanned, faces=[replace(face, evidence=[]) for face in scanned.faces])
        digest = checksum(source.path)
    except (UserError, OSError, MemoryError) as problem:
        scanned, digest = None, ""
        error = " ".join(str(problem).split()) or "there is not enough memory"
    return Result(source, time.perf_counter() - started, scanned, error, digest, shown)


def illustrate(footage: Footage, scan: Scan) -> list[Illustration]:
    """Pictures of the evidence; the highest-scoring frame of each face is shown whole."""
    made = []
    for face in scan.faces:
        for rank, one in enumerate(face.evidence):
            marked = one.attention is not None or one.gaze is not None
            whole = None
            if rank == 0:
                squares = {other.number: _square(other, one.place) for other in scan.faces}
                squares = {number: square for number, square in squares.items() if square is not None}
                whole = jpeg(framed(footage.pixels([one.place])[0], squares), 82)
            made.append(
                Illustration(
                    face.number,
                    one.place,
                    one.score,
                    one.gaze,
                    jpeg(one.crop),
                    jpeg(overlay(one.crop, one.attention, one.gaze)) if marked else None,
                    whole,
                )
            )
    return made


def _square(face: FaceResult, place: int) -> tuple[int, ...] | None:
    at = int(np.searchsorted(face.places, place))
    there = at < len(face.places) and face.places[at] == place
    return tuple(int(value) for value in face.squares[at]) if there else None


def checksum(path: Path) -> str:
    """SHA-256 of a file, "" for a folder."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of what took part."""
    import av
    import torch

    import pyface

    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return {
        "pyface": pyface.__version__,
        "PyTorch": torch.__version__,
        "PyAV": f"{av.__version__} (libavcodec {codec})",
        "Python": platform.python_version(),
    }


# ---- for programs ----------------------------------------------------------------------------------------------------


def as_dict(report: Report) -> dict[str, Any]:
    """All of it, as JSON takes it: what is unknown is null, faces and frames are lists."""
    return {
        "method": report.detector.method,
        "weights": {
            "path": report.weights,
            "sha256": report.weights_sha256 or None,
            "training": report.detector.training or None,
        },
        "threshold": {"value": report.threshold, "origin": report.origin},
        "settings": dict(report.settings),
        "versions": versions(),
        "made": report.made.isoformat(timespec="seconds"),
        "inputs": [_json_input(report, result, result.scan) for result in report.results if result.scan],
        "failed": [
            {"input": str(result.source.path), "error": result.error} for result in report.results if result.error
        ],
    }


def _json_input(report: Report, result: Result, scan: Scan) -> dict[str, Any]:
    height, width = scan.size
    return {
        "input": str(result.source.path),
        "kind": result.source.kind,
        "sha256": result.sha256 or None,
        "score": _number(scan.score),
        "verdict": report.verdict(scan.score),
        "width": width,
        "height": height,
        "frames": len(scan.times),
        "examined": len(scan.places),
        "without_face": len(scan.without),
        "brief_detections": scan.glimpses,
        "notes": scan.notes,
        "seconds": round(result.seconds, 3),
        "faces": [
            {
                "face": face.number,
                "score": _number(face.scores.video),
                "verdict": report.verdict(face.scores.video),
                "problem": face.problem or None,
                "frames": [
                    {
                        "frame": scan.numbers[place],
                        "seconds": round(float(scan.times[place]), 6),
                        "score": _number(face.scores.fake[index]),
                        "square": [int(value) for value in face.squares[index]],
                    }
                    | (
                        {}
                        if face.scores.gaze is None
                        else {"gaze": [_number(angle) for angle in face.scores.gaze[index]]}
                    )
                    for index, place in enumerate(face.places)
                ],
            }
            for face in scan.faces
        ],
    }


COLUMNS = (
    "input", "face", "frame", "seconds", "score", "left", "top", "side", "yaw", "pitch", "face_score", "input_score",
    "verdict", "error",
)  # fmt: skip


def as_csv(report: Report) -> str:
    """A line per face and frame; one without a face for frames that show none, and one per input that failed."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in report.results:
        writer.writerows(_lines(report, result))
    return text.getvalue()


def _lines(report: Report, result: Result) -> Iterator[dict[str, Any]]:
    own = {"input": str(result.source.path)}
    scan = result.scan
    if scan is None:
        yield own | {"error": result.error}
        return
    own["input_score"] = _text(scan.score)

    def when(place: int) -> dict[str, Any]:
        return {"frame": scan.numbers[place], "seconds": f"{scan.times[place]:.6f}"}

    lines = [(place, 0, own | when(place) | {"verdict": "no face"}) for place in scan.without]
    for face in scan.faces:
        about = own | {
            "face": face.number,
            "face_score": _text(face.scores.video),
            "verdict": report.verdict(face.scores.video),
            "error": face.problem,
        }
        for index, place in enumerate(face.places):
            line = about | when(place) | dict(zip(("left", "top", "side"), map(int, face.squares[index])))
            line["score"] = _text(face.scores.fake[index])
            if face.scores.gaze is not None:
                line |= dict(zip(("yaw", "pitch"), map(_text, face.scores.gaze[index])))
            lines.append((int(place), face.number, line))
    yield from (line for _, _, line in sorted(lines, key=lambda entry: entry[:2]))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def _text(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6f}"


# ---- for people ------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #4d5661; --line: #ccd2d9; --pale: #f4f6f8; --dark: #22344a;
  --flag: #9b1c1c; --clear: #1c5c38 }
* { box-sizing: border-box }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; border-top: .4rem solid var(--dark) }
main, header.top, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.25rem }
header.top { padding-top: 2rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem }
h3 { font-size: 1.08rem; margin: 1.75rem 0 .5rem }
p { margin: .5rem 0; max-width: 50rem }
.soft { color: var(--soft) }
.hash { font-family: ui-monospace, Consolas, monospace; font-size: .86em; overflow-wrap: anywhere }
.name { overflow-wrap: anywhere }
.counts { display: flex; flex-wrap: wrap; gap: .75rem; list-style: none; padding: 0; margin: 1.25rem 0 }
.counts li { border: 1px solid var(--line); border-left: .4rem solid #6c7784; padding: .5rem 1rem; min-width: 8.5rem;
  background: var(--pale) }
.counts li.flagged { border-left-color: var(--flag) }
.counts li.clear { border-left-color: var(--clear) }
.counts b { display: block; font-size: 1.6rem; line-height: 1.2 }
.notice { border: 1px solid var(--line); background: var(--pale); padding: .75rem 1.1rem; margin: 1rem 0;
  max-width: 53rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .94rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line) }
thead th { border-bottom: 2px solid #7a8592; vertical-align: bottom }
th.n, td.n { text-align: right }
tbody th { font-weight: 600 }
th.name { min-width: 9rem }
.facts th { width: 12rem; font-weight: 400; color: var(--soft) }
.bar { display: inline-block; width: 5rem; height: .6rem; background: #e2e6ea; margin-left: .5rem; position: relative }
.bar i { position: absolute; inset: 0 auto 0 0; background: #3f536b }
.bar u { position: absolute; top: -.2rem; bottom: -.2rem; width: 2px; background: #b00020 }
.verdict { font-weight: 700; white-space: nowrap }
.score { white-space: nowrap }
.verdict.flagged { color: var(--flag) }
.verdict.clear { color: var(--clear) }
.input { border-top: 2px solid var(--dark); margin-top: 3rem; padding-top: .25rem }
.input > h2 { margin-top: 1.25rem }
.timeline { display: block; width: 100%; min-width: 36rem; height: auto; fill: #333;
  font: 12.5px system-ui, sans-serif }
.timeline .halo { paint-order: stroke; stroke: #fff; stroke-width: 4px; fill: #b00020; font-weight: 600 }
.key { display: inline-block; width: 2.2rem; height: .7rem; vertical-align: middle; margin-right: .4rem }
.faces { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; margin: .75rem 0 }
figure { margin: 0 }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line) }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px }
.pair img, .single img { width: 100% }
.single { max-width: 14.5rem }
figcaption { font-size: .88rem; color: var(--soft); padding-top: .3rem }
figcaption b { color: var(--ink) }
.whole { max-width: 40rem; margin: .75rem 0 }
details { margin: .75rem 0 }
summary { cursor: pointer; color: var(--dark); font-weight: 600 }
a { color: #0b4d8c }
footer { margin-top: 3rem; padding: 1rem 1.25rem 2rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .9rem }
@media (max-width: 40rem) {
  .faces { grid-template-columns: 1fr }
  .facts th { width: 7rem }
  .bar { display: none }
  h1 { font-size: 1.45rem }
  th, td { padding-right: .6rem }
}
@media print {
  .input { break-before: page }
  figure, tr { break-inside: avoid }
  a { color: inherit }
}
"""


def as_html(report: Report) -> str:
    """One page: pictures are in it, nothing is fetched, nothing needs JavaScript."""
    scanned = [result for result in report.results if result.scan]
    failed = [result for result in report.results if result.error]
    only = report.results[0].source.path.name if len(report.results) == 1 else f"{len(report.results)} inputs"
    title = f"Forgery detection: {only}"
    body = [*_head(report), *_summary(report, scanned)]
    for number, result in enumerate(scanned, start=1):
        body += _input(report, number, result, result.scan)
    body += _failed(failed)
    body += _provenance(report)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f'<meta name="generator" content="pyface">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n'
        "<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _head(report: Report) -> Iterator[str]:
    verdicts = [report.verdict(result.scan.score if result.scan else math.nan) for result in report.results]
    made = report.made.strftime("%Y-%m-%d %H:%M %Z").strip()
    yield '<header class="top"><h1>Forgery detection report</h1>'
    inputs = _plural(len(report.results), "input")
    yield f'<p class="soft">Method {escape(report.detector.method)}, {inputs}, {made}</p>'
    yield '<ul class="counts">'
    kinds = (("flagged", "flagged"), ("not flagged", "clear"), ("no verdict", ""), ("not scored", ""))
    for verdict, style in kinds:
        count = verdicts.count(verdict)
        if count or (report.threshold is not None and verdict in ("flagged", "not flagged")):
            words = "scored, no verdict" if verdict == "no verdict" else verdict
            yield f'<li class="{style}"><b>{count}</b>{words}</li>'
    yield "</ul></header><main>"
    yield '<div class="notice">'
    if report.threshold is None:
        yield f"<p><strong>No threshold:</strong> {escape(report.origin)}. Compare scores of the same weights only.</p>"
    else:
        yield (
            f"<p><strong>Threshold {report.threshold:.3g}</strong>, {escape(report.origin)}. "
            f"A face with at least this score is flagged as forged.</p>"
        )
    limits = LIMITS.get(report.detector.method, "")
    yield f"<p>{escape(limits)} {escape(CAUTION)}</p></div>"


def _summary(report: Report, scanned: list[Result]) -> Iterator[str]:
    if not scanned:
        return
    yield "<h2>Summary</h2>"
    yield "<p>An input's score is the highest of its faces' scores, from 0 (genuine) to 1 (forged).</p>"
    yield '<div class="wide" tabindex="0" role="region" aria-label="Summary"><table>'
    yield (
        '<thead><tr><th scope="col">Input</th><th scope="col">Score</th><th scope="col">Verdict</th>'
        '<th scope="col" class="n">Faces</th><th scope="col" class="n">Frames examined</th>'
        '<th scope="col" class="n">Without a face</th></tr></thead><tbody>'
    )
    for number, result in enumerate(scanned, start=1):
        scan = result.scan
        yield (
            f'<tr><th scope="row" class="name"><a href="#input-{number}">{escape(str(result.source.path))}</a></th>'
            f'<td class="score">{_score(report, scan.score)}</td><td>{_verdict(report, scan.score)}</td>'
            f'<td class="n">{len(scan.faces)}</td><td class="n">{len(scan.places)}</td>'
            f'<td class="n">{len(scan.without)}</td></tr>'
        )
    yield "</tbody></table></div>"


def _input(report: Report, number: int, result: Result, scan: Scan) -> Iterator[str]:
    path = result.source.path
    yield f'<section class="input" id="input-{number}"><h2 class="name">{escape(path.name or str(path))}</h2>'
    yield f"<p>{_verdict(report, scan.score)} {_score(report, scan.score)}</p>"
    yield from _facts(_about(result, scan))
    if len(scan.places) > 1:
        yield "<h3>Score through time</h3>"
        yield f'<div class="wide" tabindex="0" role="region" aria-label="Timeline of {escape(path.name, quote=True)}">'
        yield f"{timeline(scan, report.threshold, path.name)}</div>"
        if scan.without:
            yield '<p class="soft">Grey: no face was found in these frames; they were skipped.</p>'
    for face in scan.faces:
        yield from _face(report, face, scan, [one for one in result.illustrations if one.face == face.number])
    yield "</section>"


def _about(result: Result, scan: Scan) -> Iterator[tuple[str, str]]:
    height, width = scan.size
    kinds = {"video": "video file", "frames": "folder of frames", "picture": "picture"}
    yield "Input", f'<span class="name">{escape(str(result.source.path))}</span> ({kinds[result.source.kind]})'
    if result.sha256:
        yield "SHA-256", f'<span class="hash">{result.sha256}</span>'
    total = len(scan.times)
    size = f"{width} × {height} pixels"
    if total > 1:
        steps = np.diff(scan.times)
        pace = f"{scan.fps:.3g} frames per second"
        if steps.max() > 1.5 * max(float(steps.min()), 1e-9):
            pace = f"variable frame rate, {scan.fps:.3g} per second on average"
        if result.source.kind == "frames":
            pace += ", assumed"
        size += f", {total} frames, {clock(float(scan.times[-1]))} to the last, {pace}"
    yield "Pictures", size
    if total > 1:
        every = "all" if len(scan.places) == total else f"{len(scan.places)} of {total}"
        yield "Examined", f"{every} frames, in {result.seconds:.1f} s"
        skipped = f"{_plural(len(scan.without), 'frame')} without a face" if scan.without else "no frame"
        if scan.without:
            seconds = [float(scan.times[place]) for place in scan.without]
            skipped += f", between {clock(min(seconds))} and {clock(max(seconds))}"
        yield "Skipped", skipped
    if scan.glimpses:
        frames = ", ".join(map(str, scan.glimpses[:12])) + (" ..." if len(scan.glimpses) > 12 else "")
        brief = _plural(len(scan.glimpses), "detection")
        yield "Left out", f"{brief} too brief to be taken for a face ({frames} frames long)"
    if scan.notes:
        yield "Notes", escape("; ".join(scan.notes))


def _face(report: Report, face: FaceResult, scan: Scan, shown: list[Illustration]) -> Iterator[str]:
    scores = face.scores.fake[np.isfinite(face.scores.fake)]
    yield f"<h3>{_key(face.number)}Face {face.number}: {_verdict(report, face.scores.video)}</h3>"
    if face.problem:
        yield f"<p>Not scored: {escape(face.problem)}</p>"
    if len(scores) and len(scan.places) > 1:
        first, last = (float(scan.times[place]) for place in (face.places[0], face.places[-1]))
        yield (
            f"<p>Score <strong>{face.scores.video:.3f}</strong> for the whole, from "
            f"{_plural(len(scores), 'scored frame')} between {clock(first)} and {clock(last)}; single frames from "
            f"{scores.min():.3f} to {scores.max():.3f}, median {np.median(scores):.3f}.</p>"
        )
    elif len(scores):
        yield f"<p>Score <strong>{face.scores.video:.3f}</strong>.</p>"
    whole = next((one for one in shown if one.whole), None)
    if whole is not None:
        yield '<figure class="whole">' + _image(whole.whole, f"Whole picture, face {face.number} in a numbered frame")
        yield f"<figcaption>{_when(scan, whole.place)}, the crop of each face framed</figcaption></figure>"
    if shown:
        if len(scan.places) > 1:
            what = "the crop as it was scored" + (", and where the network looked" if shown[0].marked else "")
            yield f'<p class="soft">Highest-scoring frames: {what}.</p>'
        yield '<div class="faces">'
        for one in shown:
            looks = "" if one.gaze is None or not np.isfinite(one.gaze).all() else _gaze(one.gaze)
            crop = _image(one.plain, f"Face {face.number}, {_when(scan, one.place)}")
            marked = _image(one.marked, "The same crop under its attention map") if one.marked else ""
            pair = f'<div class="pair">{crop}{marked}</div>' if marked else f'<div class="single">{crop}</div>'
            words = f"<b>{one.score:.3f}</b> {_when(scan, one.place)}{looks}"
            yield f"<figure>{pair}<figcaption>{words}</figcaption></figure>"
        yield "</div>"
    if len(scores) and len(scan.places) > 1:
        yield from _slices(face, scan)


def _slices(face: FaceResult, scan: Scan) -> Iterator[str]:
    """The timeline as a table, for those who cannot see it."""
    known = np.flatnonzero(np.isfinite(face.scores.fake))
    yield f"<details><summary>Scores of face {face.number} as a table</summary><table>"
    yield '<thead><tr><th scope="col">From</th><th scope="col">To</th><th scope="col" class="n">Frames</th>'
    yield '<th scope="col" class="n">Mean</th><th scope="col" class="n">Highest</th></tr></thead><tbody>'
    for part in np.array_split(known, min(SLICES, len(known))):
        times, scores = scan.times[face.places[part]], face.scores.fake[part]
        yield (
            f'<tr><td>{clock(float(times[0]))}</td><td>{clock(float(times[-1]))}</td><td class="n">{len(part)}</td>'
            f'<td class="n">{scores.mean():.3f}</td><td class="n">{scores.max():.3f}</td></tr>'
        )
    yield "</tbody></table></details>"


def _failed(failed: list[Result]) -> Iterator[str]:
    if not failed:
        return
    yield '<h2 id="not-scored">Not scored</h2><div class="wide"><table><thead><tr><th scope="col">Input</th>'
    yield '<th scope="col">Why</th></tr></thead><tbody>'
    for result in failed:
        yield (
            f'<tr><th scope="row" class="name">{escape(str(result.source.path))}</th>'
            f'<td class="name">{escape(result.error)}</td></tr>'
        )
    yield "</tbody></table></div>"


def _provenance(report: Report) -> Iterator[str]:
    detector = report.detector
    yield "<h2>How these scores were made</h2>"
    rows = [
        ("Method", escape(detector.method)),
        ("Weights", f'<span class="name">{escape(report.weights)}</span>'),
    ]
    if report.weights_sha256:
        rows.append(("SHA-256 of the weights", f'<span class="hash">{report.weights_sha256}</span>'))
    rows.append(("Trained on", escape(detector.training or "the weights' file does not say")))
    threshold = "none" if report.threshold is None else f"{report.threshold:.3g}"
    rows.append(("Threshold", escape(f"{threshold}: {report.origin}")))
    rows.append(("Crop", f"square of {detector.margin:g} × the detected face, {detector.image_size} pixels"))
    rows += [(escape(name), escape(str(value))) for name, value in report.settings.items()]
    rows.append(("Versions", escape(", ".join(f"{name} {value}" for name, value in versions().items()))))
    yield from _facts(rows)
    yield "</main><footer>Pictures in this report are JPEG copies for viewing; what was scored is the input itself."
    yield "</footer>"


def _facts(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    lines = (f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    yield f'<table class="facts"><tbody>{"".join(lines)}</tbody></table>'


def _image(content: bytes, alt: str) -> str:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
    data = base64.b64encode(content).decode()
    about = f'width="{width}" height="{height}" alt="{escape(alt, quote=True)}"'
    return f'<img src="data:image/jpeg;base64,{data}" {about}>'


def _key(number: int) -> str:
    colour, dash = STROKES[(number - 1) % len(STROKES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<svg class="key" viewBox="0 0 36 12" aria-hidden="true"><path d="M0 6H36" stroke="{colour}" '
        f'stroke-width="4"{dashes}/></svg>'
    )


def _score(report: Report, score: float) -> str:
    if math.isnan(score):
        return ""
    mark = ""
    if report.threshold is not None:
        mark = f'<u style="left:{100 * min(max(report.threshold, 0), 1):.1f}%"></u>'
    return f'{score:.3f}<span class="bar" aria-hidden="true"><i style="width:{100 * score:.1f}%"></i>{mark}</span>'


def _verdict(report: Report, score: float) -> str:
    verdict = report.verdict(score)
    style = {"flagged": "flagged", "not flagged": "clear"}.get(verdict, "")
    words = {"flagged": "flagged as forged", "no verdict": "no verdict (no threshold)"}.get(verdict, verdict)
    return f'<span class="verdict {style}">{words}</span>'


def _when(scan: Scan, place: int) -> str:
    if len(scan.places) == 1 and len(scan.times) == 1:
        return "the picture"
    return f"frame {scan.numbers[place]}, {clock(float(scan.times[place]))}"


def _gaze(angles: np.ndarray) -> str:
    yaw, pitch = (math.degrees(float(angle)) for angle in angles)
    across = f"{abs(yaw):.0f}° to the {'right' if yaw >= 0 else 'left'}"
    along = f"{abs(pitch):.0f}° {'up' if pitch >= 0 else 'down'}"
    parts = [part for angle, part in ((yaw, across), (pitch, along)) if abs(angle) >= 0.5]
    return f", looks {' and '.join(parts) or 'straight ahead'}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"
