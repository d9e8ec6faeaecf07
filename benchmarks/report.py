"""What a run's JSON says: medians, spread, ratios to the best of diffusers, and the goals; as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.cases import SIZES, TASKS

PEER = "diffusers"  # and its variants, whose names begin so
OURS = "latentdiff"


@dataclass(frozen=True)
class Row:
    """One system in one case.

    Attributes:
        case: its name, such as "unet 512 float32"; of memory "memory 512 float32".
        system: its name.
        unit: "s", or "GiB".
        values: of the repetitions.
        ratio: of the median to the smallest median of diffusers; None where there is none.
    """

    case: str
    system: str
    unit: str
    values: tuple[float, ...]
    ratio: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """The largest value less the smallest, over the median."""
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Goal:
    """What is to be reached: a ratio to the best of diffusers, or a number.

    Attributes:
        label: what it says.
        task: of `TASKS`.
        dtype: that it holds for; None is any.
        system: whose it is.
        most: the largest ratio, or the largest number.
    """

    label: str
    task: str
    dtype: str | None
    system: str
    most: float


GOALS = (
    Goal("UNet evaluation, bfloat16", "unet", "bfloat16", OURS, 0.80),
    Goal("UNet evaluation, bfloat16, OpenVINO engine", "unet", "bfloat16", f"{OURS}-openvino", 0.66),
    Goal("UNet evaluation, float32", "unet", "float32", OURS, 0.72),
    Goal("UNet evaluation, float32, OpenVINO engine", "unet", "float32", f"{OURS}-openvino", 0.60),
    Goal("autoencoder decode", "decode", None, OURS, 0.95),
    Goal("whole generation, cold start to picture on disk", "generate", None, OURS, 0.80),
    Goal("import, load and first step", "start", None, OURS, 1.0),
    Goal("peak memory of a generation", "memory", None, OURS, 0.85),
    Goal("training step, bfloat16", "train", "bfloat16", OURS, 1.0),
    Goal("training step, float32", "train", "float32", OURS, 1.0),
)
OVERHEAD, BEND, GROWTH = 0.2, 0.05, 1.0  # seconds an epoch; of a line; MiB over all calls


def rows(result: dict[str, Any]) -> list[Row]:
    """Every system in every case, in the order in which cases were run; the laws of our own are not among them."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for run in result["runs"]:
        task, _, rest = run["case"].partition(" ")
        if task == "scaling":
            continue
        key = "done_s" if task == "start" else "wall_s"
        values.setdefault((run["case"], run["system"], "s"), []).append(run[key])
        if task == "generate":
            values.setdefault((f"memory {rest}", run["system"], "GiB"), []).append(run["peak_gib"])
    plain = [Row(case, system, unit, tuple(each)) for (case, system, unit), each in values.items()]
    best = {row.case: min(best_of(plain, row.case), default=None) for row in plain}
    return [
        Row(row.case, row.system, row.unit, row.values, None if best[row.case] is None else row.median / best[row.case])
        for row in plain
    ]


def best_of(found: Iterable[Row], case: str) -> list[float]:
    """The medians of diffusers' variants in a case."""
    return [row.median for row in found if row.case == case and row.system.startswith(PEER)]


def table(result: dict[str, Any]) -> str:
    """All rows in Markdown, with what they were measured on."""
    machine, settings = result["machine"], result["settings"]
    differences = {(each["case"], each["system"]): each for each in result["differences"]}
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [
        f"{settings['size']}; {machine['processor']}, {', '.join(machine['gpus']) or 'no GPU'}, {settings['threads']} "
        f"threads; {settings['num_steps']} steps; medians of {settings['repetitions']}, of whole processes "
        f"{settings['cold_repetitions']}; {packages}",
        "",
        "| | system | median | spread | to the best of diffusers | cpu s | distance from diffusers |",
        "|---|---|---|---|---|---|---|",
    ]
    found = rows(result)
    last = None
    for row in sorted(found, key=lambda row: (list(TASKS).index(row.case.split(" ")[0]), _first(found, row.case))):
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        if row.case.startswith("train"):
            ratio += f" ({_images(result, row):.1f} images/s)"
        cpu = _cpu(result, row)
        lines.append(
            f"| {row.case if row.case != last else ''} | {row.system} | {row.median:.3g} {row.unit} | {row.spread:.0%} "
            f"| {ratio} | {cpu} | {_distance(differences.get((row.case, row.system)))} |"
        )
        last = row.case
    lines += ["", *law_lines(result), *goal_lines(result), *left_out(result)]
    return "\n".join(lines)


def _first(found: list[Row], case: str) -> int:
    return next(i for i, row in enumerate(found) if row.case == case)


def _cpu(result: dict[str, Any], row: Row) -> str:
    cpu = [r["cpu_s"] for r in result["runs"] if (r["case"], r["system"]) == (row.case, row.system) and "cpu_s" in r]
    return f"{statistics.median(cpu):.3g}" if cpu else ""


def _images(result: dict[str, Any], row: Row) -> float:
    return SIZES[result["settings"]["size"]].batch / row.median


def _distance(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    if "grey_levels" in found:
        return f"{found['grey_levels']:.2f} grey levels"
    return f"{found['relative']:.1e}" if "relative" in found else ""


def bend(seconds: dict[str, float]) -> float:
    """The largest distance of a time from the straight line through all of them, over that line.

    Args:
        seconds: by a count, which JSON has made a string.
    """
    counts, times = np.array([float(count) for count in seconds]), np.array(list(seconds.values()))
    slope, start = np.polyfit(counts, times, 1)
    return float(np.abs(times / (slope * counts + start) - 1).max())


def law_lines(result: dict[str, Any]) -> list[str]:
    """Whether our own laws held, of each system and case that was asked for them."""
    lines = []
    for run in result["runs"]:
        if not run["case"].startswith("scaling"):
            continue
        bends = {axis: bend(run[axis]) for axis in ("batch", "steps")}
        held = max(bends.values()) <= BEND and not run["traces"] and run["growth_mib"] <= GROWTH
        lines.append(
            f"- {run['case']}, {run['system']}: time is linear in the batch within {bends['batch']:.1%}, in the steps "
            f"within {bends['steps']:.1%} (goal {BEND:.0%}); traced anew: {run['traces']}; memory grew by "
            f"{run['growth_mib']:.1f} MiB in 200 calls: {_verdict(held)}"
        )
    return lines


def goal_lines(result: dict[str, Any]) -> list[str]:
    """Each goal with what was found, for the largest pictures that were made."""
    found, lines = rows(result), []
    for goal in GOALS:
        matching = [
            row
            for row in found
            if row.system == goal.system and row.case.split(" ")[0] == goal.task and row.ratio is not None
            and (goal.dtype is None or row.case.endswith(goal.dtype))
        ]  # fmt: skip
        if not matching:
            lines.append(f"- {goal.label}: not measured, goal {goal.most:.2f}")
        for row in _largest(matching):
            assert row.ratio is not None
            lines.append(
                f"- {goal.label} ({row.case}): {row.ratio:.2f} of the best of diffusers, goal {goal.most:.2f}: "
                f"{_verdict(row.ratio <= goal.most)}"
            )
    for row in found:
        if row.case.startswith("fit"):
            met = _verdict(row.median < OVERHEAD)
            lines.append(f"- what `fit` adds to an epoch ({row.case}): {row.median:.3f} s, goal {OVERHEAD} s: {met}")
    return lines


def _largest(found: list[Row]) -> list[Row]:
    """Those of the most pixels."""

    def pixels(row: Row) -> int:
        return max((int(word) for word in row.case.split(" ") if word.isdigit()), default=0)

    return [row for row in found if pixels(row) == max(map(pixels, found))]


def _verdict(held: bool) -> str:
    return "met" if held else "**missed**"


def left_out(result: dict[str, Any]) -> list[str]:
    """What failed and what was not asked, by name."""
    lines = [f"- FAILED: {each['system']}, {each['case']}: {each['error']}" for each in result["errors"]]
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in result["skipped"]:
        reasons.setdefault((each["system"], each["reason"]), []).append(each["case"])
    return lines + [f"- left out: {system}, {reason}: {', '.join(at)}" for (system, reason), at in reasons.items()]
