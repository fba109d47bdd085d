"""``pyface train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyface.errors import UserError


def train(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="What to train: proface_s.")],
    output: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", help="Folder of the run [default: runs/METHOD].")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="Settings: default (as the shipped weights), tiny (minutes), published (the authors')."),
    ] = "default",
    data: Annotated[
        Path | None, typer.Option(help="Train on the photographs of this folder instead of painted scenes.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0.01, help="Stop after so much time.")] = None,
    scenes: Annotated[int | None, typer.Option(min=1, help="Number of training pictures.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the validation table as JSON, no progress bar.")
    ] = False,
) -> None:
    """Train a model on pictures made on the spot, and measure it on photographs it never saw.

    The same command goes on where a killed run stopped. The result is OUTPUT/METHOD.safetensors, beside the logs
    log.csv and validation.csv.
    """
    from pyface.methods import list_models

    if method not in list_models():
        raise UserError(f"cannot train {method!r}; known: {', '.join(list_models())}")
    from pyface.methods.proface_s.recipe import Config, evaluate, export, validation_pictures
    from pyface.methods.proface_s.recipe import train as run

    given = {"steps": steps, "max_minutes": max_minutes, "scenes": scenes, "seed": seed}
    changes = {name: value for name, value in given.items() if value is not None}
    if data is not None:
        if not data.is_dir():
            raise UserError(f"{data} is not a folder; --data takes a folder of photographs")
        changes["data"] = str(data)
    config = Config.preset(preset, **changes)
    folder = output or Path("runs") / method
    perceptual = _vgg_lpips() if config.objective != "deployable" else None
    model = run(config, folder, perceptual=perceptual, quiet=as_json)
    weights = folder / f"{method}.safetensors"
    export(model, weights)
    _show(evaluate(model, validation_pictures(config.validation_size)), weights, as_json)


def _vgg_lpips():
    """The perceptual distance of the released objectives."""
    try:
        import lpips
    except ImportError:
        raise UserError("this preset needs LPIPS as published; pip install lpips (it downloads VGG weights)") from None
    import torch

    distance = lpips.LPIPS(net="vgg").requires_grad_(False)
    return distance.to("cuda" if torch.cuda.is_available() else "cpu")


def _show(rows: list[dict], weights: Path, as_json: bool) -> None:
    if as_json:
        import json

        typer.echo(json.dumps({"weights": str(weights), "validation": rows}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="photographs never trained on, read back from 8-bit PNG; PSNR in dB")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("picture", "obfuscator") else "right")
    digits = {"leak": 4, "keyless": 4}
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.{digits.get(name, 2)}f}" for name, v in row.items()))
    console = Console()
    console.print(table)
    console.print(f"weights: {weights}")
