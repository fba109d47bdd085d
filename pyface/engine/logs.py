"""What a run tells: CSV tables that survive a kill, TensorBoard events, and a progress bar."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Table:
    """A CSV file that grows row by row; its first column is the step.

    Rows after ``step``, from a run that was killed, are dropped when it opens. A column that appears late is added to
    the rows before, empty, so that columns never change their place.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.columns, self.rows = path, [], []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.columns, *rows = list(csv.reader(file)) or [[]]
            self.rows = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= step]
        self._rewrite()

    def write(self, row: Mapping[str, Any]) -> None:
        late = [name for name in row if name not in self.columns]
        self.columns += late
        values = [row.get(name, "") for name in self.columns]
        self.rows.append([f"{v:.6g}" if isinstance(v, float) else str(v) for v in values])
        if late:
            self._rewrite()
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                file.write(_lines([self.rows[-1]]))

    def _rewrite(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.partial")
        padded = [row + [""] * (len(self.columns) - len(row)) for row in self.rows]
        temporary.write_text(_lines([self.columns, *padded]) if self.columns else "", encoding="utf-8", newline="")
        os.replace(temporary, self.path)


def _lines(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


class Board:
    """TensorBoard events below ``folder``, numbers only; nothing where tensorboard is not installed."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(os.fspath(folder), purge_step=step + 1)

    def write(self, group: str, row: Mapping[str, Any], step: int) -> None:
        for name, value in row.items():
            if self.writer is not None and isinstance(value, (int, float)):
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Bar:
    """A progress bar with what was logged last and the time left, where a terminal shows it."""

    def __init__(self, quiet: bool, progress: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f}%"), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=console, disable=quiet or not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=1.0, completed=progress, left="")
        self.begun, self.at = progress, time.monotonic()

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def move(self, progress: float) -> None:
        self.bar.update(self.task, completed=progress)

    def tell(self, step: int, progress: float, means: Mapping[str, float]) -> None:
        left = (1 - progress) * (time.monotonic() - self.at) / max(progress - self.begun, 1e-9)
        size, unit = (1, "s") if left < 100 else (60, "min") if left < 6000 else (3600, "h")
        shown = "  ".join(f"{name} {value:.3g}" for name, value in means.items() if not name.startswith("norm"))
        self.bar.update(
            self.task, completed=progress, left=f"{left / size:.0f} {unit} left", description=f"step {step}  {shown}"
        )
