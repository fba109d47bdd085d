"""``pyface data``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyface.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pyface.data.procedural import Person, View

    Row = Sequence[tuple[Tensor, str]]

LONGEST_LIST = 8


def data(
    action: Annotated[str, typer.Argument(metavar="ACTION", help="summary or sheet.")],
    target: Annotated[Path, typer.Argument(metavar="PATH", help="The data set's folder, or the PNG to draw (sheet).")],
    layout: Annotated[
        str | None, typer.Option("--layout", help="Which data set it is, if the folder does not tell (summary).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the people (sheet).")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace PATH (sheet).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Look into a data set's folder, or draw what the procedural world has to offer.

    `summary` says which data set a folder holds, how many samples of each kind each split has, and their sizes.
    `sheet` draws people, forgeries, sketches and edits on one picture.
    """
    if action == "summary":
        _summary(target, layout, as_json)
    elif action == "sheet":
        from pyface.data.images import refuse_existing, write_png

        refuse_existing(target, overwrite)
        write_png(target, draw_sheet(seed), overwrite=overwrite)
        typer.echo(f"wrote {target}")
    else:
        raise UserError(f"no action {action!r}; there are summary and sheet")


def _summary(root: Path, layout: str | None, as_json: bool) -> None:
    from pyface.data.sets.recognise import summaries

    found = summaries(root, None if layout is None else [layout])
    if as_json:
        import json

        typer.echo(json.dumps({"folder": str(root), "parts": found}, indent=1))
    else:
        _show(root, found)
    problems = [f"{' '.join(map(str, s['part'].values()))}: {s['problem']}" for s in found if "problem" in s]
    if problems:
        raise UserError(problems[0])


def _show(root: Path, found: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    for name in dict.fromkeys(summary["name"] for summary in found):
        these = [summary for summary in found if summary["name"] == name]
        title = escape(f"{name} in {root}")
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
        table.add_column("")
        for summary in these:
            table.add_column(" ".join(map(str, summary["part"].values())) or "all", overflow="fold")
        keys = dict.fromkeys(
            key for summary in these for key in summary if key not in ("part", "name", *summary["part"])
        )
        for key in keys:
            table.add_row(key, *(_cell(summary.get(key, "")) for summary in these))
        console.print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if not isinstance(value, dict):
        return escape(str(value))
    lines = [f"{key}: {number}" for key, number in list(value.items())[:LONGEST_LIST]]
    more = [f"and {len(value) - LONGEST_LIST} more"] if len(value) > LONGEST_LIST else []
    return escape("\n".join([*lines, *more]))


MARGIN, GAP, LINE = 32, 8, 22
FACE, LARGE = 128, 256


def draw_sheet(seed: int = 0) -> np.ndarray:
    """48 faces, five forgeries, three sketch styles and two sequences of edits: ndarray[H, W, 3] uint8."""
    from pyface.data.procedural import ProceduralFaces

    faces = ProceduralFaces(48, FACE, seed)
    samples = faces.__getitems__(range(len(faces)))
    people = [[(samples[4 * person + photo]["image"], "") for person in range(12)] for photo in range(4)]
    sections = [
        ("Twelve people, four photos each", FACE, people),
        (
            "Forgeries: the original, a source person, the forged frame, and where it was forged",
            LARGE,
            _forgeries(seed),
        ),
        ("A photo, its depth, and its sketches by three artists", LARGE, _sketches(seed)),
        ("Edits step by step: components, then attributes", LARGE, _edits(seed)),
    ]
    return _compose(sections)


def _subject(seed: int, number: int) -> tuple[Person, View]:
    """Somebody with open eyes and nothing in front of the face."""
    from pyface.data.procedural import draw_person, draw_view

    view = replace(draw_view(seed, number), occluder=None, glasses="none", hat="none", eye_open=1.0)
    return draw_person(seed, number), view


def _forgeries(seed: int) -> list[Row]:
    from pyface.data.forgery import FORGERIES, forge
    from pyface.data.procedural import render

    columns = []
    for number, method in enumerate(FORGERIES):
        person, view = _subject(seed, 100 + number)
        source, pose = _subject(seed, 200 + number)
        forged = forge(method, person, [view], source, seed=seed, image_size=LARGE)
        columns.append(
            (
                (forged.originals[0], "original"),
                (render([source], [pose], LARGE)[0]["image"], "source"),
                (forged.images[0], method.replace("_", " ")),
                (forged.masks[0].float(), "where"),
            )
        )
    return list(zip(*columns, strict=True))


def _sketches(seed: int) -> list[Row]:
    from pyface.data.procedural import render
    from pyface.data.sketch import sketch

    rows = []
    for number in (300, 301):
        person, view = _subject(seed, number)
        (sample,) = render([person], [view], LARGE)
        drawn = [(sketch(sample, style, seed=seed), f"style {style}") for style in (1, 2, 3)]
        rows.append([(sample["image"], "photo"), (sample["depth"], "depth"), *drawn])
    return rows


def _edits(seed: int) -> list[Row]:
    from pyface.data.edits import ATTRIBUTES, COMPONENTS, edit

    rows = []
    for number, sequence in ((400, COMPONENTS[::-1]), (401, ATTRIBUTES)):
        edited = edit(sequence, *_subject(seed, number), seed=seed, image_size=LARGE)
        labels = [f"{place}. {name}" for place, name in enumerate(sequence, 1)]
        rows.append([(edited.original, "original"), *zip(edited.steps, labels, strict=True)])
    return rows


def _compose(sections: Sequence[tuple[str, int, Sequence[Row]]]) -> np.ndarray:
    """Titles and rows of labelled pictures, one section below the other. Pictures of a section have one size."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    from pyface.data.sets.folders import to_pixels

    title, text = ImageFont.load_default(size=24), ImageFont.load_default(size=16)
    width = 2 * MARGIN + max(len(row) * (size + GAP) - GAP for _, size, rows in sections for row in rows)
    labelled = [any(label for _, label in row) * LINE for _, _, rows in sections for row in rows]
    heights = [size for _, size, rows in sections for _ in rows]
    height = MARGIN + sum(heights) + sum(labelled) + GAP * len(heights) + len(sections) * (3 * LINE)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for heading, size, rows in sections:
        draw.text((MARGIN, top), heading, fill=(20, 20, 20), font=title)
        top += 2 * LINE
        for row in rows:
            for place, (image, label) in enumerate(row):
                left = MARGIN + place * (size + GAP)
                sheet.paste(Image.fromarray(to_pixels(image.expand(3, -1, -1))), (left, top))
                draw.text((left, top + size + 2), label, fill=(70, 70, 70), font=text)
            top += size + GAP + (LINE if any(label for _, label in row) else 0)
        top += LINE
    return np.asarray(sheet)
