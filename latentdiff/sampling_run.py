"""One batch on its way through the sampler: a Python loop over a table's rows, with progress, previews and cancelling.

On a GPU, where nobody looks on, the loop is within one compiled function.

Deep features of the UNet that are shared between rows: Ma et al. 2023, arXiv:2312.00858.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from latentdiff.backend import to_numpy
from latentdiff.diffusion.noise import split_seeds
from latentdiff.diffusion.samplers import SamplerTable, initial_state

if TYPE_CHECKING:
    from latentdiff.pipeline import TextToImage


class ProgressBar:
    """Keras' progress bar, on standard error: standard output is the program's own.

    Args:
        steps: how many `add` there will be.
    """

    def __init__(self, steps: int):
        with contextlib.redirect_stdout(sys.stderr):
            self.bar = keras.utils.Progbar(steps, unit_name="step")

    def add(self) -> None:
        """One more step is done."""
        with contextlib.redirect_stdout(sys.stderr):
            self.bar.add(1)


class SamplingRun:
    """One batch on its way through the sampler.

    Args:
        pipeline: whose compiled functions are called.
        table: of R rows.
        clip: of x0, as the sampler's settings have it.
        seeds: one for each of the B images.
        noise: (1 or 1 + R, B, h, w, c) in place of the seeds', or None.
        shape: (h, w, c) of a latent.
    """

    def __init__(
        self,
        pipeline: TextToImage,
        table: SamplerTable,
        clip: float | None,
        seeds: list[int],
        noise: np.ndarray | None,
        shape: tuple[int, int, int],
    ):
        self.pipeline, self.table, self.clip, self.shape = pipeline, table, clip, shape
        self.seeds, self.noise = split_seeds(seeds), noise
        self.like = np.zeros(shape, "float32")
        self.no_noise = ops.zeros((len(seeds), *shape), "float32")

    def guide(self, scale: float, rescale: float, interval: tuple[float, float] | None) -> None:
        """Settles how each row is guided."""
        self.scale, self.rescale = np.float32(scale), np.float32(rescale)
        low, high = (0.0, np.inf) if interval is None else interval
        signal, noise = self.table.signal, self.table.noise
        with np.errstate(divide="ignore"):
            ratio = noise / signal
        self.guided = (scale != 1) & (low <= ratio) & (ratio <= high)  # (R,)

    def encode(self, tokens: np.ndarray, negative_tokens: np.ndarray) -> None:
        """Makes the contexts, (B, S, D) with the prompt and (2 B, S, D) without and with it; equal tokens once."""
        self.context = self._context(tokens)
        self.both = self.context
        if self.guided[: self.table.num_rows].any():
            self.both = ops.concatenate([self._context(negative_tokens), self.context], axis=0)

    def _context(self, tokens: np.ndarray):
        # One prompt at a time: its context does not depend on those beside it, and no number of them is traced anew.
        rows, places = np.unique(tokens, axis=0, return_inverse=True)
        contexts = ops.concatenate([self.pipeline._encode(row[None]) for row in rows], axis=0)
        return ops.take(contexts, places.reshape(-1), axis=0)

    def loop(
        self,
        bar: ProgressBar | None,
        callback: Callable[[int, np.ndarray], bool | None] | None,
        cache_interval: int = 1,
        under_way: Callable[[], object] = lambda: None,
    ) -> tuple[Any, bool]:
        """The latent after the last row, and whether the run was not stopped; `under_way` is called after the first."""
        table = self.table
        state = initial_state(self.fresh(0) * table.initial_scale)
        if callback is None and cache_interval == 1 and self._may_loop_inside():
            latent = to_numpy(self._inside(state)[0], "float32")  # JAX goes on before it is computed
            if bar is not None:
                for _ in range(table.num_rows):
                    bar.add()
            return latent, True
        whole = whole_rows(self.guided[: table.num_rows], cache_interval)
        features = ()
        for i in range(table.num_rows):
            fresh = self.fresh(i + 1) if table.needs_noise else self.no_noise
            guided = bool(self.guided[i])
            context = self.both if guided else self.context
            timestep, signal, noise = (np.float32(a[i]) for a in (table.timestep, table.signal, table.noise))
            if cache_interval > 1 and whole[i]:
                features = (self.pipeline._features(state, context, timestep),)
            state = self.pipeline.step_function(guided, self.clip, cache_interval > 1)(
                state, context, timestep, signal, noise, table.matrix[i].astype("float32"), fresh,
                self.scale, self.rescale, *features,
            )  # fmt: skip
            if i == 0:
                under_way()
            if bar is not None:
                bar.add()
            if callback is not None:
                wish = callback(i + 1, to_numpy(state[0], "float32"))
                if wish is not None and not wish:
                    return state[0], False
        return state[0], True

    def _may_loop_inside(self) -> bool:
        """Whether that is wished for and the rows differ in their numbers alone: in guidance not, nor in the noise."""
        if not self.pipeline.loops_inside or self.pipeline.engine != "keras":
            return False
        guided = self.guided[: self.table.num_rows]
        return (self.noise is None or len(self.noise) == 1) and guided.all() == guided.any()

    def _inside(self, state):
        """The last state, of a loop within the compiled function."""
        table, guided = self.table, bool(self.guided[0])
        columns = (column.astype("float32") for column in (table.timestep, table.signal, table.noise, table.matrix))
        run = self.pipeline.loop_function(guided, self.clip)
        context = self.both if guided else self.context
        return run(state, context, self.seeds, np.int32(table.num_rows), *columns, self.scale, self.rescale)

    def fresh(self, k: int):
        """The noise of row k - 1, or for k = 0 the initial noise: (B, h, w, c)."""
        if self.noise is not None and k < len(self.noise):
            return ops.convert_to_tensor(self.noise[k])
        return self.pipeline._normal(self.seeds, np.int32(k), self.like)


def whole_rows(guided: np.ndarray, cache_interval: int) -> np.ndarray:
    """Which rows compute the whole UNet; those between take the deep features of the last one that did.

    Args:
        guided: bool (R,), of each row. Guidance doubles the batch, so features do not outlast a change of it.
        cache_interval: the distance of one whole row from the next, at least 1.

    Returns:
        bool (R,).
    """
    whole = np.ones(len(guided), bool)
    last = 0
    for i in range(1, len(guided)):
        whole[i] = guided[i] != guided[i - 1] or i - last == cache_interval
        last = i if whole[i] else last
    return whole
