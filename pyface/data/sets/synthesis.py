"""``pyface synthesize``: writing faces of our own into the on-disk layout of a real data set.

Each layout's names, lists and pictures are written by the module that also reads them. Here stands what they share: the
table of layouts, the manifest that makes a folder resumable, and writing the files that are still missing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pyface.data.images import replacing
from pyface.errors import UserError

MANIFEST = ".pyface-synthesize.json"
JOURNAL = ".pyface-synthesize.jsonl"
JPEG_QUALITY = 95
WORTH_A_PROCESS = 4

Item = TypeVar("Item")


@dataclass(frozen=True)
class Layout:
    """Where a layout's code lives, and what ``count`` and ``image_size`` mean for it.

    Attributes:
        module: the module with ``synthesize``.
        counts: what ``count`` counts.
        image_size: of the real data set's pictures, in pixels; the default here.
        processes: whether several can share the work.
    """

    module: str
    counts: str
    image_size: int
    processes: bool = False


LAYOUTS = {
    "ffpp": Layout("pyface.data.sets.faceforensics", "videos of each kind", 256, True),
    "celebdf": Layout("pyface.data.sets.celebdf", "videos of each kind", 256, True),
    "dfd": Layout("pyface.data.sets.dfd", "videos of each kind", 256, True),
    "wilddeepfake": Layout("pyface.data.sets.wilddeepfake", "sequences of each kind", 224, True),
    "seqdeepfake": Layout("pyface.data.sets.seqdeepfake", "pictures of each subset", 256),
    "fs2k": Layout("pyface.data.sets.fs2k", "photo-sketch pairs", 250),
    "celeba": Layout("pyface.data.sets.celeba", "pictures", 178),
    "lfw": Layout("pyface.data.sets.lfw", "pictures", 250),
    "imagefolder": Layout("pyface.data.sets.folder", "pictures", 256),
}


class Progress:
    """What a writer reports to. This one keeps silent; the command line draws a bar."""

    def start(self, total: int) -> None:
        """``total`` files will be there at the end, the existing ones included."""

    def advance(self, files: int = 1) -> None:
        """So many more files are there."""


def synthesize(
    layout: str,
    out: str | os.PathLike,
    count: int,
    *,
    seed: int = 0,
    image_size: int | None = None,
    progress: Progress | None = None,
    workers: int = 1,
) -> Path:
    """Fill the folder ``out`` with ``count`` procedural samples, laid out as the data set ``layout`` is.

    The same call continues where a killed one stopped, and a larger ``count`` adds to what is there: every file depends
    on its name, ``seed`` and ``image_size`` only.

    Args:
        layout: a key of :data:`LAYOUTS`.
        out: a new or empty folder, or one that an earlier call began with the same settings.
        count: see :attr:`Layout.counts`.
        seed: of people, views and forgeries.
        image_size: in pixels; default as in the real data set.
        progress: told about every file.
        workers: processes that share the work, where :attr:`Layout.processes` says so. The files are the same. More
            than 1 needs a main module that can be imported, as multiprocessing does.

    Returns:
        ``out``.

    Raises:
        UserError: an unknown layout, bad numbers, a folder with something else in it, or other settings than before.
    """
    about = find_layout(layout)
    image_size = about.image_size if image_size is None else image_size
    if count < 1:
        raise UserError(f"count is {count}, expected 1 or more {about.counts}")
    if not 16 <= image_size <= 1024:
        raise UserError(f"image size is {image_size}, expected 16 to 1024 pixels")
    if seed < 0:
        raise UserError(f"seed is {seed}, expected 0 or more")
    if workers < 1 or (workers > 1 and not about.processes):
        most = "1 or more" if about.processes else "1, because its pictures are drawn in one process"
        raise UserError(f"workers is {workers}, expected {most} for {layout}")
    out = Path(out)
    options = {"workers": workers} if about.processes else {}
    writer = importlib.import_module(about.module).synthesize
    begin(out, layout=layout, count=count, seed=seed, image_size=image_size)
    writer(out, count, seed=seed, image_size=image_size, progress=progress or Progress(), **options)
    return out


def find_layout(name: str) -> Layout:
    """The entry of :data:`LAYOUTS`. UserError for an unknown name."""
    if name not in LAYOUTS:
        raise UserError(f"no layout {name!r}; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def begin(out: Path, *, layout: str, count: int, **settings: Any) -> None:
    """Write the manifest of ``out``, or check that ``out`` can be continued with these settings.

    Raises:
        UserError: ``out`` is a file or holds something without a manifest, the manifest is damaged, a setting or
            pyface's version differs, or ``count`` is smaller than before.
    """
    import pyface

    wanted = {"layout": layout, **settings, "version": pyface.__version__, "count": count}
    manifest = out / MANIFEST
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to write into")
    if not manifest.exists():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and was not begun by 'pyface synthesize'; give a new folder")
        write_json(manifest, wanted)
        return
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        before = found["count"]
        differing = [name for name in wanted if name != "count" and found[name] != wanted[name]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{manifest} is damaged; give a new folder, or delete {out} and begin again") from error
    if differing:
        name = differing[0]
        raise UserError(
            f"{out} was begun with {name.replace('_', ' ')} {found[name]}, not {wanted[name]}; "
            f"go on with the same settings, or give a new folder"
        )
    if count < before:
        raise UserError(f"{out} was begun with count {before}, not {count}; the count can grow but not shrink")
    if count > before:
        write_json(manifest, wanted)


def share(work: Callable[[Item], int], items: Sequence[Item], progress: Progress, workers: int) -> None:
    """Call ``work`` for every item, in so many processes; it returns how many files it wrote.

    What an item becomes may depend on nothing but the item. ``work`` and the items must survive pickle. A process has
    at least a few items, because it takes seconds to begin.
    """
    workers = min(workers, len(items) // WORTH_A_PROCESS)
    if workers < 2:
        for item in items:
            progress.advance(work(item))
        return
    # Fresh processes, because threads of torch and FFmpeg do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin_sharing) as pool:
        try:
            for files in pool.map(work, items):
                progress.advance(files)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_sharing() -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that shares the work out hears it, and ends this one


def fill(
    out: Path,
    plan: Sequence[tuple[Item, Sequence[str]]],
    draw: Callable[[list[Item]], Iterable[tuple[Sequence[np.ndarray], Any]]],
    progress: Progress,
    *,
    batch: int = 16,
) -> list[Any]:
    """Write the pictures that are still missing, and return what is known about every item.

    Files appear whole or not at all, so the existing ones are kept as they are. What was known when an item was drawn
    (its annotations) is kept in a journal, so that nothing is drawn twice.

    Args:
        out: the data set's folder.
        plan: items, each with the files it becomes, relative to ``out``; ``.jpg`` or ``.png``.
        draw: gives for each item its pictures, ndarray[H, W] or [H, W, 3] uint8, in the order of its files, and a note,
            which must survive JSON.
        progress: told about every file.
        batch: items drawn at once.

    Returns:
        The notes, in the order of ``plan``.
    """
    progress.start(sum(len(files) for _, files in plan))
    notes = _read_journal(out / JOURNAL)
    missing = []
    for item, files in plan:
        if files[0] in notes and all((out / file).exists() for file in files):
            progress.advance(len(files))
        else:
            missing.append((item, files))
    with open(out / JOURNAL, "a", encoding="utf-8") as journal:
        for start in range(0, len(missing), batch):
            some = missing[start : start + batch]
            for (_, files), (pictures, note) in zip(some, draw([item for item, _ in some]), strict=True):
                for file, pixels in zip(files, pictures, strict=True):
                    if not (out / file).exists():
                        write_picture(out / file, pixels)
                    progress.advance()
                notes[files[0]] = note
                # The line break in front ends what a killed run may have left unfinished.
                journal.write("\n" + json.dumps([files[0], note]))
            journal.flush()
    return [notes[files[0]] for _, files in plan]


def _read_journal(path: Path) -> dict[str, Any]:
    notes = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                file, note = json.loads(line)
                notes[file] = note
    return notes


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write ndarray[H, W] or [H, W, 3] uint8 as JPEG (quality 95) or PNG, as the suffix says."""
    from PIL import Image

    settings = {"format": "PNG"} if path.suffix == ".png" else {"format": "JPEG", "quality": JPEG_QUALITY}
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, **settings)


def write_text(path: Path, text: str) -> None:
    """Write or replace a list file, UTF-8."""
    with replacing(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write or replace a JSON file."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def deal(count: int, shares: Sequence[float]) -> list[int]:
    """Which of several parts each of ``count`` items goes to, so that any prefix keeps close to the ``shares``.

    The item goes to the part that is furthest behind its share. What ``count`` is does not change where an item goes.
    """
    shares = np.asarray(shares, float) / np.sum(shares)
    held = np.zeros(len(shares))
    parts = []
    for item in range(count):
        part = int(np.argmax(shares * (item + 1) - held))
        held[part] += 1
        parts.append(part)
    return parts
