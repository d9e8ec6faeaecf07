"""Where the time of our own goes on a CPU: the seconds of each kind of TensorFlow's operations, within one call.

Beside it the least that its products could take: their multiply-adds, at the rate of one large product of matrices.

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
LARGE = 4096  # rows and columns of the product that the rate is taken of
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

    from benchmarks.systems.ours import Asker

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
    floor = {} if task == "train" else {"floor": least(getattr(Asker(job), f"{task}_and_arrays")(), job.case.dtype)}
    return {
        "wall_s": took["wall_s"] / CALLS / steps,
        "kinds": {kind: round(seconds, 4) for kind, seconds in kinds.most_common()},
        "rest": rest,
        **floor,
    }


def least(work: tuple[Callable, list[Any], list[Any]], dtype: str) -> dict[str, float]:
    """The multiply-adds of a function's products, their rate a second in a large product, and the seconds of both."""
    import tensorflow as tf

    function, _, arrays = work
    specs = [tf.TensorSpec(array.shape, array.dtype) for array in arrays]
    count = multiply_adds(tf.function(function, autograph=False).get_concrete_function(*specs).graph)
    large = tf.ones((LARGE, LARGE), dtype)
    product = tf.function(tf.matmul, autograph=False)
    product(large, large)
    took = min(machine.timed(lambda: product(large, large))[1]["wall_s"] for _ in range(CALLS))
    rate = LARGE**3 / took
    return {"multiply_adds": count, "multiply_adds_per_s": rate, "seconds": count / rate}


def multiply_adds(graph: Any) -> int:
    """Of all products in a graph whose shapes are known."""
    found = 0
    for operation in graph.get_operations():
        if operation.type in ("Conv2D", "MatMul", "BatchMatMulV2"):
            taken, factor = (tensor.shape.as_list() for tensor in operation.inputs)
            inner = factor[0] * factor[1] * factor[2] if operation.type == "Conv2D" else taken[-1]
            found += operation.outputs[0].shape.num_elements() * inner
    return found


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
    if floor := found.get("floor"):
        said = "{:.3f} T multiply-adds at {:.3f} T a second".format(*(floor[n] / 1e12 for n in list(floor)[:2]))
        lines.append(f"  all products as one large one: {floor['seconds']:.3f} s ({said})")
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
