"""``pyface recover``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from pyface.cli import batch
from pyface.cli.secret import KeyFile, Password, PasswordFile, choose_secret
from pyface.errors import UserError

# A recovered PNG says which record it came from and what its pixels are, so that a resumed run knows it is whole.
ORIGIN_KEYWORD = "pyface-recovered"


def recover(
    photos: Annotated[list[Path], typer.Argument(metavar="PNG...", help="Protected photos, or one folder of them.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="PNG to write, or a folder. Default: NAME.recovered.png beside the photo."),
    ] = None,
    key_file: KeyFile = None,
    password: Password = False,
    password_file: PasswordFile = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write what comes out even if the key is wrong or the photo was altered.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output files.")] = False,
    max_megapixels: Annotated[float, typer.Option(help="Refuse larger photos.")] = 100.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Bring the faces of a protected photo back, with the key or password it was protected with.

    A wrong key, and a photo that was changed since, are errors. A folder is processed with its layout; run it again to
    resume.
    """
    jobs = batch.plan(photos, output, word="recovered", stem=_stem, candidates=_protected, overwrite=overwrite)

    from pyface.data.images import refuse_existing, write_png
    from pyface.methods.proface_s.photo import load_protected, recover_photo
    from pyface.vault.record import digest

    secret = choose_secret(key_file, password, password_file, new=False)

    def work(job: batch.Job) -> batch.Done:
        started = time.perf_counter()
        protected = load_protected(job.source, max_megapixels=max_megapixels)
        origin = protected.record.mac
        if not overwrite and os.path.lexists(job.target):
            if len(jobs) > 1 and _is_finished(job.target, origin, max_megapixels):
                return batch.Done(f"{job.target}: already done", {**job.paths(), "skipped": True})
            refuse_existing(job.target)
        recovered = recover_photo(protected, secret, force=force)
        text = json.dumps({"origin": origin, "pixels": digest(recovered.pixels)})
        write_png(
            job.target,
            recovered.pixels,
            icc_profile=recovered.icc_profile,
            # What was forced is never taken for a finished recovery.
            texts={} if recovered.problems else {ORIGIN_KEYWORD: text},
            overwrite=overwrite,
        )
        faces = protected.record.faces
        outcome = "forced" if recovered.problems else "exact" if recovered.exact else "recovered"
        return batch.Done(
            f"{job.target}: {len(faces)} face{'s' * (len(faces) != 1)}, {outcome} "
            f"({time.perf_counter() - started:.1f} s)",
            {
                **job.paths(),
                "skipped": False,
                "faces": [list(face) for face in faces],
                "exact": recovered.exact,
                "problems": [str(problem) for problem in recovered.problems],
                "seconds": round(time.perf_counter() - started, 3),
            },
            [f"{job.source}: {problem}; the result is not to be trusted" for problem in recovered.problems],
        )

    batch.run(jobs, work, as_json=as_json)


def _is_finished(target: Path, origin: str, max_megapixels: float) -> bool:
    from pyface.data.images import read_photo, read_png_chunks
    from pyface.vault.record import digest

    try:
        text = read_png_chunks(target, keywords=(ORIGIN_KEYWORD,)).texts.get(ORIGIN_KEYWORD, b"")
        pixels = digest(read_photo(target, max_megapixels).stacked())
    except UserError:
        return False
    return text.decode("latin-1") == json.dumps({"origin": origin, "pixels": pixels})


def _stem(name: str) -> str:
    return Path(name).stem.removesuffix(".protected")


def _protected(files: Iterable[Path]) -> list[Path]:
    """PNGs with a record, and damaged ones, whose error shall be seen; the others are counted and left out."""
    from pyface.data.images import read_png_chunks
    from pyface.vault.record import TEXT_KEYWORD

    chosen, left_out = [], 0
    for file in files:
        if file.suffix.lower() != ".png":
            continue
        try:
            is_ours = TEXT_KEYWORD in read_png_chunks(file, keywords=(TEXT_KEYWORD,)).texts
        except UserError:
            is_ours = True
        chosen += [file] * is_ours
        left_out += not is_ours
    if left_out:
        typer.echo(f"note: {left_out} PNG files without a pyface record are left out", err=True)
    return chosen
