"""What is saved where the UNet is computed less, against how far the picture then is from the full one.

usage: python -m benchmarks.fewer_evaluations --output benchmarks/results/fewer_evaluations.json

Two ways to compute less: deep features that serve several steps (`cache_interval`; Ma et al. 2023, arXiv:2312.00858),
and guidance at some levels of noise alone (`guidance_interval`; Kynkaanniemi et al. 2024, arXiv:2404.07724). All runs
are in this process, on the same seeds, and each repetition goes through all of them, every other one backwards. A time
is a ratio to the full run of the same repetition, from the prompt to the decoded picture. It draws with matplotlib,
which `pip install "latentdiff[evaluate]"` brings.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.workers import interleaved

PROMPTS = (
    "a red heart, noto style",
    "a grinning cat, twemoji style",
    "a green tree, fluent style",
    "a blue car, noto style",
    "a slice of pizza, fluent style",
    "a man with a beard, twemoji style",
)
FULL = "full"
CLOCKS = {"wall_s": "time", "cpu_s": "CPU time"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fewer_evaluations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", default="emoji")
    add("--dtype", default="float32")
    add("--prompts", nargs="+", default=list(PROMPTS))
    add("--num-steps", type=int, default=25)
    add("--guidance-scale", type=float, default=5.0)
    add("--cache-intervals", type=int, nargs="+", default=[2, 3, 4, 5])
    intervals = ["0.5:inf", "1:inf", "2:inf", "4:inf", "0:20", "1:20"]
    add("--guidance-intervals", nargs="+", default=intervals, metavar="LOW:HIGH", help="levels of noise over signal")
    add("--repetitions", type=int, default=5)
    add("--clock", choices=CLOCKS, default="wall_s", help="of the plot; a busy machine's wall says nothing")
    add("--output", type=Path, help="of every single run, as JSON; default: none")
    add("--plot", type=Path, default=Path("docs/fewer_evaluations.png"))
    options = parser.parse_args()
    result, pictures = measure(options)
    print(table(result))
    plot(result, pictures, options.clock, options.plot)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def ways_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What `generate` is told, by the name of each way."""
    ways: dict[str, dict[str, Any]] = {FULL: {}}
    ways |= {f"cache {each}": {"cache_interval": each} for each in options.cache_intervals}
    for each in options.guidance_intervals:
        low, high = map(float, each.split(":"))
        ways[f"guided {low:g} .. {high:g}"] = {"guidance_interval": (low, high)}
    return ways


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Every run with the machine that they ran on, and each way's pictures, uint8 (B, H, W, 3)."""
    import latentdiff as ld

    pipe = ld.TextToImage.from_preset(options.preset, dtype=options.dtype)
    ways = ways_of(options)

    def generate(way: str) -> np.ndarray:
        return pipe.generate(
            options.prompts,
            num_steps=options.num_steps,
            guidance_scale=options.guidance_scale,
            seed=0,
            progress=False,
            **ways[way],
        )

    found, runs = machine.describe(), []
    pictures = {way: generate(way) for way in ways}  # the first call is traced
    for repetition, way in interleaved(list(ways), options.repetitions):
        _, seconds = machine.timed(lambda way=way: generate(way))
        runs.append({"repetition": repetition, "way": way, **seconds})
    result = {
        "machine": found,
        "load_average_after": machine.describe()["load_average"],
        "settings": {
            "preset": options.preset,
            "dtype": pipe.dtype,
            "prompts": options.prompts,
            "num_steps": options.num_steps,
            "guidance_scale": options.guidance_scale,
            "sampler": pipe.settings.sampler,
        },
        "summary": [{**summary(way, runs), **distance(images, pictures[FULL])} for way, images in pictures.items()],
        "runs": runs,
    }
    return result, pictures


def summary(way: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of a way's seconds, and of their ratios to the full run of the same repetition."""
    row: dict[str, Any] = {"way": way}
    for clock in CLOCKS:
        seconds, full = ({run["repetition"]: run[clock] for run in runs if run["way"] == name} for name in (way, FULL))
        ratios = [seconds[repetition] / full[repetition] for repetition in seconds]
        row[clock] = {
            "seconds": statistics.median(seconds.values()),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
    return row


def distance(images: np.ndarray, full: np.ndarray) -> dict[str, Any]:
    """How far uint8 (B, H, W, 3) are from others.

    Returns:
        `grey_levels`, the mean absolute difference; `psnr` in decibels, the mean over the pictures that differ, None
        where none does; and both of `each` picture.
    """
    difference = images.astype(float) - full
    levels = np.abs(difference).mean(axis=(1, 2, 3))  # (B,)
    squares = (difference**2).mean(axis=(1, 2, 3))  # (B,)
    psnr = [10 * math.log10(255**2 / square) if square else None for square in squares]
    finite = [each for each in psnr if each is not None]
    return {
        "grey_levels": float(levels.mean()),
        "psnr": statistics.mean(finite) if finite else None,
        "each": {"grey_levels": levels.tolist(), "psnr": psnr},
    }


def table(result: dict[str, Any]) -> str:
    """The summary in Markdown."""
    settings = result["settings"]
    lines = [
        f"{settings['preset']}, {settings['dtype']}, {settings['num_steps']} steps, guidance "
        f"{settings['guidance_scale']:g}, {len(settings['prompts'])} pictures; {result['machine']['processor']}, "
        f"{result['machine']['cores']} cores",
        "",
        "| | s | ratio | CPU s | ratio | grey levels from the full picture | PSNR, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["summary"]:
        wall, cpu = row["wall_s"], row["cpu_s"]
        psnr = "equal" if row["psnr"] is None else f"{row['psnr']:.1f}"
        lines.append(
            f"| {row['way']} | {wall['seconds']:.2f} | {wall['ratio']:.3f} | {cpu['seconds']:.2f} | {cpu['ratio']:.3f} "
            f"| {row['grey_levels']:.2f} | {psnr} |"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], pictures: dict[str, np.ndarray], clock: str, path: Path) -> None:
    """Draws both curves, of time against distance, above the pictures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5 + len(result["settings"]["prompts"])), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4, 1 + len(result["settings"]["prompts"])))
    top.suptitle("distance from the full picture")
    full, *others = result["summary"]
    for axes, (key, label) in zip(
        top.subplots(1, 2), (("grey_levels", "mean absolute grey levels"), ("psnr", "PSNR, dB")), strict=True
    ):
        for kind in ("cache", "guided"):
            rows = [row for row in others if row["way"].startswith(kind) and row[key] is not None]
            # The full picture is at distance 0, which PSNR has no number for.
            rows += [full] if kind == "cache" and key == "grey_levels" else []
            rows.sort(key=lambda row: row[clock]["ratio"])
            points = [row[clock]["ratio"] for row in rows], [row[key] for row in rows]
            axes.plot(*points, "o-" if kind == "cache" else "s", label=kind)
            for row, x, y in zip(rows, *points, strict=True):
                axes.annotate(row["way"].removeprefix(kind), (x, y), xytext=(4, 4), textcoords="offset points", size=7)
        axes.set(xlabel=f"{CLOCKS[clock]}, 1 is the full run", ylabel=label)
        axes.set_xlim(0, 1.2)
        axes.grid(alpha=0.3)
    top.axes[0].legend(labels=("deep features reused", "guidance in an interval"))
    axes = bottom.subplots()
    rows = [np.concatenate(list(images), axis=0) for images in pictures.values()]  # (B H, W, 3)
    axes.imshow(np.concatenate(rows, axis=1))
    width = rows[0].shape[1]
    axes.set_xticks([(i + 0.5) * width for i in range(len(rows))], list(pictures), size=7)
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
