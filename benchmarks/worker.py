"""A system's process: does what it is told on standard input, one JSON line each, and answers on standard output.

    job                  -> {"ready": ...} once it is warm, or {"error": what}
    {"repeat": true}     -> figures of one repetition
    end of input         -> it ends

A cold job is done once, with no word after it: its process is what is timed. What libraries print goes to standard
error.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.cases import COLD, Case
from benchmarks.systems import SYSTEMS, Job, Measured

MOST_CALLS = 1000


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**said: Any) -> None:
        print(json.dumps(said), file=answers, flush=True)

    job = read_job(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):  # so that no library has more cores than the others
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    try:
        if job.case.task == "prepare" or job.case.task in COLD:
            answer(done=cold(job))
            return
        repeat = warm(job)
        answer(ready={"peak_gib": machine.peak_memory_gib(), **repeat.found})
        for _ in sys.stdin:
            answer(figures=repeat())
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise


def read_job(line: str) -> Job:
    """The job of a line that `Worker` wrote."""
    told = json.loads(line)
    paths = {name: Path(told[name]) for name in ("directory", "work")}
    return Job(**{**told, **paths, "case": Case(**told["case"])})


def cold(job: Job) -> dict[str, Any]:
    """Does a job that is done once."""
    asker = SYSTEMS[job.system].asker(job)
    if job.case.task == "generate":
        picture = asker.generate(job.work / "picture.png")
        np.save(output_path(job.work, job.case, job.system), picture)
    else:
        getattr(asker, job.case.task)()
    return {}


def warm(job: Job) -> Repeat:
    """What repeats a job, made ready: loaded, traced, and its output kept."""
    call = getattr(SYSTEMS[job.system].asker(job), job.case.task)()
    if not isinstance(call, Measured):
        said = call()
        if isinstance(said, np.ndarray):
            np.save(output_path(job.work, job.case, job.system), said)
    return Repeat(call, job.seconds)


def output_path(work: Path, case: Case, system: str) -> Path:
    """Where a system's output is kept, to be compared."""
    folder = work / "outputs"
    folder.mkdir(exist_ok=True)
    return folder / f"{case.name} {system}.npy"


class Repeat:
    """A function, called so often that it lasts a while; called once where it measures by itself.

    Attributes:
        found: how often, and the seconds of one call that told so.
    """

    def __init__(self, call: Callable[[], Any], seconds: float):
        self.call, self.calls, self.found = call, 1, {}
        if not isinstance(call, Measured):
            _, took = machine.timed(call)
            self.calls = min(MOST_CALLS, max(1, math.ceil(seconds / took["wall_s"])))
            self.found = {"calls": self.calls, "warm_s": took["wall_s"]}

    def __call__(self) -> dict[str, Any]:
        """The seconds of one call, on average; or what the function itself says."""
        if isinstance(self.call, Measured):
            return self.call()
        _, took = machine.timed(lambda: [self.call() for _ in range(self.calls)])
        return {clock: seconds / self.calls for clock, seconds in took.items()}


if __name__ == "__main__":
    main()
