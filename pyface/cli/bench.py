"""``pyface bench``."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from pyface.errors import UserError

NOT_BENCHMARKS = {"__init__", "harness", "peers"}


def bench(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="What to measure; without it, what there is.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few rounds: does everything run?")] = False,
    threads: Annotated[
        str | None, typer.Option(help="Numbers of CPU threads, such as 1,2 [default: 1,2 as far as there are cores].")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[str, typer.Option(help="Only cases with this in their name, such as 'backward'.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the CSV and pictures [default: benchmarks/results/local].")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Show the changes against an earlier CSV.")
    ] = None,
) -> None:
    """Measure a core or a method against its peers and its limit.

    Prints a table, and writes a CSV file and pictures. The benchmarks belong to a checkout of pyface, not to the
    installed package.
    """
    folder = find_benchmarks()
    known = {file.stem: _first_line(file) for file in sorted(folder.glob("*.py")) if file.stem not in NOT_BENCHMARKS}
    if name is None:
        width = max(map(len, known))
        for stem, line in known.items():
            typer.echo(f"{stem:{width}}  {line}")
        return
    if name not in known:
        raise UserError(f"no benchmark is called {name!r}; there are: {', '.join(known)}")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {device!r}")
    counts = _threads(threads, device)

    harness, module = _load(folder, name)
    options = harness.Options(
        quick=quick,
        threads=counts,
        device=device,
        only=only,
        out=out or folder / "results" / "local",
        compare=compare,
    )
    harness.run(name, module.cases, options)


def find_benchmarks() -> Path:
    """The folder `benchmarks` of the checkout that the working folder lies in, or that pyface is installed from.

    Raises:
        UserError: there is none.
    """
    here = Path.cwd()
    checkout = Path(__file__).resolve().parents[2]
    for root in (here, *here.parents, checkout):
        # The harness is asked for too: many projects have a folder of this name.
        if (root / "pyface" / "cli" / "bench.py").is_file() and (root / "benchmarks" / "harness.py").is_file():
            return root / "benchmarks"
    raise UserError("benchmarks are not part of the installed package; clone pyface's repository and run this in it")


def _threads(text: str | None, device: str) -> tuple[int, ...]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if text is None:
        return (min(2, cores),) if device == "cuda" else tuple(range(1, min(2, cores) + 1))
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1 or max(counts) > 1024:
        raise UserError(f"--threads must be numbers between 1 and 1024 such as 1,2, got {text!r}")
    return counts


def _load(folder: Path, name: str) -> tuple[ModuleType, ModuleType]:
    """The harness and a benchmark, as modules of the package `benchmarks`.

    The checkout is not put on sys.path: its `pyface`, which may not be built, would hide the installed one.
    """
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = package
    spec.loader.exec_module(package)
    return importlib.import_module("benchmarks.harness"), importlib.import_module(f"benchmarks.{name}")


def _first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
