"""This package, on Keras' own networks or on another engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

import latentdiff
from benchmarks import machine, weights
from benchmarks.cases import GUIDANCE_SCALE, PROMPT
from benchmarks.systems import Job, Measured
from latentdiff.backend import Compiled, to_numpy
from latentdiff.engine import freeable


class Asker:
    """See `systems.System`.

    Args:
        job: what to do.
        engine: of `from_preset`.
    """

    def __init__(self, job: Job, engine: str = "keras"):
        self.job, self.engine, self.dtype = job, engine, job.case.dtype

    def unet(self) -> Callable[[], np.ndarray] | Measured:
        """Gives the prediction (2, h, w, c); on another engine the seconds of a guided step within `generate`."""
        if self.engine != "keras":
            return self._step()
        return self.called(*self.unet_and_arrays())

    def unet_and_arrays(self) -> tuple[Callable, list[Any], list[np.ndarray]]:
        """A function of arrays, the networks in it, and the arrays."""
        unet = latentdiff.UNet.from_preset(self.job.directory, dtype=self.dtype)
        given = weights.inputs(self.job.directory, self.job.case.pixels)

        def network(latent, timestep, context):
            return unet({"latent": latent, "timestep": timestep, "context": context}, training=False)

        return network, [unet], [np.concatenate([given["latent"]] * 2), given["timestep"], given["context"]]

    def _step(self) -> Measured:
        pipe, times = self._load(), []

        def measured(steps: int) -> dict[str, float]:
            times.clear()
            clocks = (time.perf_counter, machine.cpu_seconds)
            self._generate(
                pipe, 1 + steps, output="latent", callback=lambda row, latent: times.append([c() for c in clocks])
            )
            wall, cpu = ((last - first) / steps for first, last in zip(times[0], times[-1], strict=True))
            return {"wall_s": wall, "cpu_s": cpu}

        steps = max(1, math.ceil(self.job.seconds / measured(1)["wall_s"]))
        return Measured(lambda: measured(steps))

    def text(self) -> Callable[[], np.ndarray]:
        """Gives the context (1, S, D)."""
        encoder = latentdiff.CLIPTextEncoder.from_preset(self.job.directory, dtype=self.dtype)
        tokens = weights.inputs(self.job.directory)["tokens"]
        run = Compiled(lambda tokens: encoder(tokens, training=False), [encoder])
        return lambda: to_numpy(run(tokens), "float32")

    def decode(self) -> Callable[[], np.ndarray]:
        """Gives the image (1, H, W, 3)."""
        return self.called(*self.decode_and_arrays())

    def decode_and_arrays(self) -> tuple[Callable, list[Any], list[np.ndarray]]:
        """As `unet_and_arrays`."""
        autoencoder = latentdiff.Autoencoder.from_preset(self.job.directory, dtype=self.dtype)
        return autoencoder.decode, [autoencoder], [weights.inputs(self.job.directory, self.job.case.pixels)["latent"]]

    @staticmethod
    def called(function: Callable, models: list[Any], arrays: list[np.ndarray]) -> Callable[[], np.ndarray]:
        """A compiled function, which gives an array."""
        run = Compiled(function, models)
        return lambda: to_numpy(run(*arrays), "float32")

    def generate(self, path: Path) -> np.ndarray:
        """Writes a picture, uint8 (H, W, 3), and gives it; networks are freed after their use, as by the command."""
        from PIL import Image

        (image,) = self._generate(self._load(freeable(self.engine)), self.job.num_steps)
        Image.fromarray(image).save(path)
        return image

    def start(self) -> None:
        """Loads, and makes the first step."""
        self._generate(self._load(), 1, output="latent")

    def train(self) -> Measured:
        """A step's seconds."""
        from benchmarks.systems import ours_training

        return Measured(ours_training.step(self.job))

    def fit(self) -> Measured:
        """An epoch's seconds beyond its steps."""
        from benchmarks.systems import ours_training

        return Measured(ours_training.overhead(self.job))

    def scaling(self) -> Measured:
        """Times by batch size and number of steps, traces and memory."""
        from benchmarks.systems import ours_scaling

        return Measured(ours_scaling.laws(self.job, self._load()))

    def _load(self, free: Collection[str] = ()):
        return latentdiff.TextToImage.from_preset(self.job.directory, dtype=self.dtype, engine=self.engine, free=free)

    def _generate(self, pipe, num_steps: int, **choices: Any) -> np.ndarray:
        pixels = self.job.case.pixels
        noise = weights.inputs(self.job.directory, pixels)["latent"]
        return pipe.generate(
            PROMPT, num_steps=num_steps, guidance_scale=GUIDANCE_SCALE, height=pixels, width=pixels, noise=noise,
            progress=False, **choices,
        )  # fmt: skip
