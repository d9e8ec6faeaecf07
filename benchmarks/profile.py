"""Where the time of our own goes on a CPU: the seconds of each kind of TensorFlow's operations, within one call.

    python -m benchmarks.profile --tasks unet decode train --dtype bfloat16

Operations run beside one another on several threads, so that the seconds of all of them are more than the call's own.
`results/profile-DTYPE.json` holds what came out of all tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine, weights
from benchmarks.cases import DTYPES, SIZES, Case
from benchmarks.systems import Job

RESULTS = Path(__file__).parent / "results"
TASKS = ("unet", "decode", "train")
CALLS = 5
# Words in an operation's name, the first of which decides.
KINDS = {
    "BatchMatMul": "attention's products",
    "MatMul": "products of matrices",
    "Softmax": "softmax",
    "Conv2D": "convolutions",
    "ExecuteAsyncOnStream": "passes of XLA",
}
REST = "everything else"


def measure(task: str, job: Job) -> dict[str, Any]:
    """The seconds of one call, and those of each kind of operation and of the longest of the rest."""
    import tensorflow as tf

    call, steps = _call(task, job)
    call()
    _, took = machine.timed(lambda: [call() for _ in range(CALLS)])
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(CALLS):
            call()
        tf.profiler.experimental.stop()
        found = operations(Path(folder))
    each = {name: seconds / CALLS / steps for name, seconds in found.most_common()}
    kinds: Counter[str] = Counter()
    for name, seconds in each.items():
        kinds[kind_of(name)] += seconds
    rest = {name: round(seconds, 4) for name, seconds in each.items() if kind_of(name) == REST and seconds >= 0.01}
    return {
        "wall_s": took["wall_s"] / CALLS / steps,
        "kinds": {kind: round(seconds, 4) for kind, seconds in kinds.most_common()},
        "rest": rest,
    }


def _call(task: str, job: Job) -> tuple[Callable[[], Any], int]:
    """A function that computes, and how many of what is measured it makes."""
    if task == "train":
        from benchmarks.systems import ours_training

        return ours_training.fitting(job, epochs=1), ours_training.STEPS
    from benchmarks.systems.ours import Asker

    return getattr(Asker(job), task)(), 1


def operations(folder: Path) -> Counter[str]:
    """The seconds of each type of operation in what TensorFlow's profiler has written."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    seconds: Counter[str] = Counter()
    for path in folder.rglob("*.xplane.pb"):
        space = xplane_pb2.XSpace()
        space.ParseFromString(path.read_bytes())
        for plane in space.planes:
            for line in plane.lines:
                for event in line.events:
                    said = plane.event_metadata[event.metadata_id].name
                    # "unet/conv_in/Conv2D:Conv2D" is an operation; of functions in C++ XLA's launch alone counts.
                    if re.fullmatch(r"[^:]+:\w+|.*::ExecuteAsyncOnStream", said):
                        seconds[said.rpartition(":")[2]] += event.duration_ps / 1e12
    return seconds


def kind_of(operation: str) -> str:
    """One of `KINDS`, or the rest."""
    return next((kind for word, kind in KINDS.items() if word in operation), REST)


def table(task: str, found: dict[str, Any]) -> str:
    """Lines to be read."""
    lines = [f"{task}: {found['wall_s']:.2f} s; seconds of operations:"]
    lines += [f"  {kind:24s}{seconds:8.3f}" for kind, seconds in found["kinds"].items()]
    return "\n".join([*lines, "  of the rest: " + ", ".join(f"{name} {s:.3f}" for name, s in found["rest"].items())])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="sd15", help="of the model; default: sd15")
    parser.add_argument("--pixels", type=int, help="height and width of the picture; default: the size's own")
    parser.add_argument("--work", type=Path, help="a folder that keeps the model; default: one that is removed")
    parser.add_argument("--output", type=Path, help="JSON; default: profile-DTYPE.json in benchmarks/results/")
    options = parser.parse_args()
    if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
        parser.error("KERAS_BACKEND must be tensorflow, whose operations are profiled.")
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        directory = work / options.size
        weights.write(options.size, directory)
        pixels, threads = options.pixels or SIZES[options.size].pixels, len(os.sched_getaffinity(0))
        found = {"machine": machine.describe(), "size": options.size, "pixels": pixels, "threads": threads}
        for task in options.tasks:
            case = Case(task, options.dtype, None if task == "train" else pixels)
            found[task] = measure(task, Job("latentdiff", case, directory, work, options.size, threads, 1, 1.0))
            print(table(task, found[task]), flush=True)
    whole = set(options.tasks) == set(TASKS) and options.size == "sd15" and options.pixels is None
    output = options.output or (RESULTS / f"profile-{options.dtype}.json" if whole else None)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
