"""``pyface train``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyface.errors import UserError

if TYPE_CHECKING:
    from pyface.engine import Recipe, TrainConfig

Method = Annotated[str, typer.Argument(metavar="METHOD", help="A method's name, such as proface_s.")]
TrainOn = Annotated[
    str | None,
    typer.Option(
        metavar="FAMILIES", help="Forgery detectors: train on these families only, as 'splice,texture'. [default: all]"
    ),
]
TestOn = Annotated[
    str | None,
    typer.Option(metavar="FAMILIES", help="Test on these, other data sets, seen or unseen ones. [default: all]"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting; may be given often. See --show-config."),
]


def train(
    method: Method,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", help="Folder of the run [default: runs/METHOD].")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Named settings: tiny (minutes), paper (the authors'), default. [default: default]"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the data set, or procedural.", show_default=False)
    ] = None,
    train_on: TrainOn = None,
    test_on: TestOn = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings from a TOML file.")
    ] = None,
    settings: Settings = None,
    steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after so much time.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in OUTPUT; start one if there is none.")
    ] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the settings as TOML, with what they mean, and stop.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the table at the end as JSON, no progress bar.")
    ] = False,
) -> None:
    """Train a method, on faces made on the spot or on a data set, and evaluate the result.

    OUTPUT/METHOD.safetensors is the result, beside config.toml, checkpoints, log.csv, validation.csv and events for
    TensorBoard. A killed run goes on with `--resume`, which takes the run's own settings. Several processes:
    `accelerate launch --multi_gpu --num_processes 2 -m pyface train METHOD`.
    """
    from pyface.engine import Trainer, to_toml
    from pyface.methods import find_recipe

    recipe_class = find_recipe(method)
    folder = output or Path("runs") / method
    changes = {
        "steps": steps, "max_minutes": max_minutes, "seed": seed, "data": data,
        "train_on": train_on, "test_on": test_on,
    }  # fmt: skip
    own = folder / "config.toml"
    if resume and config_file is None and preset is None and own.is_file():
        config_file = own
    config = read_config(recipe_class, preset, config_file, changes, settings)
    if show_config:
        typer.echo(to_toml(config), nl=False)
        return
    recipe = recipe_class(config)
    trainer = Trainer(recipe, folder, resume=resume, quiet=as_json)
    network = trainer.fit()
    if trainer.leads:
        show_table(recipe.evaluate(network), method, trainer.weights, as_json)
    trainer.close()


def read_config(
    recipe: type[Recipe], preset: str | None, file: Path | None, changes: dict[str, Any], settings: list[str] | None
) -> TrainConfig:
    """The settings that the options of a command amount to."""
    from pyface.engine import PROCEDURAL, load_config

    changes = {name: value for name, value in changes.items() if value is not None}
    config = load_config(recipe.Config, preset=preset, file=file, changes=changes, assignments=settings or ())
    if config.data == PROCEDURAL:
        return config
    folder = Path(config.data)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --data takes the folder of a data set, or {PROCEDURAL}")
    # The whole path, so that a run can be resumed from anywhere.
    return dataclasses.replace(config, data=str(folder.resolve()))


def show_table(rows: list[dict[str, Any]], method: str, weights: Path, as_json: bool) -> None:
    """Print an evaluation's rows."""
    if as_json:
        import json

        typer.echo(json.dumps({"method": method, "weights": str(weights), "evaluation": rows}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=f"evaluation of {method}")
    for name in names:
        is_number = all(isinstance(row.get(name, 0), (int, float)) for row in rows)
        table.add_column(name, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(_shown(row.get(name, "")) for name in names))
    console.print(table)
    console.print(f"weights: {weights}", soft_wrap=True)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.4f}"
