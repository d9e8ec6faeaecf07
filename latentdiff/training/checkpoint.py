"""Callbacks that keep a run: its state in a file, its memory in the process."""

import os
import pathlib
import tempfile
from typing import Any

import keras
import numpy as np

from latentdiff.backend import keep_freed_memory, to_numpy


class Checkpoint(keras.callbacks.Callback):
    """Keeps a run's last state in one file, written aside and renamed, so that a killed run goes on from there.

    Args:
        path: an `.npz` file; holds weights, optimizer, seeds and the step, never code.
        every: steps between two writings; the end of training is written too.
    """

    def __init__(self, path: str | pathlib.Path, every: int):
        super().__init__()
        self.path, self.every = pathlib.Path(path), every
        self.last = -1

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        if step // self.every != self.last:
            if self.last >= 0:
                self.save()
            self.last = step // self.every

    def on_train_end(self, logs=None):
        self.save()

    def save(self) -> None:
        """Writes the state as it is now."""
        arrays: dict[str, Any] = {f"{i}": to_numpy(v) for i, v in enumerate(self._variables())}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".tmp", delete=False) as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path)

    def restore(self, model: keras.Model) -> int:
        """Puts the kept state into a compiled model and says at which step it was; 0 where nothing was kept.

        Raises:
            ValueError: the file's arrays are not this model's.
        """
        if not self.path.exists():
            return 0
        self.set_model(model)
        model.optimizer.build(model.trainable_variables)
        variables = self._variables()
        with np.load(self.path, allow_pickle=False) as arrays:
            shapes = [arrays[f"{i}"].shape for i in range(len(arrays.files))]
            if shapes != [tuple(v.shape) for v in variables]:
                raise ValueError(f"A checkpoint must hold the variables of this run. Received: {self.path}.")
            for i, variable in enumerate(variables):
                variable.assign(arrays[f"{i}"])
        return int(model.optimizer.iterations)

    def _variables(self) -> list:
        return [*self.model.variables, *self.model.optimizer.variables]


class KeepFreedMemory(keras.callbacks.Callback):
    """Spares a CPU the fetching of memory that a training step gives back and wants again; see `keep_freed_memory`."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            keep_freed_memory()
