"""``pyface evaluate``."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyface.cli.train import Method, Settings, TestOn, TrainOn, read_config, show_table
from pyface.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from pyface.engine import Recipe


def evaluate(
    method: Method,
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
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of the data set, or procedural [default: the run's].", show_default=False
        ),
    ] = None,
    train_on: TrainOn = None,
    test_on: TestOn = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "--out", "-o", help="Folder of the run that --train-on makes [default: runs/METHOD]."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Named settings, where no run gives them.")] = None,
    settings: Settings = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the table to this file, too.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --csv.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure weights on a method's test data, and print the table.

    Forgery detectors, cross-forgery: `--train-on splice,texture --test-on unseen` without `--weights` trains on some
    families first, in OUTPUT (and goes on with what is there), then tests on others. With `--weights`, `--train-on`
    only says what these were trained on, where no run does.
    """
    from pyface.data.images import refuse_existing, replacing
    from pyface.methods import find_recipe

    recipe_class = find_recipe(method)
    if csv_file is not None:
        refuse_existing(csv_file, overwrite)
    record = None
    if weights is not None and weights.is_dir():
        record = weights / "config.toml"
        if not record.is_file():
            raise UserError(f"{weights} is not the folder of a run (it has no config.toml); give a file of weights")
        weights = weights / f"{method}.safetensors"
        if not weights.is_file():
            raise UserError(
                f"{weights.parent} holds a run that has not ended; go on with it by 'pyface train {method} --resume "
                f"--out {weights.parent}', or give one of its files of weights"
            )
    changes = {"data": data, "train_on": train_on, "test_on": test_on}
    config = read_config(recipe_class, preset, record, changes, settings)
    recipe = recipe_class(config)
    if weights is None and train_on is not None:
        from pyface.engine import Trainer

        trainer = Trainer(recipe, output or Path("runs") / method, resume=True, quiet=as_json)
        network, source = trainer.fit(), trainer.weights
    else:
        network, source = _load(recipe, method, weights)
    rows = recipe.evaluate(network)
    if csv_file is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with replacing(csv_file, overwrite=overwrite) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    show_table(rows, method, source, as_json)


def _load(recipe: Recipe, method: str, weights: Path | None) -> tuple[nn.Module, Path]:
    """The network with its weights, in evaluation mode on the GPU if there is one, and where they came from."""
    import torch

    from pyface.engine import load_weights

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if weights is not None and weights.suffix != ".safetensors":
        from pyface.methods import load_official

        return load_official(method, weights).to(device).eval(), weights
    network = recipe.result(recipe.model())
    if weights is None:
        from importlib.resources import files

        weights = Path(str(files("pyface"))) / "weights" / f"{method}.safetensors"
        if not weights.is_file():
            raise UserError(f"no weights of {method} ship with pyface; train some, and give them with --weights")
    load_weights(network, weights, recipe.stores)
    return network.to(device).eval(), weights
