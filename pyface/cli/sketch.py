"""``pyface sketch``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from pyface.errors import UserError


def sketch(
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="A photo with a face.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG to write. Default: NAME.sketch.png beside the photo.")
    ] = None,
    style: Annotated[
        str, typer.Option(metavar="1|2|3|A,B,C", help="An artist, or a mix by three weights that sum to 1.")
    ] = "1",
    depth: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="Depth map as large as the photo (PNG of 8 or 16 bits, .npy; nearer is brighter, background 0), a "
            "predictor's name or module:function, rough for a plain head where the face is, or none.",
        ),
    ] = "rough",
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="FILE",
            help="Weights (.safetensors, or a checkpoint of the authors), or the folder of a run. "
            "[default: those that ship with pyface]",
        ),
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(metavar="X,Y,W,H", help="The face from hair to chin, in pixels of the upright photo."),
    ] = None,
    detector: Annotated[str, typer.Option(help="Detector: cascade, an installed one, or module:function.")] = "cascade",
    whole: Annotated[
        bool, typer.Option("--whole", help="The photo is an aligned, square face crop already: draw all of it.")
    ] = False,
    resize: Annotated[
        bool, typer.Option("--resize", help="Stretch to the network's size, as the authors' test does, and back.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Draw the face of a photo as one of three artists would.

    The largest face is framed and drawn; the sketch is as large as the network's crop (250 pixels). The shipped network
    is small and has seen procedural faces only; give --weights of your own training on FS2K for better ones.
    """
    from pyface.data.images import read_photo, refuse_existing, write_png
    from pyface.methods.hida.convert import load
    from pyface.methods.hida.model import style_weights
    from pyface.methods.hida.photo import default_model, sketch_photo

    target = output or photo.with_name(f"{photo.stem}.sketch.png")
    if target.suffix.lower() != ".png":
        raise UserError(f"{target} must end in .png")
    refuse_existing(target, overwrite)
    artist = _parse_style(style)
    style_weights(artist)  # a wrong one shall be told before any work is done
    face = None if box is None else _parse_box(box)
    started = time.perf_counter()
    picture = read_photo(photo)
    model = default_model() if weights is None else load(weights)
    drawing = sketch_photo(
        picture.pixels, artist, depth=depth, model=model, box=face, detector=detector, whole=whole, resize=resize
    )
    write_png(target, drawing.sketch, overwrite=overwrite)
    seconds = time.perf_counter() - started
    left, top, side = drawing.crop
    if as_json:
        report = {"input": str(photo), "output": str(target), "style": style, "depth": depth, "crop": [left, top, side]}
        typer.echo(json.dumps(report | {"face": drawing.face, "seconds": round(seconds, 3)}, indent=2))
        return
    for note in picture.notes:
        typer.echo(f"note: {note}", err=True)
    drawn = " x ".join(map(str, drawing.sketch.shape[::-1]))
    typer.echo(f"{target}: {drawn} pixels, from {side} x {side} at ({left}, {top}), style {style} ({seconds:.1f} s)")


def _parse_style(text: str) -> int | list[float]:
    try:
        return [float(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError:
        raise UserError(f"--style must be 1, 2 or 3, or three weights such as 0.5,0.5,0; got {text!r}") from None


def _parse_box(text: str) -> tuple[int, int, int, int]:
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box must be x,y,width,height in whole pixels, got {text!r}") from None
    return x, y, w, h
