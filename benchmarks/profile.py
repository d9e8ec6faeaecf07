"""Where the time of our own goes on a CPU: the seconds of each kind of TensorFlow's operations, within one call.

Beside it what its products take alone, each computed again and again with its operands in the cache, and the same
products by torch where it is installed, whose oneDNN is another version; each call's own 0.2 ms is in it, so that it
says nothing of small networks.

    python -m benchmarks.profile --tasks unet decode train --dtype bfloat16

Operations run beside one another on several threads, so that the seconds of all of them are more than the call's own.
`results/profile-DTYPE.json` holds what came out of all tasks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

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
MATRIX_OPTIONS = (("transpose_a", "adj_x"), ("transpose_b", "adj_y"))
Work = tuple[Callable, list[Any], list[Any]]  # a function of arrays, the networks in it, and the arrays


def measure(task: str, job: Job) -> dict[str, Any]:
    """The seconds of one call, and those of each kind of operation and of the longest of the rest."""
    import tensorflow as tf

    call, steps, work = _call(task, job)
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
        **({"floor": least(work)} if work else {}),
    }


def least(work: Work) -> dict[str, float]:
    """The multiply-adds of a function's products, and the seconds of the products alone, each of them by itself.

    "seconds" are TensorFlow's, "by_torch" torch's, if that is installed.
    """
    import tensorflow as tf

    function, _, arrays = work
    specs = [tf.TensorSpec(array.shape, array.dtype) for array in arrays]
    graph = tf.function(function, autograph=False).get_concrete_function(*specs).graph
    kinds: dict[tuple, list[Any]] = {}
    for operation in products(graph):
        kinds.setdefault(_kind_of_product(operation), []).append(operation)
    ways = {"seconds": in_tensorflow}
    if importlib.util.find_spec("torch"):
        ways["by_torch"] = in_torch
    seconds = {name: sum(len(equal) * _alone(equal[0], way) for equal in kinds.values()) for name, way in ways.items()}
    return {"multiply_adds": sum(map(multiply_adds, products(graph))), **seconds}


def products(graph: Any) -> list[Any]:
    """The products of matrices and the convolutions of a graph."""
    return [each for each in graph.get_operations() if each.type in ("Conv2D", "MatMul", "BatchMatMulV2")]


def multiply_adds(product: Any) -> int:
    """Of one product whose shapes are known."""
    taken, factor = (tensor.shape.as_list() for tensor in product.inputs)
    inner = factor[0] * factor[1] * factor[2] if product.type == "Conv2D" else taken[-1]
    return product.outputs[0].shape.num_elements() * inner


def _kind_of_product(product: Any) -> tuple:
    shapes = tuple(tuple(tensor.shape.as_list()) for tensor in product.inputs)
    return product.type, shapes, str(_options(product))


def _options(product: Any) -> dict[str, Any]:
    return {each.name: product.get_attr(each.name) for each in product.op_def.attr if each.type != "type"}


def _alone(product: Any, way: Callable[[Any, list[np.ndarray]], Callable[[], Any]]) -> float:
    """The fewest seconds of an operation that is computed again and again, and nothing else."""
    draw = np.random.default_rng(0).standard_normal
    compute = way(product, [draw(tensor.shape.as_list(), "float32") for tensor in product.inputs])
    compute()
    return min(machine.timed(compute)[1]["wall_s"] for _ in range(CALLS))


def in_tensorflow(product: Any, arrays: list[np.ndarray]) -> Callable[[], Any]:
    """A product of a graph, of arrays, as a function that computes it."""
    import tensorflow as tf

    names = [argument.name for argument in product.op_def.input_arg]
    operation, options = getattr(tf.raw_ops, product.type), _options(product)
    compute = tf.function(lambda *arrays: operation(**dict(zip(names, arrays, strict=True)), **options))
    tensors = [tf.cast(array, tensor.dtype) for array, tensor in zip(arrays, product.inputs, strict=True)]
    return lambda: compute(*tensors)


def in_torch(product: Any, arrays: list[np.ndarray]) -> Callable[[], Any]:
    """The same product by torch; of a convolution it gives (B, C, H, W), channels last in memory."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = getattr(torch, product.outputs[0].dtype.name)
    options = _options(product)
    x, y = (torch.from_numpy(array).to(dtype) for array in arrays)
    if product.type != "Conv2D":
        transposed = [options.get(name, options.get(other)) for name, other in MATRIX_OPTIONS]
        x, y = (z.mT if turned else z for z, turned in zip((x, y), transposed, strict=True))
        return torch.inference_mode()(lambda: x @ y)
    edge = y.shape[0] // 2 if options["padding"] == b"SAME" else 0
    stride = options["strides"][1]
    x, kernel = (
        z.contiguous(memory_format=torch.channels_last) for z in (x.permute(0, 3, 1, 2), y.permute(3, 2, 0, 1))
    )
    return torch.inference_mode()(lambda: torch.nn.functional.conv2d(x, kernel, None, stride, edge))


def _call(task: str, job: Job) -> tuple[Callable[[], Any], int, Work | None]:
    """A function that computes, how many of what is measured it makes, and of an evaluation alone what is called."""
    if task == "train":
        from benchmarks.systems import ours_training

        return ours_training.fitting(job, epochs=1), ours_training.STEPS, None
    from benchmarks.systems.ours import Asker

    asker = Asker(job)
    work = getattr(asker, f"{task}_and_arrays")()
    return asker.called(*work), 1, work


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
        count = floor["multiply_adds"] / 1e12
        theirs = f", by torch {floor['by_torch']:.3f} s" if "by_torch" in floor else ""
        lines.append(
            f"  products alone, each by itself: {floor['seconds']:.3f} s{theirs} ({count:.3f} T multiply-adds)"
        )
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
