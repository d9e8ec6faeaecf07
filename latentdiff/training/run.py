"""A training run kept in a directory, so that it survives being killed and can be looked at while it goes on.

    config.json       what was asked for; another run is refused in its place
    losses.csv        step, loss: of every batch
    metrics.csv       step; since the row before: the mean loss, batches_per_second, metrics; learning_rate; val_loss
    tensorboard/      the same, as events
    samples/          step_00001000.png: pictures of fixed prompts and seeds
    checkpoints/      step_00001000.npz: the whole state; the last ones
    model/            what is trained, as the directory that it will be in the end

A run that is started again goes on from its last checkpoint, and its losses and weights are those of a run that was
never stopped: bit for bit with the same threads, versions and machine.
"""

import csv
import json
import pathlib
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops
from PIL import Image

from latentdiff.backend import (
    EventWriter,
    every_process_says,
    is_first_process,
    is_spread,
    keep_freed_memory,
    process,
    sync_state,
    to_numpy,
)
from latentdiff.training.state import read_state, write_state
from latentdiff.training.step import TrainingModel
from latentdiff.training_config import HISTORY

MAY_CHANGE = ("steps", "checkpoint_every", "log_every", "sample_every", "validate_every", "keep")


class Run(keras.callbacks.Callback):
    """Keeps a run of `fit` in a directory; as a rule one epoch goes over all the steps that are left.

    Use:
        run = Run("runs/mine", config, steps=10000)
        first = run.resume(model)
        model.fit(batches(first, 10000), callbacks=[run], shuffle=False)

    where batch k of a run is a function of k alone.

    Args:
        directory: the run's own; made where it is missing.
        config: what the run depends on, as JSON can say it.
        defaults: what holds for a name that the configuration of a run begun earlier does not have.
        steps: batches of the whole run.
        checkpoint_every: batches between two checkpoints.
        log_every: batches between two rows of metrics; at most `HISTORY`.
        sample_every, validate_every: batches between two rows of pictures, and between two values of `val_loss`; None
            is `checkpoint_every`.
        keep: checkpoints that are kept, the last ones.
        save: called with the path of `model/`; writes what is trained there, whole or not at all.
        sample: gives pictures, uint8 (n, H, W, 3).
        validate: gives the validation's metrics by name. `save`, `sample` and `validate` see the weights' average.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        config: Mapping[str, Any],
        steps: int,
        *,
        defaults: Mapping[str, Any] | None = None,
        checkpoint_every: int = 1000,
        log_every: int = 50,
        sample_every: int | None = None,
        validate_every: int | None = None,
        keep: int = 2,
        save: Callable[[pathlib.Path], None] | None = None,
        sample: Callable[[], np.ndarray] | None = None,
        validate: Callable[[], Mapping[str, float]] | None = None,
    ):
        super().__init__()
        self.defaults = dict(defaults or {})
        self.directory, self.config, self.steps = pathlib.Path(directory), json.loads(json.dumps(config)), steps
        self.every = {
            "log": log_every,
            "checkpoint": checkpoint_every,
            "sample": checkpoint_every if sample_every is None else sample_every,
            "validate": checkpoint_every if validate_every is None else validate_every,
        }
        numbers = {"steps": steps, "keep": keep, **{f"{name}_every": every for name, every in self.every.items()}}
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {name}={number}.")
        if log_every > HISTORY:
            raise ValueError(f"`log_every` must be at most {HISTORY}. Received: log_every={log_every}.")
        self.keep = keep
        self.save, self.sample, self.validate = save, sample, validate
        self.step = self.first = 0
        self._kept = 0
        self._interrupted = False

    def checkpoints(self) -> list[pathlib.Path]:
        """The states that are there, oldest first."""
        return sorted((self.directory / "checkpoints").glob("step_*.npz"))

    def resume(self, model: TrainingModel) -> int:
        """Puts the last whole state into a compiled model; what came after it is struck from the tables.

        Returns:
            The number of batches that it was trained on: the next batch's index. 0 in a new directory.

        Raises:
            ValueError: the directory is another run's, no checkpoint in it is whole, or not every process sees it.
        """
        if is_first_process():
            self._begin()
        states = self.checkpoints()
        seen = every_process_says(_step_of(states[-1]) if states else 0)
        if len(set(seen)) > 1:
            raise ValueError(f"Every process must see the run's directory. Received: last checkpoints={seen}.")
        if not is_first_process():
            self._begin()
        error: ValueError | None = None
        for path in reversed(states):
            try:
                read_state(path, model)
            except ValueError as damage:
                error = error or damage
                continue
            self.first = _step_of(path)
            break
        else:
            if error:
                raise error
            self.first = 0
        self.step = self._kept = self.first
        if is_first_process():
            for aside in (self.directory / "checkpoints").glob("*.tmp"):  # of a run that was killed while it wrote
                aside.unlink()
            self._begin_tables()
        return self.first

    def _begin(self) -> None:
        check_config(self.directory, self.config, self.defaults)
        if is_first_process():
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / "config.json"
            aside = path.with_suffix(".tmp")
            aside.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
            aside.replace(path)

    def _begin_tables(self) -> None:
        for name in ("losses.csv", "metrics.csv"):
            path = self.directory / name
            if path.exists():
                with path.open(newline="", encoding="utf-8") as file:
                    header, *rows = list(csv.reader(file)) or [[]]
                rows = [row for row in rows if len(row) == len(header) and int(row[0]) <= self.first]
                _rewrite(path, [header, *rows] if header else [])

    def on_train_begin(self, logs=None):
        self._events = EventWriter(self.directory / "tensorboard") if is_first_process() else None
        self._row = self.step  # the last batch in losses.csv
        self._time = time.perf_counter()
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._interrupt)

    def on_epoch_begin(self, epoch, logs=None):
        self.first = self.step  # a run may take several epochs, and calls of `fit`, one for each size of picture say

    def _interrupt(self, number, frame):
        """The first signal asks for a checkpoint after this batch; the second one is taken as usual."""
        self._interrupted = True
        signal.signal(number, self._handlers[number])

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            keep_freed_memory()

    def on_train_batch_end(self, batch, logs=None):
        before, self.step = self.step, min(self.first + batch + 1, self.steps)  # the last execution may have fewer
        due = {name for name, every in self.every.items() if before // every != self.step // every}
        if self.step >= self.steps:
            due = set(self.every)
        stop = self._interrupted
        if process()[1] > 1:  # all stop at the same batch: when all of them log
            stop = bool(due) and any(every_process_says(self._interrupted))
        if stop:
            due |= {"log", "checkpoint"}
            self.model.stop_training = True
        if self.step - self._row >= HISTORY - (self.step - before):
            due.add("log")  # before the model forgets a loss
        if due:
            self._keep(due, logs or {})

    def on_train_end(self, logs=None):
        if self._kept < self.step or not self._kept:  # stopped early, by another callback
            self._keep(set(self.every), logs or {})
        self._end()

    def _end(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._events:
            self._events.close()

    def _keep(self, due: set[str], logs: Mapping[str, Any]) -> None:
        """Does what is due after batch `self.step`; each time a row of metrics is written and the next one begins."""
        sync_state(self.model)
        try:
            losses = self.model.last_losses(self.step - self._row)
            self._check_finite(losses)
            if "checkpoint" in due:
                self._check_weights()
            row = self._metrics(losses, logs)
            with self.model.averaged():
                row |= self._look(due)
            if is_first_process():
                self._write_tables(losses, row)
            self.model.reset_metrics()
            if "checkpoint" in due:
                write_state(self.directory / "checkpoints" / f"step_{self.step:08}.npz", self.model)
                for path in self.checkpoints()[: -self.keep] if is_first_process() else ():
                    path.unlink()
        except BaseException:
            self._end()
            raise
        if "checkpoint" in due:
            self._kept = self.step
        self._row, self._time = self.step, time.perf_counter()

    def _look(self, due: set[str]) -> dict[str, float]:
        """Validates, draws samples and writes the model, whichever is due."""
        row = {}
        if "validate" in due and self.validate:
            row = {name: float(value) for name, value in self.validate().items()}
        if "sample" in due and self.sample:
            picture = np.concatenate(list(self.sample()), axis=1)
            if is_first_process():
                path = self.directory / "samples" / f"step_{self.step:08}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(picture).save(path)
        if "checkpoint" in due and self.save:
            if is_first_process():
                self.save(self.directory / "model")
            elif any(is_spread(variable) for variable in self.model.variables):  # the first one needs the others' parts
                with tempfile.TemporaryDirectory() as place:
                    self.save(pathlib.Path(place) / "model")
        return row

    def _check_finite(self, losses: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            raise ValueError(
                f"The loss must be finite. Received: loss={losses[bad[0]]} at step {self._row + 1 + bad[0]}. "
                f"{self._last_good()}."
            )

    def _check_weights(self) -> None:
        """The last loss is of the weights before the last step."""
        for variable in self.model.trainable_variables:
            if not bool(ops.all(ops.isfinite(variable))):
                raise ValueError(
                    f"Weights must be finite. Received: NaN or infinity in {variable.path} after step {self.step}. "
                    f"{self._last_good()}."
                )

    def _last_good(self) -> str:
        kept = self.checkpoints()
        return f"The last good state is {kept[-1]}" if kept else "There was no checkpoint yet"

    def _metrics(self, losses: np.ndarray, logs: Mapping[str, Any]) -> dict[str, float]:
        row: dict[str, float] = {}
        if len(losses):
            row["loss"] = float(np.mean(losses.astype("float64")))
            row["batches_per_second"] = len(losses) / (time.perf_counter() - self._time)
        row["learning_rate"] = float(to_numpy(ops.convert_to_tensor(self.model.optimizer.learning_rate)))
        return row | {name: float(value) for name, value in logs.items() if name != "loss"}

    def _write_tables(self, losses: np.ndarray, row: Mapping[str, float]) -> None:
        first = self.step - len(losses) + 1
        _append(
            self.directory / "losses.csv", ["step", "loss"], [[first + i, repr(float(x))] for i, x in enumerate(losses)]
        )
        path = self.directory / "metrics.csv"
        header = ["step"]
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file), header)
        new = [name for name in row if name not in header]
        if new and len(header) > 1:  # a metric that comes later: every row gets its column
            with path.open(newline="", encoding="utf-8") as file:
                rows = [each + [""] * len(new) for each in list(csv.reader(file))[1:]]
            _rewrite(path, [header + new, *rows])
        _append(path, header + new, [[self.step, *(row.get(name, "") for name in [*header[1:], *new])]])
        if self._events:
            self._events.write(row, self.step)


def check_config(directory: pathlib.Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses a directory that is not new, nor of a run with this configuration; arguments are `Run`'s.

    Raises:
        ValueError: with the names that differ, or that the directory is no run's.
    """
    path = directory / "config.json"
    if path.exists():
        kept = {**defaults, **json.loads(path.read_text(encoding="utf-8"))}
        names = sorted({*kept, *config} - set(MAY_CHANGE))
        other = [name for name in names if kept.get(name) != config.get(name)]
        if other:
            said = ", ".join(f"{name}={config.get(name)!r} (was {kept.get(name)!r})" for name in other)
            raise ValueError(f"A run must go on as it began, or in another directory. Received: {said}.")
    elif directory.exists() and any(each.name != "config.tmp" for each in directory.iterdir()):
        raise ValueError(f"A run's directory must be new, empty, or a run's. Received: {directory}.")


def _step_of(path: pathlib.Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _append(path: pathlib.Path, header: list[str], rows: list[list]) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(header)
        writer.writerows(rows)


def _rewrite(path: pathlib.Path, rows: list[list[str]]) -> None:
    """Another table in the place of one that is there, whole or not at all."""
    aside = path.with_suffix(".tmp")
    with aside.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    aside.replace(path)
