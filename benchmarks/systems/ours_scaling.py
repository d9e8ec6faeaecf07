"""Laws of our own: time is linear in pictures and in steps, nothing is traced twice, and memory does not grow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from benchmarks import machine
from benchmarks.cases import GUIDANCE_SCALE, PROMPT, SIZES
from benchmarks.systems import Job

BATCHES = (1, 2, 3, 4)
STEPS = (1, 2, 3, 4)
CALLS, SETTLED = 200, 150  # calls in which memory may not grow, after those in which it settles


def laws(job: Job, pipe: Any) -> Callable[[], dict[str, Any]]:
    """A function that gives {"batch": {B: seconds}, "steps": {n: seconds}, "traces", "growth_mib"}."""
    pixels, small = job.case.pixels or SIZES[job.size].pixels, SIZES[job.size].leak_pixels

    def latents(size: int, num_images: int, num_steps: int, seed: int = 0) -> float:
        begun = time.perf_counter()
        pipe.generate(
            PROMPT, num_images=num_images, num_steps=num_steps, guidance_scale=GUIDANCE_SCALE + 0.01 * seed, seed=seed,
            height=size, width=size, progress=False, output="latent",
        )  # fmt: skip
        return time.perf_counter() - begun

    def measured() -> dict[str, Any]:
        traced = pipe.traces
        batch = dict.fromkeys(BATCHES, math.inf)
        steps = dict.fromkeys(STEPS, math.inf)
        # Up and down again, so that what slows the machine for a while bends no line.
        for count in (*BATCHES, *BATCHES[::-1]):
            batch[count] = min(batch[count], latents(pixels, count, 1))
        for count in (*STEPS, *STEPS[::-1]):
            steps[count] = min(steps[count], latents(pixels, 1, count))
        for call in range(SETTLED):
            latents(small, 1, 1 + call % 3, seed=call)
        before = machine.memory_mib()
        for call in range(CALLS):
            latents(small, 1, 1 + call % 3, seed=call)
        return {
            "batch": batch,
            "steps": steps,
            "traces": pipe.traces - traced,
            "growth_mib": machine.memory_mib() - before,
        }

    for size, count in ((small, 1), *((pixels, each) for each in BATCHES)):
        latents(size, count, 1)  # each shape is traced once
    return measured
