"""Where the time of a start goes, from the import to the end of the first step, in a process that has done nothing yet.

    python -m benchmarks.start --dtype bfloat16

A second step tells what of the first is not the computation: TensorFlow's preparation of the graph, and XLA's
compilation. `results/start-DTYPE.json` holds what came out at the size of Stable Diffusion 1.5.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import machine, weights
from benchmarks.cases import DTYPES, GUIDANCE_SCALE, PROMPT, SIZES

RESULTS = Path(__file__).parent / "results"


def measure(directory: Path, dtype: str, pixels: int) -> dict[str, float]:
    """The seconds of each stage, in their order, and of the whole; `step_again_s` is no part of it."""
    clock = time.perf_counter
    began = clock()
    import keras  # noqa: F401

    keras_is_there = clock()
    import latentdiff
    from latentdiff import backend

    imported = clock()
    pipe = latentdiff.TextToImage.from_preset(directory, dtype=dtype)
    loaded = clock()
    calls: list[dict[str, float]] = []
    call, trace = backend.Compiled.__call__, backend.Compiled._traced

    def timed_call(self, *arrays):
        calls.append({"trace": 0.0, "begin": clock()})
        result = call(self, *arrays)
        backend.to_numpy(result)
        calls[-1]["end"] = clock()
        return result

    def timed_trace(self, *arrays):
        first = clock()
        result = trace(self, *arrays)
        calls[-1]["trace"] += clock() - first
        return result

    backend.Compiled.__call__, backend.Compiled._traced = timed_call, timed_trace
    try:
        pipe.generate(
            PROMPT, num_steps=2, guidance_scale=GUIDANCE_SCALE, height=pixels, width=pixels, seed=0, output="latent",
            progress=False,
        )  # fmt: skip
    finally:
        backend.Compiled.__call__, backend.Compiled._traced = call, trace
    *before, first, second = calls  # the steps are the last
    again = second["end"] - second["begin"]
    stages = {
        "import_keras_s": keras_is_there - began,
        "import_latentdiff_s": imported - keras_is_there,
        "make_and_read_s": loaded - imported,
        "text_and_noise_s": first["begin"] - loaded,
        "trace_unet_s": first["trace"],
        "prepare_and_compile_s": first["end"] - first["begin"] - first["trace"] - again,
        "step_s": again,
    }
    return {**{name: round(seconds, 3) for name, seconds in stages.items()}, "whole_s": round(first["end"] - began, 3)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="sd15", help="of the model; default: sd15")
    parser.add_argument("--work", type=Path, help="a folder that keeps the model; default: one that is removed")
    parser.add_argument("--output", type=Path, help="JSON; default: start-DTYPE.json in benchmarks/results/")
    options = parser.parse_args(arguments)
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with tempfile.TemporaryDirectory() as folder:
        directory = (options.work or Path(folder)) / options.size
        weights.write(options.size, directory)
        pixels = SIZES[options.size].pixels
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            stages = pool.submit(measure, directory, options.dtype, pixels).result()
    for name, seconds in stages.items():
        print(f"{name.removesuffix('_s').replace('_', ' '):24s}{seconds:8.2f} s")
    found = {"machine": machine.describe(), "size": options.size, "pixels": pixels, "dtype": options.dtype, **stages}
    output = options.output or (RESULTS / f"start-{options.dtype}.json" if options.size == "sd15" else None)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
