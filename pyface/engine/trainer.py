"""The training loop."""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from pyface.data.images import replacing
from pyface.engine.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from pyface.engine.config import differences, load_config, to_toml
from pyface.engine.logs import Bar, Board, Table
from pyface.engine.recipe import Recipe, Row
from pyface.engine.run import Run, processes
from pyface.engine.sampling import batches, seed_everything
from pyface.errors import UserError


class Trainer:
    """Trains a method's recipe in a folder.

    The folder then holds ``config.toml``, ``log.csv``, ``validation.csv``, ``tensorboard/``, ``checkpoints/``,
    ``best-COLUMN.safetensors`` for what the recipe selects by, and the resulting weights, ``METHOD.safetensors``. A run
    killed at any moment and resumed with the same number of processes ends, on a CPU, with the same bits as an unbroken
    one, unless ``max_minutes`` shapes it. Uses the GPU if there is one, and every process of ``accelerate launch``.

    Args:
        recipe: what to train.
        out: folder of the run, created if need be.
        resume: go on with the run that the folder holds; where it holds none, start one.
        quiet: no progress bar.
    """

    def __init__(self, recipe: Recipe, out: str | os.PathLike, *, resume: bool = False, quiet: bool = False) -> None:
        self.recipe, self.config = recipe, recipe.config
        self.folder, self.resume, self.quiet = Path(out), resume, quiet

    @property
    def weights(self) -> Path:
        """The file with the resulting weights."""
        return self.folder / f"{self.config.method or 'model'}.safetensors"

    def fit(self) -> nn.Module:
        """Train to the end.

        Returns:
            The recipe's ``result()`` with the resulting weights, in evaluation mode.

        Raises:
            UserError: the folder holds a run and ``resume`` is not set, or a run with other settings; its checkpoints
                are damaged; there is nothing to train on; the settings do not fit together; training diverged.
        """
        for _ in self.steps():
            pass
        load_weights(self.run.network, self.weights, self.recipe.stores)
        return self.run.network.eval()

    def steps(self) -> Iterator[Run]:
        """Train, and give the run after every step; :meth:`fit` without the result."""
        from accelerate.utils import broadcast_object_list

        state = processes()
        self.leads = state.is_main_process
        # One process looks, so that none takes what another has just written for an earlier run.
        (mistake,) = broadcast_object_list([self._open() if self.leads else None])
        if mistake:
            raise UserError(mistake)
        with state.main_process_first():
            self.recipe.prepare(self.folder, self.quiet or not self.leads)
        seed_everything(self.config.seed, 0, 0, state.device)
        self.run = run = Run(self.recipe)
        loaded = load_checkpoint(self.folder, run) if self.resume else None
        self.best: dict[str, float] = loaded[0]["best"] if loaded else {}
        self._rows: list[Row] | None = None
        for problem in loaded[1] if loaded and self.leads else ():
            warnings.warn(f"{problem}; going on from step {run.step}", stacklevel=2)
        yield from self._loop(run)
        if self.leads:
            self._write_result(run)
        state.wait_for_everyone()

    @staticmethod
    def close() -> None:
        """Take leave of the other processes, if there are any; nothing can be trained in this process afterwards."""
        processes().destroy_process_group()

    def _open(self) -> str | None:
        """Claim the folder for this run; returns what speaks against it."""
        record = self.folder / "config.toml"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if record.exists():
                if not self.resume:
                    return f"{self.folder} holds a run already; go on with it by --resume, or choose another folder"
                changed = differences(load_config(type(self.config), file=record), self.config)
                if changed:
                    return (
                        f"{self.folder} holds a run with other settings: {', '.join(changed)}; "
                        f"give the same ones, or another folder"
                    )
            with replacing(record, overwrite=True) as temporary:
                temporary.write_text(to_toml(self.config), encoding="utf-8")
        except OSError as error:
            return f"cannot use {self.folder} as the folder of a run: {error.strerror or error}"
        except UserError as error:
            return str(error)
        return None

    def _loop(self, run: Run) -> Iterator[Run]:
        recipe, config = self.recipe, self.config
        run.measure_progress()
        if run.progress >= 1:
            return
        log = _Log(self.folder, run.step) if self.leads else None
        feed = None if run.order is None else batches(run, run.order, run.data)
        epoch = None
        run.started = time.monotonic()
        with Bar(self.quiet or not self.leads, run.progress) as bar:
            while run.progress < 1:
                if feed is not None and run.epoch != epoch:
                    epoch = run.epoch
                    recipe.on_epoch(run)
                rate = self._step(run, feed)
                done = run.progress >= 1

                bar.move(run.progress)
                if run.step % config.log_every == 0 or done:
                    means = {name: math.fsum(values) / len(values) for name, values in run.settle().items()}
                    run.values.clear()
                    if log is not None:
                        where = {"step": run.step} | ({} if feed is None else {"epoch": epoch})
                        log.train(where | {"minutes": run.seconds / 60, "lr": rate, **means, "skipped": run.skipped})
                        bar.tell(run.step, run.progress, means)
                validate_every = config.validate_every * (run.per_epoch if config.epochs else 1)
                if done or (validate_every and run.step % validate_every == 0):
                    self._validate(run, log)
                if done or run.step % (config.checkpoint_every or run.per_epoch or run.step + 1) == 0:
                    run.settle()
                    if self.leads:
                        save_checkpoint(self.folder, run, {"best": self.best})
                yield run
        if log is not None:
            log.board.close()

    def _step(self, run: Run, feed: Iterator[Any] | None) -> float:
        """One step; returns the learning rate it used."""
        recipe, config = self.recipe, self.config
        seed_everything(config.seed, run.step, run.rank, run.device)
        for run.part in range(config.accumulate):
            batch = None if feed is None else _placed(next(feed), run)
            with run.autocast():
                report = recipe.step(run, batch)
            if not recipe.manual:
                run.backward(report["loss"])
            run.note(report)
        if not recipe.manual:
            for optimizer in run.optimizers.values():
                run.update(optimizer)
        rate = next(iter(run.optimizers.values())).param_groups[0]["lr"]
        run.finish_step()
        run.measure_progress()
        return rate

    def _validate(self, run: Run, log: _Log | None) -> None:
        """Measure the averaged weights in every process, and keep them where they are the best so far."""
        with run.evaluation() as network:
            self._rows = rows = run.agree(self.recipe.validate(network))
            means = _means(rows)
            if log is not None:
                log.validation(rows, means, run)
            for column, wish in self.recipe.best.items():
                if column not in means:
                    raise UserError(f"validation gave no finite {column}, by which weights are to be chosen")
                sign = 1 if wish == "max" else -1
                if column not in self.best or sign * means[column] > sign * self.best[column]:
                    self.best[column] = means[column]
                    if self.leads:
                        about = self._about(run, rows) | {column: f"{means[column]:.6g}"}
                        save_weights(network, self._best_path(column), about, self.recipe.stores)

    def _write_result(self, run: Run) -> None:
        first = next(iter(self.recipe.best), None)
        if first is None:
            with run.evaluation() as network:
                # A run that had ended before was not validated in this sitting.
                rows = self.recipe.validate(network) if self._rows is None else self._rows
                save_weights(network, self.weights, self._about(run, rows), self.recipe.stores)
        else:
            with replacing(self.weights, overwrite=True) as temporary:
                shutil.copyfile(self._best_path(first), temporary)

    def _best_path(self, column: str) -> Path:
        return self.folder / f"best-{column}.safetensors"

    def _about(self, run: Run, rows: list[Row]) -> dict[str, str]:
        return {"method": self.config.method, "step": str(run.step)} | self.recipe.about(rows)


class _Log:
    """The files that one process keeps."""

    def __init__(self, folder: Path, step: int) -> None:
        self.log, self.table = Table(folder / "log.csv", step), Table(folder / "validation.csv", step)
        self.board = Board(folder / "tensorboard", step)

    def train(self, row: dict[str, Any]) -> None:
        self.log.write(row)
        self.board.write("train", {k: v for k, v in row.items() if k != "step"}, row["step"])

    def validation(self, rows: list[Row], means: dict[str, float], run: Run) -> None:
        for row in rows:
            self.table.write({"step": run.step, "minutes": run.seconds / 60, **row})
        self.board.write("validation", means, run.step)


def _means(rows: list[Row]) -> dict[str, float]:
    """Means of a table's columns over the rows where they are finite numbers."""
    means = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [float(row[name]) for row in rows if isinstance(row.get(name), (int, float))]
        values = [value for value in values if math.isfinite(value)]
        if values:
            means[name] = math.fsum(values) / len(values)
    return means


def _placed(batch: Any, run: Run) -> Any:
    if run.device.type == "cpu":
        return batch
    from accelerate.utils import send_to_device

    return send_to_device(batch, run.device, non_blocking=True)
