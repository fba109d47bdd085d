"""``pyface synthesize``."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pyface.data.sets.synthesis import Progress


def synthesize(
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="ffpp, celebdf, dfd, wilddeepfake, seqdeepfake, fs2k, celeba, lfw or imagefolder.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "--output", "-o", help="Folder to write into.")],
    count: Annotated[
        int,
        typer.Option(
            "--count",
            "-n",
            min=1,
            help="Number of pictures (of each subset in seqdeepfake; pairs in fs2k), or of videos of each kind.",
        ),
    ] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of people, views and forgeries.")] = 0,
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", min=16, help="Pixels [default: as in the real data set]."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Processes that make videos [default: one per core]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, no progress bar.")] = False,
) -> None:
    """Write a data set of people who do not exist, laid out as a real one, for its reader to read.

    The same command goes on where a killed one stopped, and a larger COUNT adds to what is there.
    """
    from pyface.data.sets.synthesis import find_layout
    from pyface.data.sets.synthesis import synthesize as write

    about = find_layout(layout)
    if workers is None:
        workers = _cores() if about.processes else 1
    started = time.perf_counter()
    with _bar(layout, hidden=as_json) as progress:
        write(layout, out, count, seed=seed, image_size=image_size, progress=progress, workers=workers)
    seconds = time.perf_counter() - started
    if as_json:
        import json

        typer.echo(json.dumps({"layout": layout, "out": str(out), "count": count, "seconds": round(seconds, 3)}))
        return
    typer.echo(f"{out} holds {count} {about.counts}, laid out as {layout} ({seconds:.1f} s)")
    typer.echo(f"try: pyface data summary {out}")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _bar(layout: str, hidden: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from pyface.data.sets.synthesis import Progress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    bar.disable = hidden or not bar.console.is_terminal

    class Shown(Progress):
        def start(self, total: int) -> None:
            bar.update(task, total=total)

        def advance(self, files: int = 1) -> None:
            bar.advance(task, files)

    with bar:
        task = bar.add_task(layout, total=None)
        yield Shown()
