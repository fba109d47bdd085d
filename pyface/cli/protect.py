"""``pyface protect``."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from pyface.cli import batch
from pyface.cli.secret import KeyFile, Password, PasswordFile, choose_secret
from pyface.errors import UserError

# Below this the owner should know before the original is deleted.
POOR_RECOVERY_DB = 30.0


def protect(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Photos, or one folder of photos.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="PNG to write, or a folder. Default: NAME.protected.png beside the photo."),
    ] = None,
    key_file: KeyFile = None,
    new_key_file: Annotated[
        Path | None, typer.Option("--new-key-file", help="Make a random key, keep it in this new file, and use it.")
    ] = None,
    password: Password = False,
    password_file: PasswordFile = None,
    obfuscator: Annotated[
        str,
        typer.Option(help="What faces shall look like: blur, pixelate, median, an installed plug-in, or module:name."),
    ] = "blur",
    strength: Annotated[
        float | None,
        typer.Option(help="Blur's sigma, pixelate's block or median's width in pixels of a face of 256."),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y,W,H", help="A face, in pixels of the upright photo; repeat for more. Switches detection off."
        ),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="Detector: cascade, an installed one, or module:function. With --box, both are used."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Store an encrypted residual, so that recovery is bit for bit exact.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output files.")] = False,
    max_megapixels: Annotated[float, typer.Option(help="Refuse larger photos.")] = 100.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Hide every face of a photo under a key, in one lossless PNG of the whole photo.

    Faces look blurred, pixelated or median-filtered; 'pyface recover' and the key bring them back. The PNG must stay
    as it is: re-compressing or resizing it destroys what is hidden. EXIF data such as the place is not copied. The
    original is never touched. A folder is processed with its layout; run it again to resume.
    """
    boxes = [_parse_box(text) for text in box or ()]
    jobs = batch.plan(
        photos,
        output,
        word="protected",
        stem=lambda name: Path(name).stem,
        candidates=_unprotected,
        overwrite=overwrite,
    )
    if boxes and len(jobs) > 1:
        raise UserError("--box marks a face in one photo, but several were given; protect that photo on its own")

    from pyface.data.images import read_photo, refuse_existing
    from pyface.methods.proface_s.photo import (
        is_protected,
        is_protection_of,
        load_protected,
        protect_photo,
        save_protected,
    )
    from pyface.vault.keys import Secret, write_key_file

    if new_key_file is not None:
        if key_file or password or password_file:
            raise UserError("--new-key-file makes a key; do not give another key or password with it")
        if os.path.lexists(new_key_file):
            raise UserError(f"key file {new_key_file} already exists and is never replaced; use it with --key-file")
        secret = Secret.generate()
    else:
        secret = choose_secret(key_file, password, password_file, new=True)
    unwritten_key = new_key_file

    def work(job: batch.Job) -> batch.Done:
        nonlocal unwritten_key
        started = time.perf_counter()
        photo = read_photo(job.source, max_megapixels)
        if not overwrite and os.path.lexists(job.target):
            if len(jobs) > 1 and _is_finished(job.target, photo):
                return batch.Done(f"{job.target}: already done", {**job.paths(), "skipped": True}, notes=photo.notes)
            refuse_existing(job.target)
        if is_protected(job.source):
            raise UserError(f"{job.source} is already protected; recover it first to protect it in another way")
        protected, quality = protect_photo(
            photo, secret, boxes=boxes, detector=detector, obfuscator=obfuscator, strength=strength, exact=exact
        )
        if unwritten_key is not None:  # only now, so that a photo that cannot be protected leaves no key behind
            write_key_file(unwritten_key, secret)
            unwritten_key = None
        save_protected(job.target, protected, overwrite=overwrite)
        faces = protected.record.faces
        notes = list(photo.notes)
        if quality.recovered < POOR_RECOVERY_DB and not exact:
            notes.append(
                f"recovery of {job.source} is poor ({quality.recovered:.1f} dB): keep the original, or use --exact"
            )
        closeness = _decibels(quality.protected, "nothing")
        recovery = _decibels(math.inf if exact else quality.recovered, "exact")
        return batch.Done(
            f"{job.target}: {len(faces)} face{'s' * (len(faces) != 1)}, {closeness} from plain {obfuscator}, "
            f"recovery {recovery} ({time.perf_counter() - started:.1f} s)",
            {
                **job.paths(),
                "skipped": False,
                "faces": [list(face) for face in faces],
                "obfuscator": obfuscator,
                "exact": exact,
                "psnr_protected": _finite(quality.protected),
                "psnr_recovered": _finite(quality.recovered),
                "seconds": round(time.perf_counter() - started, 3),
            },
            notes,
        )

    def _is_finished(target: Path, photo) -> bool:
        try:
            found = load_protected(target, max_megapixels=max_megapixels)
        except UserError:
            return False
        wanted = (obfuscator, strength, exact)
        if (found.record.obfuscator, found.record.strength, found.residual is not None) != wanted:
            return False
        return is_protection_of(found, photo, secret)

    batch.run(jobs, work, as_json=as_json)


def _unprotected(files: Iterable[Path]) -> list[Path]:
    from pyface.data.images import SUFFIXES
    from pyface.methods.proface_s.photo import is_protected

    return [file for file in files if file.suffix.lower() in SUFFIXES and not is_protected(file)]


def _parse_box(text: str) -> tuple[int, int, int, int]:
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box must be x,y,width,height in whole pixels, got {text!r}") from None
    return x, y, w, h


def _decibels(value: float, infinite: str) -> str:
    return infinite if math.isinf(value) else f"{value:.1f} dB"


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else round(value, 3)
