"""One photo, several, or a whole folder: which file becomes which, and running them all though some fail."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from pyface.data.images import refuse_existing
from pyface.errors import UserError


@dataclass(frozen=True)
class Job:
    """One file to read and the file it becomes."""

    source: Path
    target: Path

    def paths(self) -> dict[str, str]:
        """Both names, for ``--json``."""
        return {"input": str(self.source), "output": str(self.target)}


@dataclass(frozen=True)
class Done:
    """What became of a job: a line to read, values for ``--json``, and notes that are said once for all jobs."""

    line: str
    values: dict[str, Any]
    notes: Iterable[str] = field(default=())


def plan(
    sources: Iterable[Path],
    output: Path | None,
    *,
    word: str,
    stem: Callable[[str], str],
    candidates: Callable[[Iterable[Path]], list[Path]],
    overwrite: bool,
) -> list[Job]:
    """Pair every source with a target.

    A file becomes ``NAME.<word>.png`` beside it or in the folder ``output``, or ``output`` itself. A folder becomes a
    folder of the same layout: ``output``, or ``NAME-<word>`` beside it.

    Args:
        sources: what the user named.
        output: what the user gave with ``-o``.
        word: ``protected`` or ``recovered``.
        stem: name of a file -> NAME.
        candidates: of all files in a folder, those to process.

        overwrite: whether the target of a single photo may exist; in a batch that is found out photo by photo.

    Raises:
        UserError: a source is missing, a folder has nothing to process, a target is a source or not a PNG, or the only
            target exists.
    """
    jobs = _pair(list(sources), output, word, stem, candidates)
    if len(jobs) == 1:
        refuse_existing(jobs[0].target, overwrite)
    return jobs


def _pair(
    sources: list[Path],
    output: Path | None,
    word: str,
    stem: Callable[[str], str],
    candidates: Callable[[Iterable[Path]], list[Path]],
) -> list[Job]:
    folders = [source for source in sources if source.is_dir()]
    if folders and len(sources) > 1:
        raise UserError("give one folder, or any number of photos, not both")
    for source in sources:
        if not source.exists():
            raise UserError(f"{source} does not exist")

    if folders:
        root = folders[0]
        named = root if root.name not in ("", "..") else root.resolve()  # "." has no name to put a word behind
        target_root = output or named.with_name(f"{named.name.removesuffix('-protected')}-{word}")
        if target_root.exists() and not target_root.is_dir():
            raise UserError(f"{target_root} is a file, but a folder of photos becomes a folder")
        if target_root.resolve() == root.resolve():
            raise UserError(f"{target_root} is the folder with the originals; choose another one with -o")
        files = candidates(_files_below(root, leave_out=target_root))
        if not files:
            raise UserError(f"{folders[0]} has no photos to be {word}")
        places = [(file, target_root / file.relative_to(root).parent) for file in files]
    elif output is not None and (len(sources) > 1 or output.is_dir()):
        if output.exists() and not output.is_dir():
            raise UserError(f"{output} is a file, but several photos need a folder")
        places = [(source, output) for source in sources]
    elif output is not None:
        if output.suffix.lower() != ".png":
            raise UserError(f"{output} must end in .png: other formats lose what is hidden in the pixels")
        return [_job(sources[0], output)]
    else:
        places = [(source, source.parent) for source in sources]

    names = [folder / f"{stem(source.name)}.{word}.png" for source, folder in places]
    count = Counter(names)
    return [
        # a.jpg and a.png in one folder: keep the whole name, so that neither takes the other's place
        _job(source, name if count[name] == 1 else folder / f"{source.name}.{word}.png")
        for (source, folder), name in zip(places, names, strict=True)
    ]


def run(jobs: list[Job], work: Callable[[Job], Done], *, as_json: bool) -> None:
    """Run all jobs, with a progress bar if there are several; a failure does not stop the others.

    Raises:
        UserError: the only job failed.
        typer.Exit: with code 2, after all jobs, if some of several failed; they are listed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done: list[Done] = []
    failed: list[tuple[Job, str]] = []
    said: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.disable = len(jobs) == 1 or not bar.console.is_terminal
    with bar:
        task = bar.add_task("", total=len(jobs))
        for job in jobs:
            bar.update(task, description=job.source.name)
            try:
                result = work(job)
            except (UserError, OSError, MemoryError) as error:
                if len(jobs) == 1:
                    raise
                failed.append((job, " ".join(str(error).split()) or "not enough memory"))
            else:
                done.append(result)
                for note in result.notes:
                    if note not in said:
                        typer.echo(f"note: {note}", err=True)
                    said.add(note)
                if not as_json:
                    typer.echo(result.line)
            bar.advance(task)
    if as_json:
        report = {
            "photos": [result.values for result in done],
            "failed": [{"input": str(job.source), "error": message} for job, message in failed],
        }
        typer.echo(json.dumps(report, indent=2))
    if failed:
        typer.echo(f"error: {len(failed)} of {len(jobs)} photos failed:", err=True)
        for job, message in failed:
            typer.echo(f"  {job.source}: {message}", err=True)
        raise typer.Exit(2)


def _job(source: Path, target: Path) -> Job:
    if os.path.lexists(target) and target.exists() and target.samefile(source):
        raise UserError(f"{target} is the original itself, which is never replaced; choose another name with -o")
    return Job(source, target)


def _files_below(root: Path, leave_out: Path) -> list[Path]:
    leave_out = leave_out.resolve()
    return sorted(
        path
        for path in root.rglob("*")
        if path.is_file()
        and leave_out not in path.resolve().parents
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
