"""``pyface detect``."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyface.errors import UserError

if TYPE_CHECKING:
    from pyface.methods.detection import Detector
    from pyface.methods.detection.report import Report, Result
    from pyface.methods.detection.scan import Source

EVIDENCE = 6


def detect(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help="Videos, pictures, or folders of videos, of pictures or of frames."),
    ],
    method: Annotated[str, typer.Option("--method", "-m", help="acmf or gazeforensics.")] = "acmf",
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="FILE|RUN",
            help="Weights (.safetensors, or a checkpoint of the authors), or the folder of a run of 'pyface train'.",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Flag faces from this score on [default: the calibrated one of the weights]."),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Examine frames whose number is a multiple of this.")] = 1,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Examine so many frames of each video, evenly spread.")
    ] = None,
    detector: Annotated[
        str, typer.Option(help="Face detector: cascade, an installed one, or module:function.")
    ] = "cascade",
    stride: Annotated[int, typer.Option(min=1, help="Look for faces in every so manyth examined frame.")] = 5,
    longest: Annotated[
        int, typer.Option(min=0, help="Search frames reduced to this longer side, in pixels; 0: as they are.")
    ] = 640,
    pictures: Annotated[
        str, typer.Option("--as", metavar="KIND", help="What pictures in a folder are: auto, video or pictures.")
    ] = "auto",
    fps: Annotated[float, typer.Option(min=0.001, help="Frames per second of folders of frames.")] = 25.0,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write a line per frame.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a report to look at, one file with pictures.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of --csv and --html.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, no progress bar.")] = False,
) -> None:
    """Score every face of videos and pictures: how likely is it forged?

    There are no scores without weights: 'pyface train acmf --preset tiny' makes some. Faces are followed through a
    video, each has its own score; frames without one are skipped and counted. Exit code 2 says that some input could
    not be scored; the others are.
    """
    from pyface.data.crop import FaceCrop
    from pyface.data.detect import get_detector
    from pyface.data.follow import Follow
    from pyface.data.sets.clips import Evenly, Every
    from pyface.methods.detection import load_detector
    from pyface.methods.detection.report import Report, as_csv, as_dict, as_html, checksum, examine, find_threshold
    from pyface.methods.detection.scan import find_sources

    if frames is not None and every > 1:
        raise UserError("--every and --frames both choose frames; give one of them")
    sources = find_sources(inputs, pictures)
    _check_targets([file for file in (csv_file, html_file) if file is not None], sources, overwrite)
    get_detector(detector)  # a wrong one shall be told before any work is done
    scorer = _load(load_detector, method, weights)
    choose = Evenly(frames) if frames is not None else Every(every)
    follow = Follow(FaceCrop(detector=detector), stride=stride, longest=longest or None)
    evidence = EVIDENCE if html_file is not None else 0

    def work(source: Source, progress: Callable[[int, int], None]) -> Result:
        return examine(source, scorer, choose=choose, follow=follow, fps=fps, evidence=evidence, progress=progress)

    results = _run(sources, work)
    value, origin = find_threshold(scorer, threshold)
    settings = {
        "Frames of a video": "all" if every == 1 else f"1 of {every}",
        "Face detector": f"{detector}, in 1 of {stride} examined frames of a video, "
        + (f"searched at {longest} pixels" if longest else "searched as they are"),
    }
    if frames is not None:
        settings["Frames of a video"] = f"{frames}, evenly spread"
    file = weights / f"{scorer.method}.safetensors" if weights.is_dir() else weights
    made = datetime.now(timezone.utc)
    report = Report(scorer, str(weights), checksum(file), value, origin, settings, results, made)
    if csv_file is not None:
        _write(csv_file, as_csv(report), overwrite)
    if html_file is not None:
        _write(html_file, as_html(report), overwrite)
    if as_json:
        typer.echo(json.dumps(as_dict(report), indent=1))
    else:
        _print(report)
    failed = [result for result in results if result.error]
    if failed:
        typer.echo(f"error: {len(failed)} of {len(results)} inputs could not be scored:", err=True)
        for result in failed:
            typer.echo(f"  {result.source.path}: {result.error}", err=True)
        raise typer.Exit(2)


def _load(load_detector, method: str, weights: Path | None) -> Detector:
    import torch

    from pyface.methods.detection import DETECTORS

    if method not in DETECTORS:
        raise UserError(f"{method!r} detects no forgeries; the methods that do are {', '.join(DETECTORS)}")
    if weights is None:
        raise UserError(
            f"{method} has no weights to score with; make some by 'pyface train {method} --preset tiny --out runs/"
            f"{method}' (procedural faces; add --data FOLDER for a real data set), then give --weights runs/{method}, "
            f"or a checkpoint of the authors"
        )
    if not weights.exists():
        raise UserError(f"{weights} does not exist; --weights takes a file, or the folder of a run of 'pyface train'")
    return load_detector(method, weights, "cuda" if torch.cuda.is_available() else "cpu")


def _check_targets(files: list[Path], sources: list[Source], overwrite: bool) -> None:
    from pyface.data.images import refuse_existing

    taken = [source.path for source in sources]
    for file in files:
        refuse_existing(file, overwrite)
        if any(path.exists() and file.exists() and file.samefile(path) for path in taken):
            raise UserError(f"{file} is an input, which is never replaced; choose another name")
    if len(files) == 2 and files[0].absolute() == files[1].absolute():
        raise UserError(f"--csv and --html both write {files[0]}; choose another name for one of them")


def _run(sources: list[Source], work: Callable[..., Result]) -> list[Result]:
    """What became of every source, under a progress bar of frames and, of several sources, one of sources."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.disable = not bar.console.is_terminal
    results = []
    with bar:
        whole = bar.add_task("inputs", total=len(sources), visible=len(sources) > 1)
        for source in sources:
            task = bar.add_task(source.path.name, total=None)
            results.append(work(source, lambda done, total, task=task: bar.update(task, completed=done, total=total)))
            bar.remove_task(task)
            bar.advance(whole)
    return results


def _print(report: Report) -> None:
    for result in report.results:
        scan = result.scan
        if scan is None:
            continue
        without = f", {len(scan.without)} without a face" if scan.without else ""
        examined = f"{len(scan.places)} frames{without}" if len(scan.times) > 1 else "picture"
        typer.echo(f"{result.source.path}: {_said(report, scan.score)} ({examined}, {result.seconds:.1f} s)")
        for note in scan.notes:
            typer.echo(f"  note: {note}")
        for face in scan.faces:
            first, last = (scan.times[face.places[end]] for end in (0, -1))
            when = f", {len(face.places)} frames, {first:.2f} to {last:.2f} s" if len(scan.times) > 1 else ""
            typer.echo(f"  face {face.number}: {face.problem or _said(report, face.scores.video)}{when}")
        if scan.glimpses:
            typer.echo(f"  {len(scan.glimpses)} detections were too brief to be taken for a face")
    value = "no threshold" if report.threshold is None else f"threshold {report.threshold:.3g}"
    typer.echo(f"{value}: {report.origin}")


def _said(report: Report, score: float) -> str:
    verdict = report.verdict(score)
    return verdict if verdict == "not scored" else f"score {score:.3f}, {verdict}"


def _write(path: Path, text: str, overwrite: bool) -> None:
    from pyface.data.images import replacing

    with replacing(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
