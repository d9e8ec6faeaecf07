"""Every table of several samplers in one: a graph looks up the row of any sampler, number of steps and step.

The rows of `samplers.make_table` for each sampler and each number of steps up to a limit, one after another, with the
place where each table begins. Twelve samplers of up to 50 steps take 3 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.diffusion.samplers import make_table
from latentdiff.diffusion.schedule import Schedule


@dataclass(frozen=True, eq=False)
class SamplerBook:
    """Tables of K samplers and of 1 .. M steps, as arrays.

    Attributes:
        samplers: K names.
        first: int32 (K, M + 1), where the table of a sampler and a number of steps begins; M + 1 of each sampler.
        num_rows: int32 (K, M + 1), its rows; 0 where the sampler has no table of so many steps.
        initial_scale: float32 (K, M + 1), what the initial noise is multiplied by.
        needs_noise: bool (K,), whether the sampler uses fresh noise.
        clip: float32 (K,), what x0 is clipped to; infinity where it is not.
        timestep: float32 (R,), what the network is told.
        signal: float32 (R,).
        noise: float32 (R,), the level and not the fresh noise.
        matrix: float32 (R, 4, 7).
    """

    samplers: tuple[str, ...]
    first: np.ndarray
    num_rows: np.ndarray
    initial_scale: np.ndarray
    needs_noise: np.ndarray
    clip: np.ndarray
    timestep: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    matrix: np.ndarray


def make_book(settings: SamplerSettings, schedule: Schedule, samplers: Sequence[str], max_steps: int) -> SamplerBook:
    """The book of some samplers as a model's settings have them.

    Args:
        settings: of the model; another sampler than its own is taken as `with_sampler` says.
        schedule: of the same model.
        samplers: names out of `SAMPLERS`, each once.
        max_steps: M, at most the schedule's T.

    Raises:
        ValueError: a name is unknown or there twice, none is given, or `max_steps` is out of range.
    """
    if not samplers or len(set(samplers)) != len(samplers):
        raise ValueError(f"`samplers` must be one name or more, each once. Received: samplers={list(samplers)!r}.")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or not 1 <= max_steps <= schedule.T:
        raise ValueError(f"`max_steps` must be a whole number from 1 to {schedule.T}. Received: {max_steps!r}.")
    places = (len(samplers), max_steps + 1)
    first, num_rows = np.zeros(places, "int32"), np.zeros(places, "int32")
    initial_scale = np.ones(places, "float32")
    needs_noise, clip = np.zeros(len(samplers), bool), np.full(len(samplers), np.inf, "float32")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("timestep", "signal", "noise", "matrix")}
    total = 0
    for k, name in enumerate(samplers):
        make_table(name, schedule, 1)  # names the samplers that are near, where there is none of this name
        own = settings.with_sampler(name)
        clip[k] = np.inf if own.clip is None else own.clip
        most = min(max_steps, own.original_steps) if name == "lcm" else max_steps
        for steps in range(1, most + 1):
            table = make_table(schedule=schedule, num_steps=steps, bound=2 * steps + 1, **own.table_arguments())
            first[k, steps], num_rows[k, steps] = total, table.num_rows
            initial_scale[k, steps] = table.initial_scale
            needs_noise[k] |= table.needs_noise
            for column, values in columns.items():
                values.append(getattr(table, column)[: table.num_rows])
            total += table.num_rows
    arrays = {name: np.concatenate(values).astype("float32") for name, values in columns.items()}
    return SamplerBook(tuple(samplers), first, num_rows, initial_scale, needs_noise, clip, **arrays)
