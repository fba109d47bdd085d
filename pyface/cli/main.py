"""Entry point. A verb is the function of its name in ``pyface/cli/<verb>.py``, imported when it is called."""

from __future__ import annotations

import importlib
import signal
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from pyface.errors import UserError

# The one-line helps stand here, so that `pyface --help` needs none of the modules behind them.
VERBS = {
    "protect": "Hide every face of a photo under a key, in one lossless PNG.",
    "recover": "Bring the faces of a protected photo back.",
    "demo": "Protect and recover a portrait, and draw what happened.",
    "detect": "Score every face of videos and pictures: is it forged?",
    "sketch": "Draw the face of a photo as one of three artists would.",
    "info": "Show this machine, how pyface was built, and which compute paths work.",
    "train": "Train a method, or go on with a run.",
    "evaluate": "Measure a method's weights.",
    "synthesize": "Write a data set of procedural faces in the layout of a real one.",
    "data": "Say what a data set's folder holds, or draw what the procedural faces offer.",
    "bench": "Measure a core against its peers and its limit.",
}


class Verbs(TyperGroup):
    """A group that imports a verb only to run it, and that turns a user's mistake into one line and exit code 2."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = {name: TyperCommand(name, help=text) for name, text in VERBS.items()}

    def resolve_command(self, ctx, args):
        if args[0] in VERBS:
            return args[0], _load(args[0]), args[1:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except UserError as error:
            message = str(error)
        except BrokenPipeError:
            raise
        except OSError as error:
            message = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        except MemoryError:
            message = "not enough memory; use a smaller picture"
        except (KeyboardInterrupt, typer.Abort):
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(2)


# Tracebacks with local variables would print keys.
_SETTINGS = {
    "rich_markup_mode": "markdown",
    "pretty_exceptions_enable": False,
    "pretty_exceptions_show_locals": False,
}
app = typer.Typer(cls=Verbs, no_args_is_help=True, **_SETTINGS)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pyface-torch {version('pyface-torch')}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Face privacy, forensics and synthesis on fused kernels."""


def run() -> NoReturn:
    """Console entry point: run the command line of this process, and exit."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    # A polite kill unwinds like Ctrl-C, so that no temporary file stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app(prog_name="pyface")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _load(verb: str):
    module = importlib.import_module(f"pyface.cli.{verb}")
    single = typer.Typer(add_completion=False, **_SETTINGS)
    single.command(verb)(getattr(module, verb))
    return typer.main.get_command(single)
