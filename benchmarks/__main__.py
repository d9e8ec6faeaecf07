"""Every system side by side: latentdiff, diffusers, KerasCV, OpenVINO, with the same weights, sizes, steps and threads.

usage: python -m benchmarks --tasks unet decode --repetitions 5
       python -m benchmarks --plot benchmarks/results/peers-sd15.json docs/

Each system has processes of its own, which are asked for one repetition in turn; of a generation and a start each
repetition has a process. `make bench` runs it where the peers are installed; a system that is not is left out by its
name, and one that fails ends nothing. Every run is kept as JSON, with the machine. On one that does other work, times
mean nothing. torch.compile finds what it kept on disk from its second process on.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from benchmarks.cases import DTYPES, SIZES, TASKS
from benchmarks.systems import SYSTEMS

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    from benchmarks import plots, report

    if options.plot:
        result = json.loads(Path(options.plot[0]).read_text(encoding="utf-8"))
        options.plots = Path(options.plot[1])
    else:
        from benchmarks.measure import Measurement

        if options.work is None:
            with tempfile.TemporaryDirectory() as folder:
                result = Measurement(options, Path(folder)).run()
        else:
            options.work.mkdir(parents=True, exist_ok=True)
            result = Measurement(options, options.work).run()
    if options.plots:
        for path in plots.draw(result, options.plots):
            print(f"![{path.stem.replace('_', ' ')}]({path})")
    print(report.table(result))


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    tasks = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
    add("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), metavar="TASK", help=f"default: all. {tasks}")
    names = ", ".join(SYSTEMS)
    add("--systems", nargs="+", choices=tuple(SYSTEMS), default=list(SYSTEMS), metavar="SYSTEM", help=f"of {names}")
    add("--size", choices=tuple(SIZES), default="sd15", help="of the model; the smaller ones rehearse; default: sd15")
    add("--pixels", type=int, nargs="+", help="heights of the pictures, and widths; default: the size's own")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both, where the processor has them")
    add("--emulate-bfloat16", action="store_true", help="also where the processor must emulate it")
    add("--repetitions", type=int, default=5, help="default: 5; of the laws of scaling one")
    add("--cold-repetitions", type=int, default=3, help="of a generation and a start; default: 3")
    add("--num-steps", type=int, default=20, help="of a generation; default: 20")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every system; default: the cores")
    add("--seconds", type=float, default=1.0, help="that a repetition lasts at least, by as many calls; default: 1")
    add("--timeout", type=float, default=1800, help="seconds that a system may take to answer; default: 1800")
    add("--work", type=Path, help="a folder that keeps the models, 9 GB for sd15; default: one that is removed")
    add("--output", type=Path, help="JSON; default: peers-SIZE.json in benchmarks/results/")
    add("--plots", type=Path, metavar="FOLDER", help="where the plots of this run are drawn; default: nowhere")
    add("--plot", nargs=2, metavar=("JSON", "FOLDER"), help="draws the plots of an earlier run, and prints its table")
    options = parser.parse_args(arguments)
    for name in ("repetitions", "cold_repetitions", "num_steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1. Received: {getattr(options, name)}.")
    options.dtypes = [dtype for dtype in DTYPES if dtype in options.dtypes]
    options.output = options.output or RESULTS / f"peers-{options.size}.json"
    if options.work is not None:
        options.work = options.work.resolve()
    return options


if __name__ == "__main__":
    main()
