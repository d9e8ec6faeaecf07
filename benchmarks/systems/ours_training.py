"""Training here: `DiffusionTraining` as its user compiles and fits it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import latentdiff
from benchmarks import machine
from benchmarks.cases import CAPTION_DROPOUT, LEARNING_RATE, SIZES, TRAINING
from benchmarks.systems import Job
from latentdiff.backend import keep_freed_memory
from latentdiff.data.order import Order
from latentdiff.data.steps import Steps
from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.diffusion.schedule import scaled_linear_schedule
from latentdiff.training import DiffusionTraining

LENGTH = 77
STEPS, EPOCHS = 5, 3  # of a `fit`


class Batches(Steps):
    """The same batch again and again.

    Args:
        batch: {name: array (B, ...)}.
        steps: of an epoch.
    """

    def __init__(self, batch: dict[str, np.ndarray], steps: int):
        count = len(batch["latent"])
        super().__init__(Order(np.zeros(steps * count, "int64"), count, seed=0), steps=steps)
        self.batch = batch

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        return self.batch


class Watch(keras.callbacks.Callback):
    """The seconds of each step, its batch included; like `Run`, it has freed memory kept."""

    def __init__(self):
        super().__init__()
        self.steps: list[dict[str, float]] = []

    def on_train_batch_begin(self, batch, logs=None):
        if not self.steps:
            keep_freed_memory()
        self._cpu, self._wall = machine.cpu_seconds(), time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        np.asarray(logs["loss"])  # a GPU's step is over when its loss is there
        wall, cpu = time.perf_counter() - self._wall, machine.cpu_seconds() - self._cpu
        self.steps.append({"wall_s": wall, "cpu_s": cpu})


def step(job: Job) -> Callable[[], dict[str, float]]:
    """A function that fits an epoch and gives the mean seconds of a step, after the first."""
    fit = fitting(job, epochs=1)

    def run() -> dict[str, float]:
        _, steps = fit()
        return {clock: statistics.fmean(each[clock] for each in steps[1:]) for clock in ("wall_s", "cpu_s")}

    return run


def overhead(job: Job) -> Callable[[], dict[str, float]]:
    """A function that fits some epochs and gives the seconds beyond their steps, of one epoch."""
    fit = fitting(job, EPOCHS)

    def run() -> dict[str, float]:
        whole, steps = fit()
        return {"wall_s": (whole - sum(each["wall_s"] for each in steps)) / EPOCHS}

    return run


def fitting(job: Job, epochs: int) -> Callable[[], tuple[float, list[dict[str, float]]]]:
    """A function that fits and gives the seconds of it, and those of each step; it is traced and warm."""
    model, batch = _model(job)

    def fit() -> tuple[float, list[dict[str, float]]]:
        watch = Watch()
        begun = time.perf_counter()
        model.fit(Batches(batch, STEPS), epochs=epochs, shuffle=False, verbose=0, callbacks=[watch])
        return time.perf_counter() - begun, watch.steps

    fit()
    return fit


def _model(job: Job) -> tuple[DiffusionTraining, dict[str, np.ndarray]]:
    """What is trained, compiled; and a batch of it."""
    size = SIZES[job.size]
    config: dict[str, Any] = TRAINING[size.training]
    keras.utils.set_random_seed(0)
    dtype = "mixed_bfloat16" if job.case.dtype == "bfloat16" else job.case.dtype
    unet = latentdiff.UNet(**config, blocks_per_level=1, dtype=dtype)
    shape = (LENGTH, config["context_dim"])
    diffusion = GaussianDiffusion(scaled_linear_schedule(1000, 0.00085, 0.012), "eps")
    model = DiffusionTraining(unet, None, diffusion, np.zeros(shape, "float32"), CAPTION_DROPOUT)
    optimizer = keras.optimizers.AdamW(LEARNING_RATE)
    model.compile(optimizer=optimizer)
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((size.batch, size.latent, size.latent, 4)).astype("float32")
    return model, {"latent": latent, "context": rng.standard_normal((size.batch, *shape)).astype("float32")}
