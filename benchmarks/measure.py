"""Runs the cases: each system's repetitions in turn with the others', and what came out of it as JSON holds it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, weights
from benchmarks.cases import COLD, SIZES, Case, make_cases
from benchmarks.systems import SYSTEMS, Job, files_of
from benchmarks.worker import output_path
from benchmarks.workers import Pool, Worker, WorkerFailed, interleaved

REFERENCE = ("diffusers", "float32")  # whose outputs others are compared with
SETTINGS = (
    *("size", "tasks", "systems", "pixels"),
    *("repetitions", "cold_repetitions", "num_steps", "threads", "seconds"),
)
SHARE = 0.85  # of the memory that is there, for the workers
PAUSE = 0.3  # seconds after a repetition, in which the threads of a library stop waiting for work


class Measurement:
    """A run of the command.

    Args:
        options: the command line's.
        work: a folder, which keeps the model and what systems make of it.
    """

    def __init__(self, options: argparse.Namespace, work: Path):
        self.options, self.work = options, work
        self.directory = work / options.size
        shutil.rmtree(work / "outputs", ignore_errors=True)  # of an earlier run
        described = machine.describe()
        self.result: dict[str, Any] = {
            "machine": described,
            "complete": False,
            "settings": {name: getattr(options, name) for name in SETTINGS},
            "skipped": [],
            "errors": [],
            "workers": [],
            "differences": [],
            "runs": [],
        }
        self.dtypes = options.dtypes
        if "bfloat16" in self.dtypes and not (options.emulate_bfloat16 or machine.has_bfloat16(described)):
            self.dtypes = [dtype for dtype in self.dtypes if dtype != "bfloat16"] or ["float32"]
            self._skip("every system", "bfloat16", "this processor would emulate it (no avx512_bf16, no amx_bf16)")

    def run(self) -> dict[str, Any]:
        """All of it; the file is written anew after every case, so that what was measured is kept."""
        write = "import sys; from pathlib import Path; from benchmarks import weights; "
        write += "weights.write(sys.argv[1], Path(sys.argv[2]))"
        root = Path(__file__).resolve().parents[1]
        subprocess.run([sys.executable, "-c", write, self.options.size, str(self.directory)], check=True, cwd=root)
        size = SIZES[self.options.size]
        for case in make_cases(self.options.tasks, size, self.dtypes, self.options.pixels):
            begun = time.perf_counter()
            systems = self._prepared(case)
            if case.task in COLD:
                self._cold(case, systems)
            else:
                self._warm(case, systems)
            self._compare(case, systems)
            _say(f"{case.name}: {time.perf_counter() - begun:.0f} s in all")
            self.keep()
        self.result |= {"complete": True, "load_average_after": os.getloadavg()}
        self.keep()
        return self.result

    def keep(self) -> None:
        """Writes what was measured so far."""
        path = self.options.output
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".part")
        fresh.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)

    def _prepared(self, case: Case) -> list[str]:
        """The systems that can be asked, once what they make of the model is there."""
        systems = []
        for name in self.options.systems:
            reason = SYSTEMS[name].why_not(case, self.options.size)
            if reason is not None:
                self._skip(name, case.name, reason)
                continue
            place = files_of(name, self.options.size, self.work)
            if SYSTEMS[name].prepares and not place.exists():
                _say(f"{name}: makes its files of the model")
                if not self._guarded(name, case, lambda name=name, case=case: self._prepare(name, case)):
                    continue
            systems.append(name)
        return systems

    def _prepare(self, name: str, case: Case) -> None:
        pixels = case.pixels or SIZES[self.options.size].pixels
        Worker(self._job(name, Case("prepare", "float32", pixels)), self.options.timeout).whole()

    def _job(self, system: str, case: Case) -> Job:
        options = self.options
        return Job(
            system, case, self.directory, self.work, options.size, options.threads, options.num_steps, options.seconds
        )

    def _cold(self, case: Case, systems: list[str]) -> None:
        failed: set[str] = set()
        for repetition, name in interleaved(systems, self.options.cold_repetitions):
            if name in failed:
                continue
            for place in (self.directory, files_of(name, self.options.size, self.work)):
                weights.read_through(place)

            def once(repetition=repetition, name=name) -> None:
                self._ran(case, name, repetition, Worker(self._job(name, case), self.options.timeout).whole())

            if not self._guarded(name, case, once):
                failed.add(name)

    def _warm(self, case: Case, systems: list[str]) -> None:
        def start(name: str) -> Worker:
            worker = Worker(self._job(name, case), self.options.timeout)
            worker.warm_up()
            self.result["workers"].append({"case": case.name, "system": name, **worker.ready})
            return worker

        needs = {name: SIZES[self.options.size].peak_gib * SYSTEMS[name].peak for name in systems}
        pool, failed = Pool(start, SHARE * machine.available_gib(), needs), set()
        try:
            times = 1 if case.task == "scaling" else self.options.repetitions
            for repetition, name in interleaved(systems, times):

                def once(repetition=repetition, name=name) -> None:
                    self._ran(case, name, repetition, pool.worker(name).repeat())

                if name not in failed and not self._guarded(name, case, once):
                    failed.add(name)
                    pool.drop(name)
                time.sleep(PAUSE)
        finally:
            pool.close()

    def _ran(self, case: Case, system: str, repetition: int, figures: dict[str, Any]) -> None:
        self.result["runs"].append({"case": case.name, "system": system, "repetition": repetition, **figures})
        shown = " ".join(f"{name}={value:.4g}" for name, value in figures.items() if isinstance(value, int | float))
        _say(f"{case.name}: {system} {repetition}: {shown}")

    def _guarded(self, system: str, case: Case, work: Any) -> bool:
        """Whether it went well; a failure is kept by its system's name, and the run goes on."""
        try:
            work()
            return True
        except WorkerFailed as error:
            self.result["errors"].append({"system": system, "case": case.name, "error": str(error)})
            _say(f"{case.name}: {system} FAILED: {error}")
        return False

    def _skip(self, system: str, case: str, reason: str) -> None:
        self.result["skipped"].append({"system": system, "case": case, "reason": reason})
        _say(f"{case}: {system} is left out: {reason}")

    def _compare(self, case: Case, systems: Sequence[str]) -> None:
        """Keeps how far each output is from the reference's."""
        system, dtype = REFERENCE
        path = output_path(self.work, Case(case.task, dtype, case.pixels), system)
        if not path.exists():
            path = output_path(self.work, case, system)
        for name in systems:
            own = output_path(self.work, case, name)
            if path.exists() and own.exists():
                found = difference(np.load(own), np.load(path))
                self.result["differences"].append({"case": case.name, "system": name, **found})


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Of pictures the mean difference in grey levels; else the largest one over the largest magnitude."""
    if ours.shape != theirs.shape:
        return {}
    distance = np.abs(ours.astype("float64") - theirs)
    if ours.dtype == np.uint8:
        return {"grey_levels": float(distance.mean())}
    return {"relative": float(distance.max() / np.abs(theirs).max())}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
