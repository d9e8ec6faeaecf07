"""Latency and throughput of an exported model against the size of a batch, next to `generate` in Python.

usage: python -m benchmarks.serving --repetitions 5 --output benchmarks/results/serving.json

Both run in this process, on the same threads and weights, in turn: Python first and the SavedModel's `generate` second
in one repetition, the other way round in the next. The ratio is the median of the repetitions' own ratios, so that what
slows the machine for a while slows both. The SavedModel's answer includes its PNG files, Python's is an array.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine

PROMPT = "a red heart, noto style"
WAYS = ("python", "saved_model")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="emoji")
    add("--model", type=Path, help="a version that `latentdiff export` wrote of the same preset; default: a new one")
    add("--dtype", default="float32", help="of a new export, and of Python")
    add("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--num-steps", type=int, default=25)
    add("--guidance-scale", type=float, default=5.0)
    add("--repetitions", type=int, default=5)
    add("--output", type=Path, help="of every single run, as JSON; default: none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(table(result))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every run, with the machine that they ran on."""
    import numpy as np
    import tensorflow as tf

    import latentdiff as ld
    from latentdiff.export import export_saved_model

    pipe = ld.TextToImage.from_preset(options.preset, dtype=options.dtype)
    model = options.model
    if model is None:
        model = folder / "1"
        export_saved_model(
            pipe, model, max_batch=max(options.batch_sizes), max_steps=options.num_steps, num_steps=options.num_steps
        )
    signature = tf.saved_model.load(str(model)).signatures["generate"]

    def python(size: int) -> Any:
        return pipe.generate(
            PROMPT,
            num_images=size,
            num_steps=options.num_steps,
            guidance_scale=options.guidance_scale,
            seed=0,
            progress=False,
        )

    def saved_model(size: int) -> Any:
        return signature(
            prompt=tf.constant([PROMPT]),
            negative_prompt=tf.constant([""]),
            seed=tf.range(size, dtype=tf.int64),
            num_steps=tf.constant([options.num_steps]),
            guidance_scale=tf.constant([options.guidance_scale]),
            sampler=tf.constant([pipe.settings.sampler]),
        )["image_bytes"].numpy()

    ways = {"python": python, "saved_model": saved_model}
    found = machine.describe()
    runs, differences = [], {}
    for size in options.batch_sizes:
        # The first call of a size is traced and warms up; its pictures are compared.
        images, files = python(size), saved_model(size)
        served = np.stack([tf.io.decode_png(file).numpy() for file in files])
        differences[size] = int(np.abs(served.astype(int) - images).max())
    for repetition in range(options.repetitions):
        for size in options.batch_sizes:
            for way in WAYS if repetition % 2 == 0 else WAYS[::-1]:
                _, seconds = machine.timed(lambda way=way, size=size: ways[way](size))
                runs.append({"repetition": repetition, "batch_size": size, "way": way, **seconds})
    return {
        "machine": found,
        "load_average_after": machine.describe()["load_average"],
        "settings": {
            "preset": options.preset,
            "dtype": pipe.dtype,
            "num_steps": options.num_steps,
            "guidance_scale": options.guidance_scale,
            "sampler": pipe.settings.sampler,
        },
        "grey_levels": differences,
        "summary": summary(runs),
        "runs": runs,
    }


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each batch size the medians of both ways, in seconds, and of the ratio of saved_model to python."""
    rows = []
    for size in sorted({run["batch_size"] for run in runs}):
        row: dict[str, Any] = {"batch_size": size}
        for clock in ("wall_s", "cpu_s"):
            seconds = {
                way: [run[clock] for run in runs if run["batch_size"] == size and run["way"] == way] for way in WAYS
            }
            ratios = [s / p for p, s in zip(seconds["python"], seconds["saved_model"], strict=True)]
            row[clock] = {
                **{way: statistics.median(seconds[way]) for way in WAYS},
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
        row["pictures_per_second"] = {way: size / row["wall_s"][way] for way in WAYS}
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """The summary in Markdown."""
    settings = result["settings"]
    lines = [
        f"{settings['preset']}, {settings['dtype']}, {settings['num_steps']} steps, guidance "
        f"{settings['guidance_scale']:g}; {result['machine']['processor']}, {result['machine']['cores']} cores",
        "",
        "| batch | Python, s | SavedModel, s | ratio | CPU s, Python | SavedModel | ratio | pictures/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["summary"]:
        wall, cpu = row["wall_s"], row["cpu_s"]
        lines.append(
            f"| {row['batch_size']} | {wall['python']:.2f} | {wall['saved_model']:.2f} | {wall['ratio']:.3f} "
            f"| {cpu['python']:.2f} | {cpu['saved_model']:.2f} | {cpu['ratio']:.3f} "
            f"| {row['pictures_per_second']['saved_model']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
