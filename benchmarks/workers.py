"""The processes of the systems, as the command sees them: started, asked for one repetition, and ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.systems import SYSTEMS, Job

LOG_LINES = 3


class WorkerFailed(Exception):
    """A worker's process ended, or said that it failed."""


class Worker:
    """One process of one system.

    Args:
        job: what it does.
        timeout: seconds that an answer may take.

    Attributes:
        ready: what it said when it was warm.
    """

    def __init__(self, job: Job, timeout: float):
        self.job, self.timeout, self.begun = job, timeout, time.perf_counter()
        self.log = job.work / f"{job.system}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(job.threads, SYSTEMS[job.system].backend),
                cwd=Path(__file__).resolve().parents[1],
            )
        self.ready: dict[str, Any] = {}
        told = {**asdict(job), "directory": str(job.directory), "work": str(job.work)}
        self._tell(told)

    def warm_up(self) -> None:
        """Waits until it is."""
        self.ready = self._answer("ready")

    def repeat(self) -> dict[str, Any]:
        """The figures of one repetition."""
        self._tell({"repeat": True})
        return self._answer("figures")

    def whole(self) -> dict[str, float]:
        """The figures of a cold job, from its process' beginning to the end; `done_s` is when it said it was done."""
        self._answer("done")
        done = time.perf_counter() - self.begun
        alarm = threading.Timer(self.timeout, self.process.kill)
        alarm.start()
        _, status, used = os.wait4(self.process.pid, 0)
        alarm.cancel()
        self.process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - self.begun
        self.end()
        if self.process.returncode != 0:
            raise WorkerFailed(f"its process was done, and ended with {self.process.returncode}")
        return {
            "wall_s": wall,
            "done_s": done,
            "cpu_s": used.ru_utime + used.ru_stime,
            "peak_gib": used.ru_maxrss / 2**20,
        }

    def end(self) -> None:
        """Ends the process, by force where it does not end by itself."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _tell(self, line: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            print(json.dumps(line), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended, which its answer tells

    def _answer(self, kind: str) -> dict[str, Any]:
        """What it says of a kind.

        Raises:
            WorkerFailed: it says that it failed, or ends, or takes too long.
        """
        assert self.process.stdout is not None
        alarm = threading.Timer(self.timeout, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        late = not alarm.is_alive()
        alarm.cancel()
        said = json.loads(line) if line else {}
        if kind in said:
            return said[kind]
        self.end()
        log = " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:])
        ended = f"no answer in {self.timeout:g} s" if late else f"its process ended with {self.process.returncode}"
        raise WorkerFailed(said.get("error") or f"{ended}: {log}")


def environment(threads: int, backend: str = "tensorflow") -> dict[str, str]:
    """The environment's variables of a worker: Keras' backend, and the same number of threads for every library."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, "KERAS_BACKEND": backend, **quiet, **{name: str(threads) for name in names}}


class Pool:
    """Workers that idle until they are asked, as many as memory holds; the one asked longest ago makes room.

    Args:
        start: makes the warm worker of a system.
        budget: GiB for all of them.
        needs: GiB of each system's worker, before it is known better.
    """

    def __init__(self, start: Callable[[str], Worker], budget: float, needs: dict[str, float]):
        self.start, self.budget, self.needs = start, budget, dict(needs)
        self.alive: dict[str, Worker] = {}  # the one asked longest ago first

    def worker(self, system: str) -> Worker:
        """The system's worker, started anew where it had to make room."""
        found = self.alive.pop(system, None)
        if found is None:
            while self.alive and sum(self.needs[name] for name in (*self.alive, system)) > self.budget:
                self.drop(next(iter(self.alive)))
            found = self.start(system)
            self.needs[system] = found.ready["peak_gib"]
        self.alive[system] = found
        return found

    def drop(self, system: str) -> None:
        """Ends a system's worker, where it is alive."""
        worker = self.alive.pop(system, None)
        if worker is not None:
            worker.end()

    def close(self) -> None:
        """Ends them all."""
        for system in list(self.alive):
            self.drop(system)


def interleaved(systems: Sequence[str], repetitions: int) -> Iterator[tuple[int, str]]:
    """(repetition, system): each system once in every repetition, there and back again.

    So no system always follows the same other one, and those that ran last are asked next, while they are alive.
    """
    for repetition in range(repetitions):
        for system in systems if repetition % 2 == 0 else systems[::-1]:
            yield repetition, system
